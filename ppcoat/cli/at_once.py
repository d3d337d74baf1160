"""Independent jobs at the same time, each in a process with its share of the cores.

On a CPU most of Paddle's ops run on one core; only matrix products use all. Two trainings of a small model on
one core each therefore end far sooner than one after the other on both (measured on two cores with the tiny
FLUX: forward and backward of two batches of 16 take 0.24 s at once and 0.44 s as one batch of 32).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from ppcoat.host import core_count, ignore_warnings_of_libraries, tune_host, uses_gpu

AT_ONCE = 2  # trainings of a small model that commands run at the same time on a CPU
GRACE = 30  # seconds that a job has to end by itself when another has failed


@dataclass(frozen=True)
class Job:
    """A call of `function`, which must be importable by name; arguments and result must be picklable.

    log: where what it prints goes; None for where this process prints.
    """

    function: Callable
    arguments: tuple
    log: Path | None = None

    def __call__(self) -> Any:
        return self.function(*self.arguments)


def run_at_once(jobs: Sequence[Job], device: str = "auto") -> list:
    """-> the jobs' results, in their order. What a job raises is raised here, and the others are stopped.

    One after the other in this process where there is one job or one core, or where the device is a GPU,
    whose memory they would share.
    """
    if len(jobs) < 2 or core_count() < 2 or uses_gpu(device):
        return [job() for job in jobs]
    with ExitStack() as stack, _threads(max(1, core_count() // len(jobs))):
        processes = [stack.enter_context(_JobProcess(job)) for job in jobs]
        return [process.result() for process in processes]


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items, the last perhaps shorter (itertools.batched of Python 3.12)."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


@contextmanager
def _threads(count: int):
    """Processes that are started within it take `count` threads (see host.use_all_cores)."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _JobProcess:
    """A running job; a context that waits for its end, or stops it if something else went wrong.

    Ctrl+C reaches the first process only, which then stops the jobs by SIGTERM: trainings save a checkpoint.
    """

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(theirs, job))
        self._process.start()
        theirs.close()  # so that the death of the process is the end of the pipe

    def __enter__(self) -> _JobProcess:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._process.terminate()
            self._process.join(GRACE)
            self._process.kill()
        self._process.join()
        self._pipe.close()

    def result(self) -> Any:
        """Waits for it. Raises what the job raised, ChildProcessError if its process died without a word."""
        try:
            answer, error = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ChildProcessError(
                f"a process of this command ended with exit code {self._process.exitcode}"
            ) from None
        if error is not None:
            raise error
        return answer


def _serve(pipe: Connection, job: Job) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if job.log is not None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    with _Faults(pipe):
        ignore_warnings_of_libraries()
        tune_host()
        pipe.send((job(), None))


@dataclass(frozen=True)
class _Faults:
    """Sends what goes wrong within it, exit statuses too: the first process decides what to do."""

    pipe: Connection

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            self.pipe.send((None, error))
        return True


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
