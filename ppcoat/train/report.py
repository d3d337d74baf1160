"""What a run tells its user: progress bar, one JSON line per step, VisualDL curves, preview pictures.

<run>/log.jsonl             every step, exact values, no times: equal runs give equal files
<run>/logs/                 VisualDL (visualdl --logdir <run>/logs)
<run>/samples/              previews as PNG, named by step and prompt number, the prompt inside the file
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

import numpy as np
import paddle
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ppcoat.atomic import remove_dead_drafts, whole_file
from ppcoat.errors import ConfigError
from ppcoat.finite import is_finite
from ppcoat.progress import Progress
from ppcoat.reading import json_value, only_regular

if TYPE_CHECKING:
    from visualdl import LogWriter

LOSS_SMOOTHING = 0.98  # share of the old mean in each update of the loss on the bar
SIGMA_BINS = 4  # of equal width in 0..1


class SigmaBins:
    """Mean loss of the pictures whose noise level fell into each quarter of 0..1, since the last `take`.

    The loss of a step depends mostly on the levels that it drew; within a bin, steps compare.
    """

    def __init__(self) -> None:
        self._sums, self._counts = [0.0] * SIGMA_BINS, [0] * SIGMA_BINS

    def add(self, sigmas: Sequence[float], losses: Sequence[float]) -> None:
        """Noise levels in 0..1 and losses, picture by picture."""
        for sigma, loss in zip(sigmas, losses, strict=True):
            number = min(int(float(sigma) * SIGMA_BINS), SIGMA_BINS - 1)
            self._sums[number] += float(loss)
            self._counts[number] += 1

    def take(self) -> dict[str, float]:
        """{"loss_sigma_0.25_0.50": mean, ...} of the bins that are not empty; they are emptied."""
        means = {
            f"loss_sigma_{i / SIGMA_BINS:.2f}_{(i + 1) / SIGMA_BINS:.2f}": total / count
            for i, (total, count) in enumerate(zip(self._sums, self._counts, strict=True))
            if count
        }
        self.__init__()
        return means

    def state_dict(self) -> dict[str, list]:
        """Sums and counts, for JSON, which keeps every bit of them."""
        return {"sums": list(self._sums), "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Go on from a `state_dict`."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])


class Report:
    """Progress and curves of one run. Use it as a context manager: it is closed whatever happens.

    total_steps and start_step count optimizer updates; a resumed run passes the step of its checkpoint, and
    lines of log.jsonl after that step are dropped because they are about to be written again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        log_every: int = 10,
        visualdl: bool = True,
        start_step: int = 0,
    ) -> None:
        """Raises ConfigError where VisualDL is wanted and missing, OSError where run_dir is not writable."""
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.log_every = log_every
        self.smoothed_loss: float | None = None
        self._weight = 0.0
        self._failed: set[str] = set()  # what could not be written, once told
        self._images, self._since = 0, time.perf_counter()
        self._closing = ExitStack()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        remove_dead_drafts(self.run_dir / "samples")  # the rest of the run may draw none
        with self._closing as closing_on_error:
            log = _open_log(self.run_dir / "log.jsonl", start_step)
            self._log = closing_on_error.enter_context(log)
            self._curves = None
            if visualdl:
                self._curves = closing_on_error.enter_context(_open_visualdl(self.run_dir / "logs"))
            bar = Progress(total=total_steps, initial=start_step, desc="training", unit="step", delay=0)
            self._bar = closing_on_error.enter_context(bar)
            self._closing = closing_on_error.pop_all()

    def is_point(self, step: int) -> bool:
        """Whether the curves get a point at this step."""
        return step % self.log_every == 0 or step == self.total_steps

    def step(
        self,
        step: int,
        scalars: Mapping[str, float],
        points: Mapping[str, float] | None = None,
        images: int = 0,
    ) -> None:
        """Record update `step` (from 1): "loss" and "lr" are shown on the bar, the rest ("grad_norm",
        "kept_bytes", ...) goes to log.jsonl every step and to VisualDL every log_every steps.

        points: values that not every step has (a validation loss); they go to both at once. images: pictures
        that this step trained on; the curve images_per_second is of the time since the last point, with all
        that was done in it.
        """
        points = points or {}
        line = {"step": step} | {name: _json_number(value) for name, value in {**scalars, **points}.items()}
        self._images += images
        self._try(lambda: self._log.write(json.dumps(line) + "\n"), "log.jsonl")
        if "loss" in scalars and math.isfinite(scalars["loss"]):
            self._smooth(float(scalars["loss"]))
        if self.is_point(step):
            self._bar.set_postfix_str(self._postfix(scalars), refresh=False)
            points = {**scalars, **points, **self._speed()}
        if self._curves is not None:
            for name, value in points.items():
                tag, number = f"train/{name}", float(value)
                self._try(partial(self._curves.add_scalar, tag=tag, value=number, step=step), "curves")
        self._bar.update(1)

    def images(self, step: int, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Path]:
        """Save one preview per prompt, also to VisualDL; returns the paths of the PNG files."""
        folder = self.run_dir / "samples"
        paths = []
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            path = folder / f"{step:09d}_{number:02d}.png"
            note = PngInfo()
            note.add_itxt("prompt", prompt)
            with whole_file(path) as draft:
                image.save(draft, pnginfo=note)
            if self._curves is not None:
                pixels = np.asarray(image.convert("RGB"))
                tag = f"sample/{number:02d}"
                self._try(partial(self._curves.add_image, tag=tag, img=pixels, step=step), "curves")
            paths.append(path)
        return paths

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close bar, curves and log, each even if another fails to. A second call does nothing."""
        self._try(self._closing.close, "log.jsonl")

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _try(self, write: Callable[[], object], what: str) -> None:
        """What only tells of the run must not end it: where the disk takes no more, say so once per file."""
        try:
            write()
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                self.message(
                    f"warning: {what} cannot be written: {error.strerror or error}; training goes on"
                )

    def _smooth(self, loss: float) -> None:
        """Running mean without the pull to zero at the start (bias correction as in Adam)."""
        before = self.smoothed_loss or 0.0
        weight = LOSS_SMOOTHING * self._weight + 1 - LOSS_SMOOTHING
        self.smoothed_loss = (LOSS_SMOOTHING * self._weight * before + (1 - LOSS_SMOOTHING) * loss) / weight
        self._weight = weight

    def _speed(self) -> dict[str, float]:
        """Pictures per second since the last call, if there were any."""
        now = time.perf_counter()
        images, seconds = self._images, now - self._since
        self._images, self._since = 0, now
        return {"images_per_second": images / seconds} if images and seconds > 0 else {}

    def _postfix(self, scalars: Mapping[str, float]) -> str:
        parts = [] if self.smoothed_loss is None else [f"loss={self.smoothed_loss:.4f}"]
        return " ".join([*parts, f"lr={scalars['lr']:.2e}"] if "lr" in scalars else parts)


def _open_log(path: Path, start_step: int) -> TextIO:
    """log.jsonl with its lines up to start_step, open for appending, one line at a time. Lines are not
    synced: what a power cut takes is written again from the last checkpoint."""
    with whole_file(path) as draft, open(draft, "wb") as kept:
        kept.writelines(_lines_until(start_step, path) if start_step and path.exists() else ())
    return open(path, "a", buffering=1, encoding="utf-8")


def _lines_until(step: int, path: Path) -> Iterator[bytes]:
    """Lines of a log; not those from the first on that is none, as the last of a killed run may be."""
    with open(path, "rb", opener=only_regular) as file:
        for line in file:
            try:
                if json_value(line)["step"] > step:
                    return
            except (ValueError, KeyError, TypeError):
                return
            yield line.rstrip(b"\r\n") + b"\n"


def _open_visualdl(folder: Path) -> LogWriter:
    try:
        from visualdl import LogWriter
    except ImportError as error:
        raise ConfigError(
            f"VisualDL cannot be imported ({error}); run pip install visualdl or set logging.visualdl: false"
        ) from None
    except OSError as error:  # it makes a folder in the home directory
        raise ConfigError(
            f"VisualDL cannot be imported ({error.filename}: {error.strerror}); let HOME name a folder that "
            "can be written to, or set logging.visualdl: false"
        ) from None
    return LogWriter(logdir=str(folder))


def _json_number(value: float) -> float | str:
    """A float as JSON can hold it: NaN and infinities as text."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


@paddle.no_grad()
def first_bad_module(model: paddle.nn.Layer, forward: Callable[[], object]) -> str | None:
    """Path of the first sublayer (in the order in which they end) whose output holds NaN or inf in
    `forward()`, a pass through `model`; None if all are finite. Every output is read by the host: this is for
    a run that has gone wrong.
    """
    bad: list[str] = []

    def note(path: str) -> Callable:
        def hook(layer: paddle.nn.Layer, inputs: object, outputs: object) -> None:
            tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
            if not bad and not all(is_finite(each) for each in tensors if isinstance(each, paddle.Tensor)):
                bad.append(path)

        return hook

    hooks = [layer.register_forward_post_hook(note(path)) for path, layer in model.named_sublayers()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None
