"""The training loop: step, report, preview, checkpoint, and going on exactly where it stopped.

It knows models, LoRA and FP8 only through what it is given. The randomness of step n is a pure function of
(seed, n), so a resumed run repeats the very numbers of an uninterrupted one. A step whose loss or gradient
is not finite counts as a step and changes nothing else. With several ranks each draws the whole global batch
and computes its part of it, so one rank with the same global batch does the same.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from ppcoat.atomic import is_disk_error
from ppcoat.coat import COATTrainer, factor_copies
from ppcoat.config.schema import RunConfig
from ppcoat.data.cache import TrainingCache
from ppcoat.device import memory_in_use
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRASummary
from ppcoat.nn.linear import FactorCopies
from ppcoat.nn.saved_tensors import SavedTensors
from ppcoat.objective import Objective
from ppcoat.optim import Prodigy, ScheduleFreeAdamW
from ppcoat.train.checkpoint import save_run
from ppcoat.train.divergence import BadStep, check_before_saving, check_weights, give_up
from ppcoat.train.previews import Validation
from ppcoat.train.ranks import Ranks
from ppcoat.train.report import Report, SigmaBins
from ppcoat.train.resume import resume_run
from ppcoat.train.run_state import FinishStepOnSignal, ResumeWords, RunState, optimizer_state_bytes

# What drawing and writing a picture may raise for a disk, a size or a device that does not play along.
_PREVIEW_ERRORS = (OSError, MemoryError, RuntimeError, ValueError)
# (step, whether it is the last) -> the files it wrote, each with what is in it
SaveWeights = Callable[[int, bool], list[tuple[Path, LoRASummary]]]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the forward passes and the ranks; grad_norm: global, before clipping; saved: byte
    counts of the last forward pass; skipped: a number was not finite, so nothing was updated. preservation:
    the loss that keeps the model's own output, with its weight."""

    loss: float
    grad_norm: float
    saved: SavedTensors | None
    skipped: bool
    preservation: float = 0.0


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves. `losses` are those of the steps done by this call, without skipped ones; bytes are
    of the last forward pass. lora_file: the first of the formats; None on ranks that write nothing."""

    lora_file: Path | None
    losses: list[float]
    seconds: float
    bytes_kept: int
    bytes_unpacked: int
    optimizer_bytes: int


@dataclass
class Side:
    """What a step trains, with what, and for what. parameters: by name, any shape. preservation: weight of
    the loss that keeps the model's own output, 0 without. bins: losses by noise level."""

    parameters: dict[str, paddle.Tensor]
    objective: Objective
    optimizer: paddle.optimizer.Optimizer
    schedule: paddle.optimizer.lr.LRScheduler
    coat: COATTrainer
    preservation: float = 0.0
    bins: SigmaBins = field(default_factory=SigmaBins)


