"""The training loop: step, report, preview, checkpoint, and going on exactly where it stopped.

It knows models, LoRA and FP8 only through what it is given. The randomness of step n is a pure function of
(seed, n), so a resumed run repeats the very numbers of an uninterrupted one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import paddle
from PIL import Image

from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import TrainingCache
from ppcoat.host import memory_in_use
from ppcoat.nn.saved import SavedTensors
from ppcoat.train.checkpoint import check_compatible, load_latest, save_checkpoint
from ppcoat.train.coat import COATTrainer
from ppcoat.train.objective import FlowMatching
from ppcoat.train.report import Report


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves. `losses` are those of the steps done by this call; bytes are of the last forward
    pass."""

    lora_file: Path
    losses: list[float]
    seconds: float
    bytes_kept: int
    bytes_unpacked: int
    optimizer_bytes: int


@dataclass
class Trainer:
    """Everything a run needs, put together elsewhere (flux_lora.py); `run` does the rest.

    parameters: what is trained, by name. draw_previews() -> (pictures, prompts) or None. save_weights(step)
    writes the result file and returns its path. compatible: facts that a resumed run must share.
    """

    config: RunConfig
    model: paddle.nn.Layer
    parameters: dict[str, paddle.Tensor]
    objective: FlowMatching
    cache: TrainingCache
    batches: ResumableBatches
    optimizer: paddle.optimizer.Optimizer
    schedule: paddle.optimizer.lr.LRScheduler
    coat: COATTrainer
    save_weights: Callable[[int], Path]
    draw_previews: Callable[[], tuple[list[Image.Image], list[str]]] | None = None
    compatible: dict = field(default_factory=dict)
    step: int = 0

    def run(self) -> TrainingResult:
        """Train from the latest checkpoint (or from the start) to train.steps and write the result file.

        Ctrl+C and SIGTERM finish the step, save a checkpoint and leave with 130 or 143; a second one leaves
        at once.
        """
        config, losses, saved, started = self.config, [], None, time.perf_counter()
        self._resume()
        logging = config.logging
        report = Report(config.run_dir, config.train.steps, logging.log_every, logging.visualdl, self.step)
        with report, _FinishStepOnSignal() as stop:
            while self.step < config.train.steps:
                learning_rate = self.optimizer.get_lr()
                loss, saved = self.train_step()
                losses.append(loss)
                report.step(self.step, self._scalars(loss, learning_rate, saved))
                last = self.step == config.train.steps
                if last or stop.signal or self.step % config.save.save_every == 0:
                    self._save()
                if stop.signal:
                    report.message(
                        f"stopped at step {self.step}; run the same command again to go on from there"
                    )
                    raise SystemExit(128 + stop.signal)
                every = config.sample.sample_every
                if self.draw_previews and every and (last or self.step % every == 0):
                    report.images(self.step, *self.draw_previews())
            file = self.save_weights(self.step)
            report.message(f"LoRA file: {file}")
        return TrainingResult(
            file,
            losses,
            time.perf_counter() - started,
            saved.bytes_kept if saved else 0,
            saved.bytes_unpacked if saved else 0,
            optimizer_state_bytes(self.optimizer),
        )

    def train_step(self) -> tuple[float, SavedTensors | None]:
        """One optimizer update -> (mean loss, byte counts of the last forward pass).

        Raises FloatingPointError, before anything is updated, if the loss is not finite.
        """
        rng = np.random.default_rng([self.config.seed, self.step])
        paddle.seed(int(rng.integers(2**31)))  # LoRA dropout draws on the device
        passes, mean = self.config.train.gradient_accumulation, 0.0
        for _ in range(passes):
            batch = self.cache.batch(next(self.batches), rng)
            self._note_memory("before_forward")
            with self.coat.saved_tensors() as saved:
                loss = self.objective.loss(self.model, batch, rng) / passes
            self._note_memory("after_forward")
            loss.backward()
            self._note_memory("after_backward")
            mean += float(loss)
        if not np.isfinite(mean):
            raise FloatingPointError(
                f"the loss of step {self.step + 1} is {mean}; checkpoints are unharmed. "
                "Lower train.lr, or train in float32 or bfloat16"
            )
        self.optimizer.step()
        self.optimizer.clear_grad()
        self.schedule.step()
        self._note_memory("after_optimizer_step")
        self.step += 1
        return mean, saved

    def _note_memory(self, stage: str) -> None:
        """The line that coat.memory.log_memory_stats asks for."""
        if self.config.coat.memory.log_memory_stats:
            print(f"[{stage}] step {self.step + 1}: {memory_in_use()}")

    def _scalars(self, loss: float, learning_rate: float, saved: SavedTensors | None) -> dict[str, float]:
        scalars = {"loss": loss, "lr": learning_rate}
        if saved is not None:
            scalars["kept_bytes"] = saved.bytes_kept
        if hasattr(self.optimizer, "skipped_steps"):
            scalars["skipped_steps"] = self.optimizer.skipped_steps
        return scalars

    def _save(self) -> None:
        state = {
            "compatible": self.compatible,
            "batches": self.batches.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.last_lr},
        }
        tensors = {"lora": self.parameters, "optimizer": optimizer_tensors(self.optimizer, self.parameters)}
        save_checkpoint(
            self.config.run_dir, self.step, tensors, state, self.config.save.max_step_saves_to_keep
        )

    def _resume(self) -> None:
        checkpoint = load_latest(self.config.run_dir)
        if checkpoint is None:
            return
        check_compatible(checkpoint.state["compatible"], self.compatible)
        for name, parameter in self.parameters.items():
            paddle.assign(checkpoint.tensors["lora"][name], output=parameter)
        self.batches.load_state_dict(checkpoint.state["batches"])
        set_optimizer_tensors(self.optimizer, checkpoint.tensors["optimizer"], self.parameters)
        self.schedule.set_state_dict(checkpoint.state["schedule"])
        self.step = checkpoint.step
        done = (
            f"; nothing is left of {self.config.train.steps} steps"
            if self.step >= self.config.train.steps
            else ""
        )
        print(f"resuming from {checkpoint.path}{done}")


class _FinishStepOnSignal:
    """Within it, the first SIGINT or SIGTERM is only noted in `signal`; a second one acts as usual."""

    signal = 0

    def __enter__(self) -> _FinishStepOnSignal:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


def optimizer_state_bytes(optimizer: paddle.optimizer.Optimizer) -> int:
    """Bytes of the moments that an optimizer keeps, counted from its tensors."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    moments = [t for name, t in optimizer.state_dict().items() if "moment" in name]
    return sum(t.size * t.element_size() for t in moments)


def optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer, parameters: dict[str, paddle.Tensor]
) -> dict[str, paddle.Tensor]:
    """The optimizer's tensors under names that hold in another process.

    Paddle's AdamW names a moment after its parameter's automatic name (linear_7.w_0); here it gets the path.
    """
    state = {
        name: value for name, value in optimizer.state_dict().items() if isinstance(value, paddle.Tensor)
    }
    for path, parameter in parameters.items():
        prefix = f"{parameter.name}_"
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{path}|{name.removeprefix(prefix)}"] = state.pop(name)
    return state


def set_optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer,
    tensors: dict[str, paddle.Tensor],
    parameters: dict[str, paddle.Tensor],
) -> None:
    """The way back."""
    state = dict(tensors)
    for name in [name for name in state if "|" in name]:
        path, _, part = name.partition("|")
        state[f"{parameters[path].name}_{part}"] = state.pop(name)
    optimizer.set_state_dict(state)
