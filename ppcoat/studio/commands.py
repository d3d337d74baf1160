"""Commands of ppcoat as child processes: what a page does is what a shell would do, and the page can show it.

The page's process never imports Paddle; a command does, in its own.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ppcoat.errors import printable

_LONGEST_LINE = 1 << 16  # bytes of one line of output
_PATIENCE = 5.0  # seconds


def child_command(arguments: Sequence[str]) -> list[str]:
    """What starts `python -m ppcoat <arguments>`, with child_environment."""
    return [sys.executable, "-m", "ppcoat", *arguments]


def child_environment() -> dict[str, str]:
    """Of the commands that the studio starts: what they print is seen at once, wherever they run. They start
    in a folder of the user's, from which Python must import nothing: a numpy.py may lie beside the pictures
    (from CPython 3.11 on, which knows PYTHONSAFEPATH)."""
    package = str(Path(__file__).parents[2])
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [package, *map(os.path.abspath, given)]
    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
    }


def shell_command(arguments: Sequence[str], folder: Path | None = None) -> str:
    """`python -m ppcoat ...` for a shell, each argument in quotes where it needs them. Line ends and other
    control characters in it are written as $'...', which bash, zsh and ksh read. folder: where it is meant
    to start; the command goes there first if that is not the current folder."""
    there = [] if folder is None or folder == Path.cwd() else ["cd", _quoted(str(folder)), "&&"]
    return " ".join([*there, "python -m ppcoat", *map(_quoted, arguments)])


def _quoted(text: str) -> str:
    if all(mark.isprintable() for mark in text):
        return shlex.quote(text)
    raw = os.fsencode(text)
    plain = set(range(32, 127)) - set(b"'\\")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in raw) + "'"


class RunningCommand:
    """One command while it runs. told: is called with each line of what it prints, as plain text. cwd: the
    folder it starts in."""

    def __init__(
        self, arguments: Sequence[str], told: Callable[[str], None], cwd: Path | None = None
    ) -> None:
        self.arguments, self._told, self.cwd = list(arguments), told, cwd
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Start it, wait for its end -> its exit status. Lines that a progress bar writes over each other are
        told one by one."""
        self._process = await asyncio.create_subprocess_exec(
            *child_command(self.arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.cwd,
            env=child_environment(),
        )
        rest = b""
        while chunk := await self._process.stdout.read(_LONGEST_LINE):
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            if len(rest) > _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in filter(None, lines):
                self._told(_text(line))
        if rest:
            self._told(_text(rest))
        return await self._process.wait()

    def stop(self) -> None:
        """End it as Ctrl+C does, so that it can tidy up; after a while by force. Where the page itself was
        started in the background, shells let its children ignore Ctrl+C."""
        self._send(signal.SIGINT)
        asyncio.get_running_loop().call_later(_PATIENCE, self._send, signal.SIGTERM)

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


def _text(line: bytes) -> str:
    return printable(line.decode("utf-8", "replace").replace("\t", "    ").rstrip())
