"""Trainings and drawings as processes of their own, which go on when the page or the studio is closed and are
found again when it starts; and a queue of them, one after the other, which is kept on the disk.

    <folder>/studio.json    arguments of `python -m ppcoat`, process, whether it was asked to stop
    <folder>/studio.log     what it printed
    <state>/queue.json      folders of the runs that wait, and of the one that is trained

A process is known by its id and by when it began, so that another one that got its id is not taken for it.
What a training says of itself is read in run_log.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ppcoat.atomic import write_text
from ppcoat.errors import ConfigError
from ppcoat.reading import json_value, only_regular, regular_bytes
from ppcoat.studio.commands import child_command, child_environment

Status = Literal["new", "waiting", "running", "stopping", "stopped", "ended"]
NOTE, OUTPUT, QUEUE = "studio.json", "studio.log", "queue.json"
MAX_TAIL = 64 << 10  # bytes of a log that are looked at
MAX_NOTE = 1 << 20
_MARKS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of a terminal


@dataclass(frozen=True)
class Note:
    """What studio.json holds. pid and born: of the last process, 0 and "" before the first. cwd: the folder
    it starts in. stop: whether it was asked to stop."""

    argv: tuple[str, ...]
    cwd: str
    pid: int = 0
    born: str = ""
    stop: bool = False


@dataclass(frozen=True)
class ChildRun:
    """A command of ppcoat that has a folder."""

    folder: Path

    @property
    def note(self) -> Note | None:
        """None where the studio never started anything, or the file is damaged."""
        try:
            found = json_value(regular_bytes(self.folder / NOTE, MAX_NOTE))
            return Note(
                tuple(map(str, found["argv"])),
                str(found["cwd"]),
                int(found["pid"]),
                str(found["born"]),
                bool(found["stop"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None

    @property
    def is_alive(self) -> bool:
        """Whether its process, and no other that got its id, is there."""
        note = self.note
        return note is not None and note.pid > 0 and birth(note.pid) == note.born

    @property
    def status(self) -> Status:
        """Of its process alone; how a training ended is told by run_log.py."""
        note = self.note
        if note is None or not note.pid:
            return "new" if note is None else "waiting"
        if self.is_alive:
            return "stopping" if note.stop else "running"
        return "stopped" if note.stop else "ended"

    def prepare(self, argv: Sequence[str], cwd: Path) -> None:
        """Write down what `start` is to start. Raises ConfigError while it runs."""
        if self.is_alive:
            raise ConfigError(f"{self.folder.name} is running: stop it, or give this run another name")
        self._keep(Note(tuple(argv), str(cwd)))

    def start(self) -> subprocess.Popen:
        """Start what was prepared, or the same command again, which goes on from a training's checkpoint.
        Raises ConfigError where there is nothing to start, and while it runs."""
        note = self.note
        if note is None:
            raise ConfigError(f"{self.folder} holds nothing to start: start it as a new run")
        if self.is_alive:
            raise ConfigError(f"{self.folder.name} is running already")
        with open(self.folder / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                child_command(note.argv),
                cwd=note.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what ends the studio does not end it
                env=child_environment(),
            )
        self._keep(replace(note, pid=process.pid, born=birth(process.pid) or "gone", stop=False))
        return process

    def stop(self) -> None:
        """Ask a training to finish its step and to save; asked again, it ends at once. Does nothing where
        nothing runs."""
        note = self.note
        if note is None or not self.is_alive:
            return
        self._keep(replace(note, stop=True))
        os.kill(note.pid, signal.SIGTERM)

    def tail(self, lines: int = 200) -> list[str]:
        """The last lines that it printed; of a progress bar only what is shown last."""
        try:
            with open(self.folder / OUTPUT, "rb", opener=only_regular) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        shown = [_MARKS.sub("", line).rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return [line for line in shown if line.strip()][-lines:]

    @property
    def error(self) -> str:
        """The line in which it said why it ended; "" if it did not."""
        last = self.tail(3)
        said = [line for line in last if line.startswith("error: ")]
        return said[-1].removeprefix("error: ") if said else last[-1] if last and "Error" in last[-1] else ""

    @property
    def memory(self) -> int | None:
        """Bytes of host memory that its process holds; None where that cannot be seen."""
        note = self.note
        if note is None or not self.is_alive:
            return None
        try:
            status = Path(f"/proc/{note.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return 1024 * int(found[1]) if found else None

    def _keep(self, note: Note) -> None:
        write_text(self.folder / NOTE, json.dumps(asdict(note), ensure_ascii=False) + "\n")


class Queue:
    """Runs that wait for each other. `tick` is to be called every second or so; it is the only thing that
    starts them. A studio that starts again goes on with what it left."""

    def __init__(self, state: Path) -> None:
        self._file = state / QUEUE
        self._children: list[subprocess.Popen] = []
        self.refused: dict[str, str] = {}  # folder -> why it could not be started
        try:
            found = json_value(regular_bytes(self._file, MAX_NOTE))
            self._waiting = [str(each) for each in found["waiting"]]
            self._current = str(found["current"])
        except (OSError, ValueError, KeyError, TypeError):
            self._waiting, self._current = [], ""

    @property
    def waiting(self) -> list[Path]:
        """Folders of the runs to come, the next one first."""
        return [Path(each) for each in self._waiting]

    @property
    def current(self) -> ChildRun | None:
        """The run that is trained."""
        job = ChildRun(Path(self._current)) if self._current else None
        return job if job is not None and job.is_alive else None

    def add(self, job: ChildRun) -> None:
        """Put a prepared run, or one to go on with, at the end. Raises ConfigError for one that is there."""
        name = str(job.folder)
        self.check_free(job)
        self.refused.pop(name, None)
        self._waiting.append(name)
        self._save()

    def check_free(self, job: ChildRun) -> None:
        """Raises ConfigError for a run that runs or waits: its settings are to stay what they are."""
        if str(job.folder) in self._waiting or job.is_alive:
            raise ConfigError(f"{job.folder.name} is running or waiting already: give this run another name")

    def remove(self, job: ChildRun) -> None:
        """Take a run that waits out."""
        self._waiting = [each for each in self._waiting if each != str(job.folder)]
        self._save()

    def tick(self) -> None:
        """Start the next run if none is trained."""
        self._children = [child for child in self._children if child.poll() is None]
        if not self._waiting or self.current is not None:
            return
        job = ChildRun(Path(self._waiting[0]))
        try:
            if not job.is_alive:  # it is where a studio was killed before it could write down what it started
                self._children.append(job.start())
        except (OSError, ConfigError) as error:
            self.refused[str(job.folder)] = str(error)
        self._current = self._waiting.pop(0)
        self._save()

    def start_beside(self, job: ChildRun) -> None:
        """Start a job that waits for nothing, such as a drawing."""
        self._children.append(job.start())

    def _save(self) -> None:
        write_text(self._file, json.dumps({"waiting": self._waiting, "current": self._current}) + "\n")


def birth(pid: int) -> str | None:
    """When a process began, in words that no later one with its id has; None where it is not alive."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if state in "ZX" else f"{boot} {rest[18]}"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:
        return None
    told = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, began = told.stdout.strip().partition(" ")
    return began.strip() if began and not state.startswith("Z") else None


def device_memory(job: ChildRun) -> int | None:
    """Bytes of the cards' memory that a job holds, as nvidia-smi says; None where there is none."""
    note, program = job.note, shutil.which("nvidia-smi")
    if note is None or program is None or not job.is_alive:
        return None
    asked = [program, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    held = re.findall(rf"(?m)^\s*{note.pid}\s*,\s*(\d+)", told)
    return sum(map(int, held)) << 20 if held else None
