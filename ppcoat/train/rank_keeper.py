"""The keeper of a rank: a small process beside it that ends it when nothing of it has run for too long. A
process that is stopped, or hangs in a library that holds Python's lock, cannot do that itself.

Runs as a script, without any package. Its own clock stands still while it is stopped, too, as with Ctrl+Z.
"""

import os
import select
import signal
import subprocess
import sys
import time


def start_keeper(rank: int, bound: float, setting: str, again: str, margin: float = 10.0) -> int:
    """Start the keeper of this process -> the descriptor that it reads: lines that say what the process is
    at, or empty ones. It ends when the descriptor is closed, and so with the process.

    margin: seconds beyond the bound, in which the ranks find out by themselves.
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
    silence, at = 0.0, "its start"
    while silence < float(bound) + float(margin):
        before = time.monotonic()
        if select.select([0], [], [], 1)[0]:
            words = os.read(0, 4096)
            if not words:
                return
            silence, at = 0.0, ([word for word in words.decode().split("\n") if word] or [at])[-1]
        else:
            silence += min(time.monotonic() - before, 2)
    if os.getppid() == int(kept):
        print(f"rank {rank} was stopped, or hangs in {at}: nothing of it ran for {bound} s ({setting}), so "
              f"it was ended; {again} to go on from the checkpoint", file=sys.stderr, flush=True)  # fmt: skip
        os.kill(int(kept), signal.SIGKILL)


if __name__ == "__main__":
    _keep(*sys.argv[1:])
