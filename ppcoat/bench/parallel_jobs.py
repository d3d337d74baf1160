"""Independent jobs in parallel, each in a process with its share of the cores.

On a CPU most of Paddle's ops run on one core; only matrix products use all. So two trainings of a small model
are much faster on one core each than one after the other on both (measured on two cores with a transformer of
the tiny FLUX's size, 64 image and 12 text tokens: forward and backward of two batches of 16 take 0.24 s in
parallel, and 0.44 s as one batch of 32).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
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

from ppcoat.device import ChildProcess, core_count, tune_host, uses_gpu
from ppcoat.errors import ConfigError, ignore_warnings_of_libraries
from ppcoat.signals import leave

PARALLEL_JOBS = 2  # trainings of a small model that commands run in parallel on a CPU
MESSAGES = (ConfigError, FloatingPointError, SystemExit, KeyboardInterrupt)  # errors without a traceback


@dataclass(frozen=True)
class Job:
    """A call of `function`, which must be importable by name; arguments and result must be picklable.

    name: shown to the user. log: file for its output if it runs in a process of its own; None: the output of
    this process.
    """

    name: str
    function: Callable
    arguments: tuple = ()
    log: Path | None = None

    def __call__(self) -> Any:
        return self.function(*self.arguments)


def run_parallel(jobs: Sequence[Job], device: str = "auto") -> list:
    """Run jobs in parallel -> their results in the same order.

    The first error of a job is raised here, and the other jobs get SIGTERM, on which a training writes a
    checkpoint. Ctrl+C reaches only this process, which then stops the jobs. Jobs run one after the other in
    this process if there is one job or one core, or on a GPU, whose memory they would share.
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
    """The answers of the processes, in the order of their numbers; an error is raised as soon as it
    arrives."""
    answers: list = [None] * len(numbers)
    waiting: dict[Any, ChildProcess] = {process.pipe: process for process in numbers}
    while waiting:
        for pipe in wait(list(waiting)):
            process = waiting.pop(pipe)
            answers[numbers[process]] = process.answer()
    return answers


def _announced_here(job: Job) -> Any:
    print(job.name, flush=True)
    return job()


def batched(items: Iterable, size: int) -> Iterator[tuple]:
    """Tuples of `size` items; the last may be shorter (itertools.batched of Python 3.12)."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


@contextmanager
def _threads(count: int):
    """Context manager: processes started in it use `count` threads (see device.use_all_cores)."""
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
    """Context manager: sends an error or exit of its block through `pipe`; the parent process decides what to
    do. The traceback of an error that is no message to the user is printed here, because only this process
    has it."""

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
    leave(signal.SIGTERM)
