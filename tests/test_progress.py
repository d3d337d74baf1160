"""What a user sees of a command at work: bars in a terminal, lines in a file, warnings without file names."""

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORK = """
import logging, sys, warnings
from ppcoat.errors import tell_plainly
from ppcoat.progress import Progress
tell_plainly()
logging.basicConfig(format="[%(levelname)s] %(message)s")  # as libraries do
with Progress(total=3, desc="counting", unit="file", delay=0) as bar:
    bar.update(1)
    logging.getLogger("ppcoat.anything").warning("%s is odd", "this")
    logging.getLogger("PaddleNLP").warning("nobody can act on it")
    warnings.warn("and that", stacklevel=1)
    Progress.write("said", file=sys.stderr)
    bar.update(2)
for _ in Progress(range(2), disable=True): pass
"""


def run_work(stderr):
    return subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, stderr=stderr, check=True)


def test_a_file_of_output_gets_lines(tmp_path):
    file = tmp_path / "log"
    with file.open("w") as log:
        run_work(log)
    lines = file.read_bytes().decode().split("\n")
    assert [line.split(", 00:")[0] for line in lines] == [
        "counting: 0/3",
        "warning: this is odd",
        "warning: and that",
        "said",
        "counting: 3/3",
        "",
    ]


def test_a_terminal_gets_a_bar_and_whole_lines_above_it():
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    run_work(theirs)
    os.close(theirs)
    told = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\rcounting: 100%|" in told and told.count("\n") == 4  # three lines and the end of the bar
    for line in ("warning: this is odd", "warning: and that", "said"):
        assert f"\r{line}\r\n" in told
    assert "nobody" not in told and "\x1b[3" not in told  # no colours


@pytest.fixture
def lines(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_says_what_is_left_and_what_was_measured(lines):
    from ppcoat.progress import Progress

    bar = Progress(total=4, initial=1, desc="training", unit="step", delay=0)
    bar.set_postfix_str("loss=0.5", refresh=False)
    bar.start_t -= 30
    bar.update(1)  # thirty seconds after the last line
    bar.close()
    bar.close()
    first, *others = lines()
    assert first == "training: 1/4, 00:00"
    assert others == ["training: 2/4, 00:30, 01:00 left, 0.0333 step/s, loss=0.5"]


def test_short_work_takes_no_line(lines):
    from ppcoat.progress import Progress

    assert list(Progress(range(3))) == [0, 1, 2]
    assert lines() == []
    for number in (bar := Progress(range(2), desc="slow")):
        bar.start_t -= 5 * number  # less than PAUSE
        bar.last_print_t -= 5 * number
    assert [line.partition(",")[0] for line in lines()] == ["slow: 2/2"]


def test_warnings_are_told_once_however_often_a_process_runs_a_command(lines, monkeypatch):
    from ppcoat.errors import tell_plainly

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    tell_plainly()
    tell_plainly()
    logging.getLogger("ppcoat.cli").warning("odd")
    logging.getLogger("another").warning("not ours")
    logging.getLogger("another").error("broken")
    assert lines() == ["warning: odd", "warning: broken"]


def test_a_reader_that_ends_early_gets_no_traceback():
    """As `ppcoat --help | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ppcoat", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
