"""What watches over the process of a rank. Its keeper: a small process beside it that ends it when nothing of
it has run for too long, or a SIGTERM has waited for it; a process that is stopped, or hangs in a library that
holds Python's lock, cannot do that itself. And the signs that its main thread works, as seen from another
thread of it.

The keeper is this file, run as a script without any package. Its own clock stands still while it is stopped,
too, as with Ctrl+Z.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType


def start_keeper(rank: int, bound: float, setting: str, again: str, margin: float = 10.0) -> int:
    """Start the keeper of this process -> the descriptor that it reads: lines that say what the process is
    at, or empty ones. It ends when the descriptor is closed, and so with the process.

    margin: seconds in which the process may end by itself, beyond the bound and after a SIGTERM.
    """
    listens, tells = os.pipe()
    words = [str(rank), f"{bound:g}", f"{margin:g}", setting, again, str(os.getpid())]
    keeper = subprocess.Popen([sys.executable, "-I", "-S", __file__, *words], stdin=listens)
    keeper.returncode = 0  # nobody waits for it: it outlives this process by a moment
    os.close(listens)
    os.set_blocking(tells, False)
    return tells


def _keep(rank: str, bound: str, margin: str, setting: str, again: str, kept: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    silence, at, held = 0.0, "its start", 0
    while silence < float(bound) + float(margin):
        before = time.monotonic()
        if select.select([0], [], [], 1)[0]:
            words = os.read(0, 4096)
            if not words:
                return
            silence, at = 0.0, ([word for word in words.decode().split("\n") if word] or [at])[-1]
        else:
            silence += min(time.monotonic() - before, 2)
            held = held + 1 if _sigterm_waits(kept) else 0
        if held > float(margin):
            said = "terminated"
            break
    else:
        said = (f"rank {rank} was stopped, or hangs in {at}: nothing of it ran for {bound} s ({setting}), so "
                f"it was ended; {again} to go on from the checkpoint")  # fmt: skip
    if os.getppid() == int(kept):
        with suppress(OSError):  # a full disk
            print(said, file=sys.stderr, flush=True)
        os.kill(int(kept), signal.SIGKILL)


def _sigterm_waits(pid: str) -> bool:
    """Whether the process has one that it holds back, or is stopped and so does not see."""
    with suppress(OSError), open(f"/proc/{pid}/status") as file:
        pending = next((line.split()[1] for line in file if line.startswith("ShdPnd:")), "0")
        return bool(int(pending, 16) >> signal.SIGTERM - 1 & 1)
    return False


def signs_of_work(computes_here: bool) -> int:
    """A number that changes while the main thread works, and not while it hangs in one call: made of the
    places in which its functions stand, of how often it has given up its core to wait, and, where
    computes_here, of the time it computed. A driver of a card may compute while it waits for the card."""
    signs: list[object] = [(id(frame.f_code), frame.f_lasti) for frame in _frames()]
    # the main thread's number is that of the process; no such file: not Linux
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/status") as status:
        signs.append(next((line for line in status if line.startswith("voluntary_")), ""))
    if computes_here and hasattr(time, "pthread_getcpuclockid"):
        signs.append(time.clock_gettime_ns(time.pthread_getcpuclockid(threading.main_thread().ident)))
    return hash(tuple(signs))


def place_of_work() -> str:
    """Where the main thread stands: file, line and name of the innermost function, and of its caller."""
    frames = [frame for frame, _ in zip(_frames(), range(2), strict=False)]
    named = [
        (os.path.basename(each.f_code.co_filename), each.f_lineno, each.f_code.co_name) for each in frames
    ]
    return ", in ".join(f"{file}:{line} {name}" for file, line, name in named)


def _frames() -> Iterator[FrameType]:
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        yield frame
        frame = frame.f_back


if __name__ == "__main__":
    _keep(*sys.argv[1:])
