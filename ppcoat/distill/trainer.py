"""The LoRA trainer with two sides that take turns: heads at even steps, the LoRA at odd ones.

Trainer alone has one set of parameters, one optimizer, one objective. Here these are exchanged for the length
of a step, so that averaging over ranks, skipping of bad steps, signals, reports and previews are Trainer's
own; between steps it holds both sides, and that is what goes into a checkpoint. Whose turn it is follows from
the number of the step, which is in the checkpoint's manifest.

The heads are updated one after the other, so that no update holds more than one head's memory. At FLUX.1's
width the 57 heads have 1,077 M parameters. An optimizer that takes them at once needs their gradients and
several float32 copies together; here each head has an optimizer of its own, and its gradients are given back
as soon as it is updated. The states, and so the result, are those of one optimizer over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import paddle

from ppcoat.data.batches import ResumableBatches
from ppcoat.distill.objective import DiscriminatorObjective, Distillation
from ppcoat.train.coat import COATTrainer
from ppcoat.train.optimizer_state import is_of_parameter, optimizer_state_bytes
from ppcoat.train.report import Report, SigmaBins
from ppcoat.train.trainer import StepResult, Trainer

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


@dataclass
class Side:
    """What one of the two trains, with what, and for what; the fields are those of Trainer."""

    parameters: dict[str, paddle.Tensor]
    objective: Distillation | DiscriminatorObjective
    optimizer: paddle.optimizer.Optimizer
    schedule: paddle.optimizer.lr.LRScheduler
    coat: COATTrainer | NothingKept
    bins: SigmaBins = field(default_factory=SigmaBins)


class NothingKept:
    """Stands for COATTrainer where a step keeps nothing for backward."""

    def saved_tensors(self) -> AbstractContextManager[None]:
        """A context that does nothing."""
        return nullcontext()


class BothOptimizers:
    """Two optimizers as a checkpoint and a report see them: one state, and the rate of whose turn it is."""

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self._sides = sides
        self.turn: Callable[[], str] = lambda: GENERATOR  # set by the trainer, which counts the steps

    def get_lr(self) -> float:
        """The learning rate of the side whose turn it is."""
        return self._sides[self.turn()].optimizer.get_lr()

    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(optimizer_state_bytes(side.optimizer) for side in self._sides.values())

    def state_dict(self) -> dict:
        """Both states; names that do not begin with a parameter's own get that of the side in front."""
        return {
            key if is_of_parameter(key, side.parameters.values()) else f"{name}.{key}": value
            for name, side in self._sides.items()
            for key, value in side.optimizer.state_dict().items()
        }

    def set_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave. Raises ConfigError as FP8AdamW does."""
        for name, side in self._sides.items():
            parameters = side.parameters.values()
            own = {key: value for key, value in state.items() if is_of_parameter(key, parameters)}
            prefix = f"{name}."
            own |= {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            side.optimizer.set_state_dict(own)


@dataclass
class LightningTrainer(Trainer):
    """A Trainer for one or two Sides by name. Built by flux_lightning.py; `run` is Trainer's."""

    sides: dict[str, Side] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.optimizer.turn = lambda: self.turn(self.step)

    def turn(self, step: int) -> str:
        """Whose turn step number `step`, from 0, is."""
        return DISCRIMINATOR if DISCRIMINATOR in self.sides and step % 2 == 0 else GENERATOR

    def train_step(self) -> StepResult:
        """One update of the side whose turn it is."""
        with self._only(self.sides[self.turn(self.step)]):
            return super().train_step()

    @contextmanager
    def _only(self, side: Side) -> Iterator[None]:
        """Within it, the trainer is that of one side."""
        both = {name: getattr(self, name) for name in vars(side)}
        self.__dict__.update(vars(side))
        try:
            yield
        finally:
            self.__dict__.update(both)

    def _report_step(self, report: Report, result: StepResult, learning_rate: float) -> None:
        """As Trainer's, with the loss under the name of its side too, and its terms at points of curves."""
        name = self.turn(self.step - 1)
        scalars = {"loss": result.loss, f"loss_{name}": result.loss, "lr": learning_rate}
        scalars |= {"grad_norm": result.grad_norm, "skipped_steps": self.skipped}
        if result.saved is not None:
            scalars["kept_bytes"] = result.saved.bytes_kept
        points = {}
        if report.is_point(self.step) or report.is_point(self.step + 1):  # a point for either side
            parts = self.sides[name].objective.parts
            points = {f"loss_{part}": float(value) for part, value in parts.items()}
        if report.is_point(self.step):
            points |= self.bins.take()
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


