"""The training loop: step, report, preview, checkpoint, and going on exactly where it stopped.

It knows models, LoRA and FP8 only through what it is given. The randomness of step n is a pure function of
(seed, n), so a resumed run repeats the very numbers of an uninterrupted one. A step whose loss or gradient
is not finite counts as a step and changes nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import TrainingCache
from ppcoat.host import memory_in_use
from ppcoat.lora import LoRASummary
from ppcoat.nn.saved import SavedTensors
from ppcoat.train.checkpoint import check_compatible, load_latest, save_checkpoint
from ppcoat.train.coat import COATTrainer
from ppcoat.train.ema import RunningMean
from ppcoat.train.finite import first_bad_module
from ppcoat.train.objective import FlowMatching
from ppcoat.train.optimizer_state import optimizer_state_bytes, optimizer_tensors, set_optimizer_tensors
from ppcoat.train.report import Report, SigmaBins
from ppcoat.train.stopping import FinishStepOnSignal
from ppcoat.train.validation import Validation


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the forward passes; grad_norm: global, before clipping; saved: byte counts of the last
    forward pass; skipped: one of the numbers was not finite, so nothing was updated."""

    loss: float
    grad_norm: float
    saved: SavedTensors | None
    skipped: bool


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves. `losses` are those of the steps done by this call, without skipped ones; bytes are
    of the last forward pass. lora_file: the first of the formats."""

    lora_file: Path
    losses: list[float]
    seconds: float
    bytes_kept: int
    bytes_unpacked: int
    optimizer_bytes: int


@dataclass
class Trainer:
    """Everything a run needs, put together elsewhere (flux_lora.py); `run` does the rest.

    parameters: what is trained, by name. save_weights(step, final) writes the result files and says what is
    in them. draw_previews() -> (pictures, prompts). ema: the running mean that previews, validation and
    files are made of, if there is one. compatible: facts that a resumed run must share.
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
    save_weights: Callable[[int, bool], list[tuple[Path, LoRASummary]]]
    draw_previews: Callable[[], tuple[list[Image.Image], list[str]]] | None = None
    ema: RunningMean | None = None
    validation: Validation | None = None
    compatible: dict = field(default_factory=dict)
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    bins: SigmaBins = field(default_factory=SigmaBins)

    def run(self) -> TrainingResult:
        """Train from the latest checkpoint (or from the start) to train.steps and write the result files.

        Ctrl+C and SIGTERM finish the step, save a checkpoint and leave with 130 or 143; a second one leaves
        at once. Raises FloatingPointError after train.max_skipped_in_a_row skipped steps, naming the first
        tensor that is not finite; the checkpoints stay as they were.
        """
        config, losses, saved, started = self.config, [], None, time.perf_counter()
        self._resume()
        first_step, logging = self.step, config.logging
        report = Report(config.run_dir, config.train.steps, logging.log_every, logging.visualdl, self.step)
        with report, FinishStepOnSignal() as stop:
            if first_step < config.train.steps and self._previews_come_first():
                self._preview(report)
            while self.step < config.train.steps:
                learning_rate = self.optimizer.get_lr()
                result = self.train_step()
                losses += [] if result.skipped else [result.loss]
                saved = result.saved
                self._report_step(report, result, learning_rate)
                last = self.step == config.train.steps
                if last or stop.signal or self.step % config.save.save_every == 0:
                    self._save(report, with_weights=not last)
                if stop.signal:
                    report.message(
                        f"stopped at step {self.step}; run the same command again to go on from there"
                    )
                    raise SystemExit(128 + stop.signal)
                every = config.sample.sample_every
                if every and (last or self.step % every == 0):
                    self._preview(report)
            file = self._write_weights(report, final=True)
        return TrainingResult(
            file,
            losses,
            time.perf_counter() - started,
            saved.bytes_kept if saved else 0,
            saved.bytes_unpacked if saved else 0,
            optimizer_state_bytes(self.optimizer),
        )

    def train_step(self) -> StepResult:
        """One optimizer update from train.gradient_accumulation forward passes.

        The host waits for the device once, after the last backward pass. Raises FloatingPointError where
        this is one skipped step too many.
        """
        rng = np.random.default_rng([self.config.seed, self.step])
        paddle.seed(int(rng.integers(2**31)))  # LoRA dropout draws on the device
        passes, drawn, losses, of_pictures = self.config.train.gradient_accumulation, [], [], []
        for _ in range(passes):
            batch = self.cache.batch(next(self.batches), rng)
            drawn.append((batch, *self.objective.draw(batch, rng)))
            self._note_memory("before_forward")
            with self.coat.saved_tensors() as saved:
                found = self.objective.losses_at(self.model, *drawn[-1])
                loss = found.mean / passes
            self._note_memory("after_forward")
            loss.backward()
            self._note_memory("after_backward")
            losses.append(loss.detach())
            of_pictures.append(found.of_pictures)
        losses, of_pictures, squares = _read(losses, of_pictures, self._gradient_squares())
        mean, norm = sum(map(float, losses)), float(np.sqrt(squares.sum()))
        skipped = not (np.isfinite(mean) and np.isfinite(norm))
        if skipped:
            self._skip(losses, squares, drawn)
        else:
            self._update(np.concatenate([sigma for _, sigma, _ in drawn]), of_pictures)
        self.optimizer.clear_grad()
        self.step += 1
        return StepResult(mean, norm, saved, skipped)

    def _update(self, sigmas: np.ndarray, of_pictures: np.ndarray) -> None:
        self.optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update()
        self._note_memory("after_optimizer_step")
        self.bins.add(sigmas, of_pictures)
        self.skipped_in_a_row = 0

    @paddle.no_grad()
    def _gradient_squares(self) -> paddle.Tensor:
        """Sum of squares of every parameter's gradient, float32 [parameters]."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        nothing = paddle.zeros([])
        return paddle.stack([nothing if g is None else g.astype("float32").square().sum() for g in gradients])

    def _skip(self, losses: np.ndarray, squares: np.ndarray, drawn: list[tuple]) -> None:
        """Count a step that changes nothing. Raises FloatingPointError if it is one too many."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.config.train.max_skipped_in_a_row:
            return
        bad_passes = np.flatnonzero(~np.isfinite(losses))
        if bad_passes.size:
            number = int(bad_passes[0])
            first = f"the loss, {losses[number]}"
            batch, sigma, noise = drawn[number]
            module = first_bad_module(
                self.model, lambda: self.objective.losses_at(self.model, batch, sigma, noise)
            )
            first += "" if module is None else f", and before it the output of {module}"
        else:
            paths = [path for path, square in zip(self.parameters, squares, strict=True)
                     if not np.isfinite(square)]  # fmt: skip
            first = f"the gradient of {paths[0]}"
        raise FloatingPointError(
            f"{self.skipped_in_a_row} steps in a row were skipped for a loss or gradient that is not finite; "
            f"in step {self.step + 1} the first bad tensor is {first}. Checkpoints are unharmed. Lower "
            "train.lr, or train in float32 or bfloat16"
        )

    def _report_step(self, report: Report, result: StepResult, learning_rate: float) -> None:
        scalars = {"loss": result.loss, "lr": learning_rate, "grad_norm": result.grad_norm}
        if result.saved is not None:
            scalars["kept_bytes"] = result.saved.bytes_kept
        scalars["skipped_steps"] = self.skipped
        train, points = self.config.train, {}
        if report.is_point(self.step):
            points |= self.bins.take()
        if self.validation and (self.step == train.steps or self.step % train.validation.every == 0):
            with self._final_weights():
                points |= self.validation.losses(self.model)
        report.step(self.step, scalars, points, images=train.batch_size * train.gradient_accumulation)

    def _note_memory(self, stage: str) -> None:
        """The line that coat.memory.log_memory_stats asks for."""
        if self.config.coat.memory.log_memory_stats:
            print(f"[{stage}] Step {self.step + 1}: {memory_in_use()}")

    def _previews_come_first(self) -> bool:
        sample = self.config.sample
        wanted = bool(sample.sample_every) and not sample.skip_first_sample
        return wanted and (self.step == 0 or sample.force_first_sample)

    def _preview(self, report: Report) -> None:
        if self.draw_previews is None:
            return
        began = time.perf_counter()
        with self._final_weights():
            pictures, prompts = self.draw_previews()
        report.images(self.step, pictures, prompts)
        seconds = time.perf_counter() - began
        report.message(f"step {self.step}: {len(pictures)} previews in {seconds:.1f} s")

    def _final_weights(self) -> AbstractContextManager[None]:
        """Within it, the model has the weights that are written: the running mean where there is one."""
        return self.ema.in_place_of_parameters() if self.ema is not None else nullcontext()

    def _write_weights(self, report: Report, final: bool) -> Path:
        """The LoRA files of this step or of the end; the first of them."""
        with self._final_weights():
            written = self.save_weights(self.step, final)
        for path, summary in written:
            report.message(f"LoRA file: {path}: {summary.line()}")
        return written[0][0]

    def _save(self, report: Report, with_weights: bool) -> None:
        """A checkpoint, and the LoRA files of its step; those of the last step are the final ones."""
        if with_weights:
            self._write_weights(report, final=False)
        state = {
            "compatible": self.compatible,
            "batches": self.batches.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.last_lr},
            "skipped": {"steps": self.skipped, "in_a_row": self.skipped_in_a_row},
            "bins": self.bins.state_dict(),
        }
        tensors = {"lora": self.parameters, "optimizer": optimizer_tensors(self.optimizer, self.parameters)}
        if self.ema is not None:
            tensors["ema"] = self.ema.tensors
        save_checkpoint(
            self.config.run_dir, self.step, tensors, state, self.config.save.max_step_saves_to_keep
        )

    def _resume(self) -> None:
        checkpoint = load_latest(self.config.run_dir)
        if checkpoint is None:
            return
        state = checkpoint.state
        check_compatible(state["compatible"], self.compatible)
        for name, parameter in self.parameters.items():
            paddle.assign(checkpoint.tensors["lora"][name], output=parameter)
        self.batches.load_state_dict(state["batches"])
        set_optimizer_tensors(self.optimizer, checkpoint.tensors["optimizer"], self.parameters)
        self.schedule.set_state_dict(state["schedule"])
        if self.ema is not None:
            self.ema.load(checkpoint.tensors["ema"])
        self.skipped, self.skipped_in_a_row = state["skipped"]["steps"], state["skipped"]["in_a_row"]
        self.bins.load_state_dict(state["bins"])
        self.step = checkpoint.step
        done = (
            f"; nothing is left of {self.config.train.steps} steps"
            if self.step >= self.config.train.steps
            else ""
        )
        print(f"resuming from {checkpoint.path}{done}")


def _read(
    losses: list[paddle.Tensor], of_pictures: list[paddle.Tensor], squares: paddle.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scalars, [B] of each pass and [parameters] -> one array of each kind, in one read from the device."""
    parts = [paddle.stack(losses), paddle.concat(of_pictures), squares]
    ends = np.cumsum([part.shape[0] for part in parts])[:-1]
    first, second, third = np.split(paddle.concat(parts).numpy(), ends)
    return first, second, third.astype(np.float64)
