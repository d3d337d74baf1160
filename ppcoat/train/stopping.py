"""Stopping a run from outside without losing its last step."""

from __future__ import annotations

import signal
from types import FrameType


class FinishStepOnSignal:
    """Within it, the first SIGINT or SIGTERM is only noted in `signal`.

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
