"""Stopping a run from outside without losing its last step."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import FrameType

# What a command with a config file needs to go on, and what it calls a strict resume.
AGAIN, STRICT_FLAG = "run the same command again", "--strict (save.strict_resume)"


@dataclass(frozen=True)
class ResumeWords:
    """What a user is told to do after a stop, in the flags of the command that runs.

    again: the start of "... to go on from there"; strict_flag: what made a damaged checkpoint an error.
    """

    again: str = AGAIN
    strict_flag: str = STRICT_FLAG


class FinishStepOnSignal:
    """Context manager: the first SIGINT or SIGTERM is only noted in `signal`.

    A second one acts as usual, unless second_acts is false: one Ctrl+C then counts once, though both the
    terminal and a launcher pass it on.
    """

    def __init__(self, second_acts: bool = True) -> None:
        self.signal = 0
        self._second_acts = second_acts

    def __enter__(self) -> FinishStepOnSignal:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._second_acts:
            self.__exit__()
