"""python -m ppcoat <command>, and the way in of the scripts: streams that take what is printed, and signals
that are taken, before all else."""

import io
import os
import select
import sys

from ppcoat import signals


def start(command: str | None = None) -> int:
    """Run a command with the flags of this process -> exit status. command: None: its name comes first among
    the flags."""
    try:
        return signals.finished(_status_of(command))
    except BaseException:
        if not signals.came():
            raise
        return signals.finished(0)


class Printed(io.RawIOBase):
    """Where stdout or stderr leads. What it does not take, on a full disk or a terminal that is gone, is lost
    and nothing else with it: a run outlives its log. error: why the first was lost. Only where nobody reads
    stdout any more is that an error at once, as for every program before `head`."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.name, self.error = descriptor, name, None

    def write(self, content: object) -> int:
        try:
            return self._written(content)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and self._descriptor != 2:
                raise
            self.error = self.error or error
            return len(content)

    def _written(self, content: object) -> int:
        while True:
            try:
                return os.write(self._descriptor, content)
            except BlockingIOError:  # somebody else who has this pipe or terminal set it so
                select.select([], [self._descriptor], [])

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


def _take_streams() -> None:
    """A stream that came closed leads nowhere: else the next file that is opened has its number, and what
    libraries print goes into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(opened, True)  # children's streams are not closed either
        if number:
            text = (stream.encoding, stream.errors) if stream else ("utf-8", "replace")
            by_line = stream is None or stream.line_buffering or stream.write_through  # python -u
            buffer = io.BufferedWriter(Printed(number, f"<{name}>"))
            setattr(sys, name, io.TextIOWrapper(buffer, *text, line_buffering=by_line))


def _status_of(command: str | None) -> int:
    _take_streams()
    signals.take()
    from ppcoat.cli import main as table

    try:
        return table.main() if command is None else table.run(command)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        raise


if __name__ == "__main__":
    sys.exit(start())
