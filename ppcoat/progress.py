"""The one look of progress: a bar in a terminal, plain lines elsewhere.

In a file or a pipe a bar would be one line of carriage returns; `Progress` writes lines there: of work that
takes longer than QUIET seconds, one every PAUSE seconds, and one when it ends.
"""

from __future__ import annotations

import sys
from typing import IO, Any

from tqdm import tqdm

PAUSE = 10.0  # seconds between two lines; a file needs none ten times a second
QUIET = 2.0  # seconds that need no line at all


class Progress(tqdm):
    """tqdm, on stderr. Its arguments and methods mean the same in both looks."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.in_lines = not sys.stderr.isatty()
        if self.in_lines:
            settings = (
                {"delay": QUIET} | settings | {"mininterval": PAUSE, "maxinterval": PAUSE, "leave": True}
            )
        else:
            settings = {"mininterval": 0.2, "dynamic_ncols": True} | settings
        super().__init__(*arguments, **settings)

    def __del__(self) -> None:
        if hasattr(self, "start_t"):  # else a signal came while it was made
            super().__del__()

    @staticmethod
    def status_printer(file: IO[str]) -> Any:
        """tqdm's way to show a text in place of the one before it; a line of its own where that cannot be."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text:
                file.write(text + "\n")
                file.flush()

        return print_line

    def __str__(self) -> str:
        if not self.in_lines:
            return super().__str__()
        told = self.format_dict
        total = "" if told["total"] is None else f"/{told['total']:g}"
        parts = [f"{told['n']:g}{total}", self.format_interval(told["elapsed"])]
        rate = told["rate"] or (told["n"] - told["initial"]) / max(told["elapsed"], 1e-9)
        if total and rate > 0 and told["n"] < told["total"]:
            parts.append(f"{self.format_interval((told['total'] - told['n']) / rate)} left")
        if rate > 0:
            parts.append(f"{rate:.3g} {told['unit'].strip()}/s")
        parts += filter(None, [told["postfix"]])
        name = told["prefix"].removesuffix(": ")
        return f"{name}: {', '.join(parts)}" if name else ", ".join(parts)

    @classmethod
    def write(cls, s: str, file: IO[str] | None = None, end: str = "\n", nolock: bool = False) -> None:
        """Print a line (default: on stdout) above the bars of the terminal."""
        if sys.stderr.isatty():
            super().write(s, file, end, nolock)
        else:
            print(s, file=file or sys.stdout, end=end, flush=True)

    def clear(self, nolock: bool = False) -> None:
        """Take the bar away until it is shown again; lines stay."""
        if not self.in_lines:
            super().clear(nolock)

    def close(self) -> None:
        """Show the last state, and end. A second call does nothing."""
        if self.in_lines and not self.disable:
            if self._time() >= self.start_t + self.delay:
                self.refresh()
            self.sp = None  # that was the last line
        super().close()
