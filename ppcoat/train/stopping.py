"""Stopping a run from outside without losing its last step."""

from __future__ import annotations

import signal
from types import FrameType


class FinishStepOnSignal:
    """Within it, the first SIGINT or SIGTERM is only noted in `signal`; a second one acts as usual."""

    signal = 0

    def __enter__(self) -> FinishStepOnSignal:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
