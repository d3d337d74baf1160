"""Everything that is read from the world, damaged: each input ends in a success that is right or in one line
with status 2, within seconds and a gigabyte, and nothing is written beside the output.

Slow: 2,000 inputs. By default 200, every mutator at least once.
"""

import contextlib
import gc
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from counts import judge
from reading import CONFIGS, FIXTURES, KINDS, Input, stand_ins

from ppcoat.cli import main

SECONDS, ALARM, GIGABYTE = 5, 60, 1 << 30
LONGEST_LINE = 2000
COLUMN = "damaged input"
ROOT = str(Path(__file__).parents[2])


class HangError(BaseException):
    """Nothing catches it."""


@dataclass(frozen=True)
class Outcome:
    """status: of the command, or what it raised. seconds: of the processor. grown: by how many bytes."""

    status: int | str
    out: str
    err: str
    seconds: float = 0.0
    grown: int = 0


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def bounded():
    """An alarm for what hangs, and an end of memory long before the machine's."""

    def ring(*_):
        raise HangError

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = {each: signal.signal(each, ring) for each in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_REAL, ALARM)  # for what waits; the machine may be busy
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 4 * GIGABYTE, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for each, handler in before.items():
            signal.signal(each, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcome(command: str, argv: list[str]) -> Outcome:
    """Of a command in this process, as `python -m ppcoat` runs it."""
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory is counted anew
    held, began, out, err = memory("VmRSS"), time.process_time(), io.StringIO(), io.StringIO()
    try:
        with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main.run(command, argv, prog=command)
    except HangError:
        status = f"hangs: {traceback.format_exc().splitlines()[-3:-1]}"
    except BaseException as error:
        frames = [
            f"{Path(each.filename).name}:{each.lineno}" for each in traceback.extract_tb(error.__traceback__)
        ]
        status = f"{type(error).__name__}: {str(error)[:100]} {' '.join(frames[-4:])}"
    seconds = time.process_time() - began
    return Outcome(status, out.getvalue(), err.getvalue(), seconds, memory("VmHWM") - held)


def plain(text: str, argv: list[str]) -> str:
    """What was printed, without the names of files that were given."""
    for number, word in enumerate(argv):
        text = text.replace(word, f"<{number}>") if "/" in word else text
    return text.strip()


@cache
def calm(command: str, argv: tuple[str, ...]) -> tuple[int | str, str]:
    found = outcome(command, list(argv))
    return found.status, plain(found.out, list(argv))


def mistakes(one: Input, found: Outcome) -> list[str]:
    """What of an outcome is not right."""
    lines, wrong = found.err.splitlines(), []
    errors = [line for line in lines if line.startswith("error: ")]
    if found.status not in one.statuses:
        wrong.append(f"status {found.status}, wanted {set(one.statuses)}")
    if (errors != lines[-1:]) if found.status == 2 else errors:
        wrong.append(f"said {lines[-2:]}")
    if any(len(line) > LONGEST_LINE or not line.isprintable() for line in lines):
        wrong.append(f"a line of {max(map(len, lines))}: {found.err[:200]!r}")
    if found.seconds > SECONDS:
        wrong.append(f"{found.seconds:.1f} s")
    if found.grown > GIGABYTE:
        wrong.append(f"{found.grown >> 20} MiB")
    if one.outputs is not None and found.status == 0 and plain(found.out, one.argv) not in one.outputs:
        wrong.append(f"printed {plain(found.out, one.argv)[:100]!r}, wanted one of {list(one.outputs)}")
    if one.calm and not wrong and not (one.may_refuse and found.status == 2):
        wanted = calm(one.command, tuple(one.calm))
        if (found.status, plain(found.out, one.argv)) != wanted:
            wrong.append(f"{found.status} {plain(found.out, one.argv)[-200:]!r}, undamaged {wanted}")
    return wrong


def on_disk(*folders: Path) -> dict[str, tuple]:
    """Names with kind, size and time of everything below, but for the output and the names of drafts."""
    found = {}
    for folder in folders:
        for parent, names, files in os.walk(folder):
            if parent == str(folder) and "out" in names:
                names.remove("out")
            for name in (*names, *files):
                facts = os.lstat(f"{parent}/{name}")
                found[f"{parent}/{name}"] = (
                    facts.st_mode,
                    facts.st_size if name in files else 0,
                    facts.st_mtime_ns if name in files else 0,
                )
    return found


@cache
def warm() -> None:
    """Libraries that are imported on the way cost time once, and make folders in a home."""
    adapter = str(FIXTURES / "adapters" / "split_diffusers.safetensors")
    for command, argv in (("plan", [str(CONFIGS / "quickstart.yaml")]), ("inspect", [adapter])):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main.run(command, argv) == 0


@pytest.fixture
def world(tmp_path, monkeypatch):
    """(folder for inputs, home, current folder), all empty."""
    warm()
    folders = [tmp_path / name for name in ("input", "home", "cwd")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("HOME", str(folders[1]))
    monkeypatch.chdir(folders[2])
    for name, command in stand_ins().items():
        monkeypatch.setitem(main.COMMANDS, name, command)
    return folders


def made(kind: str, number: int, folder: Path) -> Input:
    """The number-th input of a kind, which is always the same."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "out").mkdir(parents=True)
    mutators = KINDS[kind]
    return mutators[number % len(mutators)](random.Random(f"{kind} {number}"), folder)


def tried(kind: str, number: int, world: list[Path]) -> None:
    one = made(kind, number, world[0])
    before = on_disk(*world)
    found = outcome(one.command, one.argv)
    wrong = mistakes(one, found)
    after = on_disk(*world)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    wrong += [f"{len(changed)} files changed: {sorted(changed)[:3]}"] if changed else []
    judge(kind, COLUMN, not wrong, f"{number} {one.command} {one.told[:120]}: {'; '.join(wrong)[:600]}")


def share(kind: str, count: int) -> int:
    """Of `count` inputs, by the number of its mutators."""
    total = sum(map(len, KINDS.values()))
    return max(len(KINDS[kind]), count // 25, count * len(KINDS[kind]) // total)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(kind, world):
    for number in range(share(kind, 200)):
        tried(kind, number, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(kind, world):
    for number in range(share(kind, 2000)):
        tried(kind, number, world)
        if number % 50 == 0:
            gc.collect()


def as_a_process(kind: str, number: int, world: list[Path]) -> None:
    """What was tried in this process is what a user's process does."""
    one = made(kind, number, world[0])
    here = outcome(one.command, one.argv)
    argv = [sys.executable, "-m", "ppcoat", *one.command.split(), *one.argv]
    there = subprocess.run(argv, capture_output=True, timeout=300, env=os.environ | {"PYTHONPATH": ROOT})
    wrong = mistakes(one, Outcome(there.returncode, there.stdout.decode(), there.stderr.decode()))
    wrong += [f"{there.returncode}, in one process {here.status}"] if there.returncode != here.status else []
    judge(f"{kind}, as processes", COLUMN, not wrong, f"{number} {one.command} {one.told[:120]}: {wrong}")


def passes(one: Input) -> bool:
    """Whether a system can pass its arguments to a process."""
    return not any("\0" in word or len(word) > 2**15 or not word.isprintable() for word in one.argv)


@pytest.mark.parametrize("number", (1, 8))
def test_a_config_as_a_process(number, world):
    as_a_process("configs", number, world)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("configs", "data", "adapters"))
def test_some_as_processes(kind, world):
    for number in random.Random(0).sample(range(300), 8):
        if passes(made(kind, number, world[0])):
            as_a_process(kind, number, world)
