"""Signs that the main thread of this process works, as seen from another thread of it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType


def signs_of_work(computes_here: bool) -> int:
    """A number that changes while the main thread works, and not while it hangs in one call: made of the
    places in which its functions stand, of how often it has given up its core to wait, and, where
    computes_here, of the time it computed. A driver of a card may compute while it waits for the card."""
    signs: list[object] = [(id(frame.f_code), frame.f_lasti) for frame in _frames()]
    with suppress(OSError):  # no such file: not Linux
        status = Path(f"/proc/self/task/{os.getpid()}/status").read_text()  # the main thread's number is that
        signs.append(next((line for line in status.splitlines() if line.startswith("voluntary_")), ""))
    if computes_here and hasattr(time, "pthread_getcpuclockid"):
        signs.append(time.clock_gettime_ns(time.pthread_getcpuclockid(threading.main_thread().ident)))
    return hash(tuple(signs))


def place_of_work() -> str:
    """Where the main thread stands: file, line and name of the innermost function, and of its caller."""
    frames = [frame for frame, _ in zip(_frames(), range(2), strict=False)]
    named = [(Path(each.f_code.co_filename).name, each.f_lineno, each.f_code.co_name) for each in frames]
    return ", in ".join(f"{file}:{line} {name}" for file, line, name in named)


def _frames() -> Iterator[FrameType]:
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        yield frame
        frame = frame.f_back