def both_sides(sides: dict[str, Side]) -> dict:
    """The Trainer fields that stand for all sides between steps."""
    parameters = {
        (path if name == GENERATOR else f"{name}.{path}"): parameter
        for name, side in sides.items()
        for path, parameter in side.parameters.items()
    }
    first = sides[GENERATOR]
    return {"parameters": parameters, "optimizer": BothOptimizers(sides), "schedule": first.schedule,
            "objective": first.objective, "coat": first.coat, "bins": first.bins}  # fmt: skip


class HeadsOptimizer:
    """One optimizer per head, seen as one.

    make(parameters) -> an optimizer without gradient clipping; all share one learning rate schedule.
    max_grad_norm: bound of the norm of all heads' gradients together, 0 for none.
    """

    def __init__(
        self,
        heads: Sequence[paddle.nn.Layer],
        make: Callable[[list[paddle.Tensor]], paddle.optimizer.Optimizer],
        max_grad_norm: float = 1.0,
    ) -> None:
        self._parameters = [head.parameters() for head in heads]
        self._optimizers = [make(parameters) for parameters in self._parameters]
        self._max_grad_norm = max_grad_norm

    def get_lr(self) -> float:
        """The learning rate, the same for all."""
        return self._optimizers[0].get_lr()

    def state_bytes(self) -> int:
        """Bytes of all moments."""
        return sum(optimizer_state_bytes(optimizer) for optimizer in self._optimizers)

    @paddle.no_grad()
    def step(self) -> None:
        """One update of every head from the gradients that are there; they are gone afterwards."""
        factor = self._clip_factor() if self._max_grad_norm > 0 else None
        for optimizer, parameters in zip(self._optimizers, self._parameters, strict=True):
            if factor is not None:
                for parameter in parameters:
                    parameter.grad.multiply_(factor)
            optimizer.step()
            _release(parameters)

    def clear_grad(self) -> None:
        """Give back the memory of all gradients."""
        for parameters in self._parameters:
            _release(parameters)

    def state_dict(self) -> dict[str, paddle.Tensor]:
        """The states of all; names that do not begin with a parameter's own get the number of the head in
        front."""
        return {
            name if is_of_parameter(name, parameters) else f"{i}.{name}": value
            for i, (optimizer, parameters) in self._numbered()
            for name, value in optimizer.state_dict().items()
        }

    def set_state_dict(self, state: dict[str, paddle.Tensor]) -> None:
        """Restore what state_dict gave. Raises ConfigError as FP8AdamW does."""
        for i, (optimizer, parameters) in self._numbered():
            own = {name: value for name, value in state.items() if is_of_parameter(name, parameters)}
            prefix = f"{i}."
            own |= {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
            optimizer.set_state_dict(own)

    def _numbered(self) -> Iterator[tuple[int, tuple[paddle.optimizer.Optimizer, list[paddle.Tensor]]]]:
        return enumerate(zip(self._optimizers, self._parameters, strict=True))

    def _clip_factor(self) -> paddle.Tensor:
        """What brings the norm of all gradients down to its bound, float32 scalar, at most 1."""
        squares = [p.grad.astype("float32").square().sum() for head in self._parameters for p in head]
        norm = paddle.stack(squares).sum().sqrt()
        return self._max_grad_norm / paddle.clip(norm, min=self._max_grad_norm)


def _release(parameters: list[paddle.Tensor]) -> None:
    for parameter in parameters:
        parameter.clear_gradient(False)
