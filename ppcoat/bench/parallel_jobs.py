"""Independent jobs at the same time, each in a process with its share of the cores.

On a CPU most of Paddle's ops run on one core; only matrix products use all. Two trainings of a small model on
one core each therefore end far sooner than one after the other on both (measured on two cores with a
transformer of the tiny FLUX's size, 64 image and 12 text tokens: forward and backward of two batches of 16
take 0.24 s at once and 0.44 s as one batch of 32).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from ppcoat.device import ChildProcess, core_count, ignore_warnings_of_libraries, tune_host, uses_gpu
from ppcoat.errors import ConfigError

AT_ONCE = 2  # trainings of a small model that commands run at the same time on a CPU
MESSAGES = (ConfigError, FloatingPointError, SystemExit, KeyboardInterrupt)  # what commands end with


@dataclass(frozen=True)
class Job:
    """A call of `function`, which must be importable by name; arguments and result must be picklable.

    name: what it does, for the user. log: where it prints when it has a process of its own; None, and
    otherwise: where this process prints.
    """

    name: str
    function: Callable
    arguments: tuple = ()
    log: Path | None = None

    def __call__(self) -> Any:
        return self.function(*self.arguments)


def run_at_once(jobs: Sequence[Job], device: str = "auto") -> list:
    """-> the jobs' results, in their order. The first fault of a job is raised here, and the others stopped:
    by SIGTERM, on which a training saves a checkpoint. Ctrl+C reaches this process alone, which stops them.

    One after the other in this process where there is one job or one core, or where the device is a GPU,
    whose memory they would share.
    """
    if len(jobs) < 2 or core_count() < 2 or uses_gpu(device):
        return [_announced_here(job) for job in jobs]
    with ExitStack() as stack, _threads(max(1, core_count() // len(jobs))):
        numbers = {}
        for i, job in enumerate(jobs):
            print(f"{job.name} (prints to {job.log})" if job.log else job.name, flush=True)
            numbers[stack.enter_context(ChildProcess(_serve, job))] = i
        return _answers(numbers)


def _answers(numbers: dict[ChildProcess, int]) -> list:
    """What the processes answer, in the order of their numbers; a fault is raised as soon as it comes."""
    answers: list = [None] * len(numbers)
    waiting = {process.pipe: process for process in numbers}
    while waiting:
        for pipe in wait(list(waiting)):
            process = waiting.pop(pipe)
            answers[numbers[process]] = process.answer()
    return answers


def _announced_here(job: Job) -> Any:
    print(job.name, flush=True)
    return job()


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items, the last perhaps shorter (itertools.batched of Python 3.12)."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


@contextmanager
def _threads(count: int):
    """Processes that are started within it take `count` threads (see device.use_all_cores)."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


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
        pipe.send(job())


@dataclass(frozen=True)
class _Faults:
    """Sends what goes wrong within it, exit statuses too: the first process decides what to do. Where that
    is not a message to the user, the traceback is printed here, the only place that knows it."""

    pipe: Connection

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None:
            if not isinstance(error, MESSAGES):
                traceback.print_exception(error)
            self.pipe.send(error)
        return True


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
