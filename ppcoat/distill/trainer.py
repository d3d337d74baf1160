"""The LoRA trainer with two sides that take turns: heads at even steps, the LoRA at odd ones.

Averaging over ranks, skipping of bad steps, signals, reports and previews are Trainer's own, for the side
whose turn it is; checkpoints hold both. Whose turn it is follows from the number of the step, which is in the
checkpoint's manifest.

The heads are updated one after the other, so that no update holds more than one head's memory. At FLUX.1's
width the 57 heads have 1,077 M parameters. An optimizer that takes them at once needs their gradients and
several float32 copies together; here each head has an optimizer of its own, and its gradients are given back
as soon as it is updated. The states, and so the result, are those of one optimizer over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import paddle

from ppcoat.data.batches import ResumableBatches
from ppcoat.train.report import Report
from ppcoat.train.run_state import OptimizerGroup, RunState
from ppcoat.train.trainer import Side, StepResult, Trainer

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class NothingSaved:
    """Stands for COATTrainer where a step saves nothing for backward."""

    def saved_tensors(self) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return nullcontext()


@dataclass
class LightningTrainer(Trainer):
    """A Trainer of one or two sides, GENERATOR and DISCRIMINATOR. Built by flux_lightning.py; `run` is
    Trainer's."""

    @property
    def side(self) -> Side:
        """What the next update trains."""
        return self.sides[self.turn(self.step)]

    def turn(self, step: int) -> str:
        """Whose turn step number `step`, from 0, is."""
        return DISCRIMINATOR if DISCRIMINATOR in self.sides and step % 2 == 0 else GENERATOR

    def steps_of(self, side: str) -> int:
        """Every second, the heads' first, where there are heads."""
        steps = self.config.train.steps
        return (steps + (side == DISCRIMINATOR)) // 2 if DISCRIMINATOR in self.sides else steps

    def _report_step(self, report: Report, result: StepResult, learning_rate: float) -> None:
        """As Trainer's, with the loss under the name of its side too, and its terms at points of curves."""
        name = self.turn(self.step - 1)
        scalars = {"loss": result.loss, f"loss_{name}": result.loss, "lr": learning_rate}
        scalars |= {"grad_norm": result.grad_norm, "skipped_steps": self.state.skipped}
        if result.saved is not None:
            scalars["kept_bytes"] = result.saved.bytes_kept
        points = {}
        if report.is_point(self.step) or report.is_point(self.step + 1):  # a point for either side
            parts = self.sides[name].objective.parts
            points = {f"loss_{part}": float(value) for part, value in parts.items()}
        if report.is_point(self.step):
            points |= self.state.bins.take()
        train = self.config.train
        report.step(
            self.step, scalars, points, train.batch_size * train.gradient_accumulation * self.ranks.size
        )


class RestartedBatches(ResumableBatches):
    """As the public code does it: a resumed run sees its first pictures again."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check as ResumableBatches does, and begin anew."""
        super().load_state_dict(state)
        self.batches = 0


def joint_state(sides: dict[str, Side], batches: ResumableBatches, compatible: dict) -> RunState:
    """What a checkpoint holds of all sides: both sets of parameters and of optimizer states, and the
    generator's schedule and losses by noise level."""
    parameters = {
        (path if name == GENERATOR else f"{name}.{path}"): parameter
        for name, side in sides.items()
        for path, parameter in side.parameters.items()
    }
    optimizers = {name: (side.optimizer, side.parameters.values()) for name, side in sides.items()}
    first = sides[GENERATOR]
    return RunState(
        parameters, OptimizerGroup(optimizers), first.schedule, batches, first.bins, compatible=compatible
    )


class HeadsOptimizer(OptimizerGroup):
    """One optimizer per head, by the head's number, seen as one.

    make(parameters) -> an optimizer without gradient clipping; all share one learning rate schedule.
    max_grad_norm: bound of the norm of all heads' gradients together, 0 for none.
    """

    def __init__(
        self,
        heads: Sequence[paddle.nn.Layer],
        make: Callable[[list[paddle.Tensor]], paddle.optimizer.Optimizer],
        max_grad_norm: float = 1.0,
    ) -> None:
        own = [head.parameters() for head in heads]
        super().__init__({str(i): (make(parameters), parameters) for i, parameters in enumerate(own)})
        self._max_grad_norm = max_grad_norm

    def get_lr(self) -> float:
        """The learning rate, the same for all."""
        return self.parts["0"][0].get_lr()

    @paddle.no_grad()
    def step(self) -> None:
        """One update of every head from the gradients that are there; they are gone afterwards."""
        factor = self._clip_factor() if self._max_grad_norm > 0 else None
        for optimizer, parameters in self.parts.values():
            if factor is not None:
                for parameter in parameters:
                    parameter.grad.multiply_(factor)
            optimizer.step()
            _release(parameters)

    def clear_grad(self) -> None:
        """Give back the memory of all gradients."""
        for _, parameters in self.parts.values():
            _release(parameters)

    def _clip_factor(self) -> paddle.Tensor:
        """What brings the norm of all gradients down to its bound, float32 scalar, at most 1."""
        squares = [p.grad.astype("float32").square().sum() for _, head in self.parts.values() for p in head]
        norm = paddle.stack(squares).sum().sqrt()
        return self._max_grad_norm / paddle.clip(norm, min=self._max_grad_norm)


def _release(parameters: list[paddle.Tensor]) -> None:
    for parameter in parameters:
        parameter.clear_gradient(False)
