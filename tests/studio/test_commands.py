"""The command that a page shows is the one that a shell would run, and what it prints comes back as text."""

import asyncio
import shlex
import subprocess
import sys

import pytest

from ppcoat.cli.main import COMMANDS
from ppcoat.studio.commands import RunningCommand, shell_command

HOSTILE = ["plain", "two words", "it's", '"quoted"', "$HOME `id` $(id)", "a;b|c&d>e", "*?[x]", "", "\\", "~",
           "<img src=x onerror=alert(1)>", "图 片", "-x", "!!",
           "line\nend", "tab\there'\\", "\x1b[31m"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_shell_reads_the_argument_as_it_was(text):
    command = shell_command(["inspect", text])
    assert command.isprintable() and command.startswith("python -m ppcoat inspect ")
    script = "printf '%s\\0' " + command
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[4] == text
    if "\n" not in text and "\t" not in text and "\x1b" not in text:
        assert shlex.split(command)[4] == text


def test_a_command_is_shown_with_the_folder_that_it_starts_in(tmp_path, monkeypatch):
    folder = tmp_path / "my pictures"
    folder.mkdir()
    assert shell_command(["x"], folder) == f"cd '{folder}' && python -m ppcoat x"
    monkeypatch.chdir(folder)
    assert shell_command(["x"], folder) == "python -m ppcoat x"


def run(*arguments):
    lines = []
    return asyncio.run(RunningCommand(arguments, lines.append).run()), lines


def test_a_command_runs_and_is_heard():
    status, lines = run("--help")
    assert status == 0 and len(lines) > len(COMMANDS)
    assert run("nothing_of_that_name")[0] == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with CPython 3.11")
def test_nothing_is_imported_from_the_folder_that_a_command_starts_in(tmp_path):
    for name in ("argparse.py", "yaml.py", "ppcoat/__main__.py", "ppcoat/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit(77)")
    lines = []
    status = asyncio.run(RunningCommand(["--help"], lines.append, tmp_path).run())
    assert status == 0 and len(lines) > len(COMMANDS)


def test_lines_are_plain_text(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nprintf 'a 10%%\\rb\\n\\033[31mred\\377\\nlast\\ttab'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert run()[1] == ["a 10%", "b", "\\x1b[31mred\ufffd", "last    tab"]


def test_a_command_can_be_stopped(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho started\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    command = RunningCommand([], lambda line: command.stop())
    assert asyncio.run(command.run()) != 0
