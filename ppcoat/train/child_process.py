"""A function in a process of its own, which answers through a pipe and does not outlive its use."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from types import TracebackType
from typing import Any

GRACE = 30  # seconds that a process has to end by itself when it is told to


class ChildProcess:
    """A running function(pipe, *arguments); a context that ends the process on leaving.

    The process starts Python anew ("spawn"): function and arguments must be picklable. Leaving waits for its
    end; where an error is the reason it is told to stop (SIGTERM), and killed after GRACE seconds.
    pipe: for what is asked and answered; its death is the end of the pipe.
    """

    def __init__(self, function: Callable, *arguments: Any, daemon: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs, *arguments), daemon=daemon)
        self.process.start()
        theirs.close()  # so that the death of the process is the end of the pipe

    def __enter__(self):
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.process.terminate()
            self.process.join(GRACE)
            self.process.kill()
        self.process.join()
        self.pipe.close()

    def answer(self) -> Any:
        """Waits for it. Raises what the process sent as an exception; MemoryError if the system killed it,
        ChildProcessError if it died in another way without a word."""
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            self.process.join()
            code = self.process.exitcode
            if code == -9:
                raise MemoryError(
                    "the system killed a process of this command, most likely for its memory"
                ) from error
            raise ChildProcessError(f"a process of this command ended with exit code {code}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer
