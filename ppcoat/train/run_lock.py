"""One run at a time in a run folder: two would overwrite each other's checkpoints without a word.

    <run>/.lock          text: process 4711 on myhost; there while the run is

The lock is the system's (flock), not the file: it goes with the process that holds it, however that ends, so
what a killed run left is taken over. Not held where the system has no such locks (Windows, some network file
systems).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppcoat.errors import ConfigError
from ppcoat.signals import unfinished
from ppcoat.train.ranks import Ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"


@contextmanager
def only_run_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Context manager: no other run has `folder`, which is made, and removed if nothing came into it.

    The first of the ranks asks. Raises ConfigError that names the other run, OSError where the folder cannot
    be written to.
    """
    if fcntl is None or not ranks.is_first:
        yield
        return
    descriptor = _locked(folder / LOCK)
    unfinished[descriptor] = lambda: _take_away(folder)
    try:
        yield
    finally:
        _take_away(folder)
        del unfinished[descriptor]
        os.close(descriptor)


def _take_away(folder: Path) -> None:
    with suppress(OSError):  # not empty: a run was here
        (folder / LOCK).unlink()
        folder.rmdir()


def _locked(file: Path) -> int:
    """The descriptor that holds the lock until it is closed."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a run that ended in between took its folder away
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise ConfigError(
                f"{file.parent}: {who} is training there; wait for it, stop it, or choose another name or "
                "output_dir"
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                with suppress(OSError):  # a full disk: locked all the same, but nobody is told by whom
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # so did one its file