@dataclass
class Trainer:
    """Everything a run needs, put together elsewhere (run.py); `run` does the rest.

    sides: what is trained, by name; a LoRA run has one. state: what goes into checkpoints; previews,
    validation and files are made of its running mean, if there is one, and its batches give the global batch
    of all `ranks`. save_weights(step, final) writes the result files and says what is in them.
    draw_previews() -> (pictures, prompts). words: how a user goes on after a stop. settings: as `resume_run`
    takes them. factors: the LoRAs in the dtype of the model, for a step.
    """

    config: RunConfig
    model: paddle.nn.Layer
    sides: dict[str, Side]
    state: RunState
    cache: TrainingCache
    save_weights: SaveWeights
    draw_previews: Callable[[], tuple[list[Image.Image], list[str]]] | None = None
    validation: Validation | None = None
    settings: str = ""
    words: ResumeWords = ResumeWords()
    ranks: Ranks = field(default_factory=Ranks)
    factors: FactorCopies = field(init=False)
    _base_is_whole: bool = field(default=False, init=False)  # looked at, and found finite

    def __post_init__(self) -> None:
        self.factors = factor_copies(self.model, [side.optimizer for side in self.sides.values()])

    @property
    def step(self) -> int:
        """Updates done."""
        return self.state.step

    @property
    def side(self) -> Side:
        """What the next update trains."""
        (only,) = self.sides.values()
        return only

    def steps_of(self, side: str) -> int:
        """Updates of the whole run that train this side."""
        return self.config.train.steps

    def run(self) -> TrainingResult:
        """Train from the latest checkpoint (or from the start) to train.steps and write the result files.

        Ctrl+C and SIGTERM, on any rank, finish the step, save a checkpoint and leave with 130 or 143; a
        second one leaves at once where there is one rank. Only the first rank reports, draws and saves.
        Raises FloatingPointError after train.max_skipped_in_a_row skipped steps, naming the first tensor that
        is not finite, and ConfigError for a disk that is full: checkpoint and LoRA files of the step are
        tried one by one before that, and what was saved earlier stays. Previews and logs that cannot be
        written cost a warning.
        """
        steps, losses, saved, started = self.config.train.steps, [], None, time.perf_counter()
        resume_run(self.state, self.config, self.ranks, self.words, self.settings)
        with self._report() as report, FinishStepOnSignal(second_acts=self.ranks.size == 1) as stop:
            if report is not None and self.step < steps and self._previews_come_first():
                self._preview(report)
            while self.step < steps:
                learning_rate = self.side.optimizer.get_lr()
                result = self.train_step()
                losses += [] if result.skipped else [result.loss]
                saved = result.saved
                signal = int(self.ranks.gather([stop.signal]).max())
                if report is not None:
                    self._after_step(report, result, learning_rate, stopping=signal > 0)
                if signal:
                    self.ranks.close()
                    raise SystemExit(128 + signal)
            file = None if report is None else self._save(report, checkpoint=False, final=True)
        self.ranks.close()
        return TrainingResult(
            file,
            losses,
            time.perf_counter() - started,
            saved.bytes_kept if saved else 0,
            saved.bytes_unpacked if saved else 0,
            optimizer_state_bytes(self.state.optimizer),
        )

    def _report(self) -> AbstractContextManager[Report | None]:
        if not self.ranks.is_first:
            return nullcontext()
        config, logging = self.config, self.config.logging
        try:
            return Report(config.run_dir, config.train.steps, logging.log_every, logging.visualdl, self.step)
        except OSError as error:
            if not is_disk_error(error):
                raise
            raise ConfigError(
                f"the run folder cannot be written to: {error.filename}: {error.strerror}; make room on the "
                "disk, or choose another output_dir"
            ) from error

    def _after_step(self, report: Report, result: StepResult, learning_rate: float, stopping: bool) -> None:
        """Curves, checkpoint and previews that are due."""
        config = self.config
        self._report_step(report, result, learning_rate)
        last, every = self.step == config.train.steps, config.sample.sample_every
        if last or stopping or self.step % config.save.save_every == 0:
            self._save(report, checkpoint=True, final=last)
        if stopping:
            report.message(f"stopped at step {self.step}; {self.words.again} to go on from there")
        elif every and (last or self.step % every == 0):
            self._preview(report)

    def train_step(self) -> StepResult:
        """One optimizer update from train.gradient_accumulation forward passes.

        The host waits for the device once, after the last backward pass. Raises FloatingPointError where
        this is one skipped step too many.
        """
        side = self.side
        rng = np.random.default_rng([self.config.seed, self.step])  # the same on all ranks
        # seeds of dropout come from the host's generator: one for the pictures of this rank
        paddle.seed(int(rng.integers(2**31)) + self.ranks.rank)
        passes, drawn, levels, of_pictures = self.config.train.gradient_accumulation, [], [], []
        losses, preserved = [], []
        with self.factors.in_use():
            for _ in range(passes):
                sigma, mine = self._draw(rng)
                levels.append(sigma)
                drawn.append(mine)
                self._note_memory("before_forward")
                with side.coat.saved_tensors() as saved:
                    found = side.objective.losses_at(self.model, *mine)
                    loss = found.mean / passes
                self._note_memory("after_forward")
                loss.backward()
                self._note_memory("after_backward")
                losses.append(loss.detach())
                of_pictures.append(found.of_pictures)
                if side.preservation:
                    preserved.append(self._preserve(side, mine, passes))
        self.ranks.average_gradients(side.parameters.values())
        losses, of_pictures, squares = self._read(losses + preserved, of_pictures)
        losses, preserved = np.split(losses, [passes], axis=1)
        mean, norm = float(losses.mean(0).sum()), float(np.sqrt(squares.sum()))
        skipped = not (np.isfinite(mean) and np.isfinite(norm))
        if skipped:
            self._skip(losses, squares, drawn)
        else:
            paddle.seed(int(rng.integers(2**31)))  # stochastic rounding must be the same on all ranks
            self._update(np.concatenate(levels), of_pictures)
        side.optimizer.clear_grad()
        self.state.step += 1
        return StepResult(mean, norm, saved, skipped, float(preserved.mean(0).sum()))

    def _preserve(self, side: Side, inputs: tuple, passes: int) -> paddle.Tensor:
        """A backward pass of its own, after that of the loss, so that no two passes are held together."""
        with side.coat.saved_tensors():
            loss = side.objective.preservation_at(self.model, *inputs) * (side.preservation / passes)
        loss.backward()
        return loss.detach()

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, tuple]:
        """All noise levels of the next global batch, and this rank's part: (batch, noise levels, noise)."""
        batch = self.cache.batch(next(self.state.batches), rng)
        sigma, noise = self.side.objective.draw(batch, rng)
        share = self.ranks.share
        mine = {k: share(v) if isinstance(v, paddle.Tensor) else v for k, v in batch.items()}
        return sigma, (mine, share(sigma), share(noise))

    def _read(
        self, losses: list[paddle.Tensor], of_pictures: list[paddle.Tensor]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses of all ranks [ranks, losses], of all pictures in the order of the global batches, and the
        squared norm of each parameter's gradient; float64, in one read from the device."""
        count, passes = len(losses), len(of_pictures)
        parts = [paddle.stack(losses), paddle.concat(of_pictures), self._gradient_squares()]
        ends = np.cumsum([part.shape[0] for part in parts])[:-1]
        *mine, squares = np.split(paddle.concat(parts).numpy().astype(np.float64), ends)
        table = self.ranks.gather(np.concatenate(mine))
        pictures = table[:, count:].reshape([self.ranks.size, passes, -1]).swapaxes(0, 1)
        return table[:, :count], pictures.reshape(-1), squares

    def _update(self, levels: np.ndarray, of_pictures: np.ndarray) -> None:
        side = self.side
        side.optimizer.step()
        side.schedule.step()
        if self.state.ema is not None:
            self.state.ema.update()
        self._note_memory("after_optimizer_step")
        side.bins.add(side.objective.noise_levels(levels), of_pictures)
        self.state.skipped_in_a_row = {
            name: count
            for name, count in self.state.skipped_in_a_row.items()
            if self.sides.get(name) is not side
        }

    @paddle.no_grad()
    def _gradient_squares(self) -> paddle.Tensor:
        """Sum of squares of every parameter's gradient, float32 [parameters]."""
        gradients = [parameter.grad for parameter in self.side.parameters.values()]
        nothing = paddle.zeros([])
        return paddle.stack([nothing if g is None else g.astype("float32").square().sum() for g in gradients])

    def _skip(self, losses: np.ndarray, squares: np.ndarray, drawn: list[tuple]) -> None:
        """Count a step that changes nothing. Raises on all ranks, as divergence.py says, where it is one too
        many: in a row of this side, all that it has in this run, or one that no other step will mend."""
        state, side, train = self.state, self.side, self.config.train
        (name,) = (each for each, other in self.sides.items() if other is side)
        state.skipped += 1
        in_a_row = state.skipped_in_a_row[name] = state.skipped_in_a_row.get(name, 0) + 1
        bad = BadStep(
            self.step + 1, self.model, side.parameters, losses, squares,
            lambda number: side.objective.losses_at(self.model, *drawn[number]),
        )  # fmt: skip
        check_weights(bad, self.config, self.ranks, with_base=not self._base_is_whole)
        self._base_is_whole = True
        if in_a_row >= min(train.max_skipped_in_a_row, self.steps_of(name)):
            give_up(bad, in_a_row, self.config, self.ranks)

    def _report_step(self, report: Report, result: StepResult, learning_rate: float) -> None:
        scalars = {"loss": result.loss, "lr": learning_rate, "grad_norm": result.grad_norm}
        if self.side.preservation:
            scalars["preservation_loss"] = result.preservation
        if result.saved is not None:
            scalars["kept_bytes"] = result.saved.bytes_kept
        scalars["skipped_steps"] = self.state.skipped
        train, points = self.config.train, {}
        if report.is_point(self.step):
            points |= self.state.bins.take()
            if isinstance(self.state.optimizer, Prodigy):
                points["prodigy_d"] = self.state.optimizer.d
        if self.validation and (self.step == train.steps or self.step % train.validation.every == 0):
            with self.final_weights():
                points |= self.validation.losses(self.model)
        images = train.batch_size * train.gradient_accumulation * self.ranks.size
        report.step(self.step, scalars, points, images)

    def _note_memory(self, stage: str) -> None:
        """The line that coat.memory.log_memory_stats asks for."""
        if self.config.coat.memory.log_memory_stats and self.ranks.is_first:
            print(f"[{stage}] Step {self.step + 1}: {memory_in_use()}")

    def _previews_come_first(self) -> bool:
        sample = self.config.sample
        wanted = bool(sample.sample_every) and not sample.skip_first_sample
        return wanted and (self.step == 0 or sample.force_first_sample)

    def _preview(self, report: Report) -> None:
        """Draw and write the previews of this step. They are there to look at: what they cannot do is a
        warning, and training goes on."""
        if self.draw_previews is None:
            return
        began = time.perf_counter()
        try:
            with self.final_weights():
                pictures, prompts = self.draw_previews()
            report.images(self.step, pictures, prompts)
        except _PREVIEW_ERRORS as error:
            if isinstance(error, OSError) and not is_disk_error(error):
                raise
            reason = " ".join(str(error).split())[:200]
            report.message(f"warning: step {self.step}: no previews, training goes on: {reason}")
            return
        seconds = time.perf_counter() - began
        drawn = f"{len(pictures)} preview{'' if len(pictures) == 1 else 's'}"
        report.message(f"step {self.step}: {drawn} in {seconds:.1f} s")

    def final_weights(self) -> AbstractContextManager[None]:
        """Context manager: the model has the weights that are written, which may be a mean of the run's."""
        if self.state.ema is not None:
            return self.state.ema.in_place_of_parameters()
        optimizer = self.state.optimizer
        return optimizer.evaluation_weights() if isinstance(optimizer, ScheduleFreeAdamW) else nullcontext()

    def _save(self, report: Report, checkpoint: bool, final: bool) -> Path | None:
        """The checkpoint and the LoRA files of this step -> the first of the files, None without them.

        The final files are written after the last checkpoint and the last previews, so not together with the
        checkpoint, unless that fails. Where the disk takes one of the two and not the other, the one is there
        before ConfigError is raised. Raises FloatingPointError where training has diverged, before either.
        """
        check_before_saving(self.state, self.config.run_dir)
        done, failed, advice = {}, {}, set()

        def attempt(what: str, write: Callable[[], Path | None]) -> None:
            try:
                done[what] = write()
            except OSError as error:
                if not is_disk_error(error):
                    raise
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                failed[what] = error.strerror if full else f"{error.filename}: {error.strerror}"
                advice.add("make room on the disk" if full else "clear the way for it")

        if not (checkpoint and final):
            attempt("LoRA file", lambda: self._write_weights(report, final))
        if checkpoint:
            attempt("checkpoint", lambda: save_run(self.state, self.config))
        if checkpoint and final and failed:
            attempt("LoRA file", lambda: self._write_weights(report, final))
        if failed:
            reasons = "; ".join(f"{what}: {reason}" for what, reason in failed.items())
            there = f"its {next(iter(done))} is" if done else "what was saved before is"
            raise ConfigError(
                f"step {self.step} could not be saved ({reasons}); {there} unharmed; "
                f"{', '.join(sorted(advice))} and {self.words.again}"
            )
        return done.get("LoRA file")

    def _write_weights(self, report: Report, final: bool) -> Path:
        """The LoRA files of this step or of the end; the first of them."""
        with self.final_weights():
            written = self.save_weights(self.step, final)
        for path, summary in written:
            report.message(f"LoRA file: {path}: {summary.line()}")
        if final and len(summary.zero) == len(summary.norms):
            report.message(
                "warning: all of it is zero and changes nothing: no step had a learning rate above 0"
            )
        return written[0][0]
