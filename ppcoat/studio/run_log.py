"""What a training leaves in its folder while it runs: the curve in log.jsonl, read as it grows, the previews,
the checkpoints, and from these how far it is and how it ended.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ppcoat.config.load import MAX_CONFIG_BYTES, value_of_text
from ppcoat.reading import only_regular, regular_bytes
from ppcoat.studio.access import Roots, is_text
from ppcoat.studio.runs import NOTE, OUTPUT, ChildRun

MOST_POINTS = 1000  # of a curve on the page
MAX_LINE = 1 << 16
_PREVIEW = re.compile(r"(\d{9})_(\d{2,})\.png")
_WEIGHTS = re.compile(r".*_(\d{9})(_kohya|_paddle)?\.safetensors")
_RATE_SECONDS = 60.0
_FRESH_SECONDS = 60.0  # since the last line of a run that was started elsewhere
_DEPTH, _MOST_FOLDERS = 3, 2000
CONFIG = "studio.yaml"  # of a run that the studio started
_READ = (CONFIG, "config.yaml", "log.jsonl", "samples", NOTE, OUTPUT)  # of a run, for the page


@dataclass
class RunLog:
    """The log of one run. `read` takes what is new; a log that was cut, as a resumed run's is, is read anew.

    steps, losses, rates (the learning rate's): of every line. last: the numbers of the last line. rate:
    steps a second over the last minute that was watched; None until two steps were seen. changed: when the
    file was, in seconds since the epoch."""

    folder: Path
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    changed: float = 0.0
    _at: int = 0
    _inode: int = 0
    _seen: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def step(self) -> int:
        """Updates done."""
        return self.steps[-1] if self.steps else 0

    @property
    def rate(self) -> float | None:
        """Steps a second."""
        if len(self._seen) < 2:
            return None
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    def read(self) -> None:
        """Take the lines that were written since the last call."""
        try:
            with open(self.folder / "log.jsonl", "rb", opener=only_regular) as file:
                status = os.fstat(file.fileno())
                if status.st_size < self._at or status.st_ino != self._inode:
                    self._begin_anew(status.st_ino)
                file.seek(self._at)
                new = file.read()
        except OSError:
            return
        self.changed = status.st_mtime
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            self._take(line)
        if whole:
            self._seen.append((status.st_mtime, self.step))
            while self._seen[-1][0] - self._seen[0][0] > _RATE_SECONDS and len(self._seen) > 2:
                self._seen.popleft()

    def _begin_anew(self, inode: int) -> None:
        self._at, self._inode = 0, inode
        for read in (self.steps, self.losses, self.rates, self.last, self.validation, self._seen):
            read.clear()

    def _take(self, line: bytes) -> None:
        """A line of numbers; what is no number in it is left out, and a line without a step."""
        try:
            found = json.loads(line[:MAX_LINE])
            step = int(found["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return
        self.last = {key: value for key, value in found.items() if type(value) in (int, float)}
        self.steps.append(step)
        self.losses.append(self.last.get("loss", math.nan))
        self.rates.append(self.last.get("lr", math.nan))
        if "validation_loss" in self.last:
            self.validation.append((step, self.last["validation_loss"]))


@dataclass(frozen=True)
class RunProgress:
    """How far a run is. status: waiting, running, stopping, stopped, finished, failed. total: 0 where that is
    not known yet. error: why it failed."""

    status: str
    step: int
    total: int
    error: str = ""


def progress_of(job: ChildRun, log: RunLog, waits: bool = False) -> RunProgress:
    """From the process and the files of a run. waits: whether it stands in the queue."""
    total, status = total_steps(job.folder), job.status
    if status in ("running", "stopping"):
        return RunProgress(status, log.step, total)
    if waits:
        return RunProgress("waiting", log.step, total)
    if total and log.step >= total:
        return RunProgress("finished", log.step, total)
    if status == "new" and time.time() - log.changed < _FRESH_SECONDS:  # a shell's
        return RunProgress("running", log.step, total)
    if status in ("stopped", "new"):
        return RunProgress("stopped", log.step, total)
    return RunProgress("failed", log.step, total, job.error)


def total_steps(folder: Path) -> int:
    """Updates of a run, as its own config says; 0 before it has one."""
    for name in ("config.yaml", CONFIG):
        file = folder / name
        try:
            status = file.stat()
            steps = _steps_in(file, (status.st_mtime_ns, status.st_size))
        except (OSError, ValueError, AttributeError, TypeError, OverflowError):
            continue
        if steps is not None:
            return steps
    return 0


@lru_cache(maxsize=1024)  # the page looks every second, and YAML takes milliseconds
def _steps_in(file: Path, changed: tuple[int, int]) -> int | None:
    """None where the run counts them by itself. changed: for the cache."""
    config = value_of_text(regular_bytes(file, MAX_CONFIG_BYTES).decode())
    if "max_train_steps" in config:  # FLUX-Lightning's
        return int(config["max_train_steps"])
    train = config.get("train") or {}
    return None if file.name == CONFIG and train.get("num_epochs") else int(train.get("steps", 1000))


def find_runs(roots: Roots) -> list[Path]:
    """Folders of runs at most _DEPTH below the roots, the newest first; left out are those of whose files a
    link leads out. Looks into no more than _MOST_FOLDERS."""
    found: dict[Path, float] = {}
    left = deque((root, 0) for root in roots.folders)
    for _ in range(_MOST_FOLDERS):
        if not left:
            break
        folder, depth = left.popleft()
        try:
            with os.scandir(folder) as entries:
                inner = {entry.name: entry for entry in entries if is_text(entry.name)}
            marks = [inner[name].stat().st_mtime for name in (CONFIG, "log.jsonl") if name in inner]
        except OSError:  # also of a link that leads nowhere
            continue
        if marks and depth:
            if all(roots.holds(folder / name) for name in _READ if name in inner):
                found[folder] = max(marks)
        elif depth < _DEPTH:
            left.extend((folder / name, depth + 1) for name, entry in sorted(inner.items())
                        if not name.startswith(".") and entry.is_dir(follow_symlinks=False))  # fmt: skip
    return sorted(found, key=lambda folder: found[folder], reverse=True)


def previews_of(folder: Path) -> dict[int, dict[int, Path]]:
    """{step: {number of the prompt: file}} of the previews of a run, in their order."""
    found: dict[int, dict[int, Path]] = {}
    for file in sorted((folder / "samples").glob("*.png")):
        if name := _PREVIEW.fullmatch(file.name):
            found.setdefault(int(name[1]), {})[int(name[2])] = file
    return found


def lora_files(folder: Path) -> dict[str, Path]:
    """The LoRA files of a run: {"250": file, ...} by step, the one at its end last, as "end"."""
    steps, last = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        if name := _WEIGHTS.fullmatch(file.name):
            steps.setdefault(str(int(name[1])), file)
        else:
            last.setdefault("end", file)
    return steps | last


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """A running mean without the pull to zero at its start; weight: share of the old mean. What is not finite
    changes nothing."""
    mean, share, found = 0.0, 0.0, []
    for value in values:
        if value - value == 0:
            mean, share = weight * mean + (1 - weight) * value, weight * share + 1 - weight
        found.append(mean / share if share else value)
    return found


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most so many of the points, evenly, with the last."""
    every = -(-len(points) // most) or 1
    return list(points[::-1][::every][::-1])
