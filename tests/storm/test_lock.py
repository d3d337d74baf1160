"""Two runs on one folder: the second is told who runs, and a dead one holds nothing."""

import errno
import os
import signal
from contextlib import suppress

import pytest

from ppcoat.errors import ConfigError
from ppcoat.train.checkpoint import LOCK, only_run_in
from ppcoat.train.ranks import Ranks


@pytest.fixture
def other_run(tmp_path):
    """A process that has tmp_path/run; its id."""
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with only_run_in(tmp_path / "run", Ranks()):
                os.write(say, b"x")
                signal.pause()
        finally:
            os._exit(0)
    os.read(said, 1)
    yield child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.close(said)
    os.close(say)


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_is_told_who_runs_and_a_killed_one_is_taken_over(tmp_path, other_run):
    run = tmp_path / "run"
    told = f"{run}: process {other_run} on .* is training there; wait for it"
    with pytest.raises(ConfigError, match=told), only_run_in(run, Ranks()):
        pytest.fail("both run")
    assert (run / LOCK).exists()
    end(other_run)
    assert (run / LOCK).exists()
    with only_run_in(run, Ranks()):
        assert (run / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not run.exists()


def test_a_folder_in_which_something_came_stays(tmp_path):
    with only_run_in(tmp_path / "deep" / "run", Ranks()):
        (tmp_path / "deep" / "run" / "log.jsonl").touch()
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["log.jsonl"]


def test_an_error_in_the_run_gives_the_folder_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), only_run_in(tmp_path / "run", Ranks()):
            raise KeyboardInterrupt


def test_a_disk_without_room_for_its_note_is_no_obstacle(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    mine = pytest.raises(ConfigError, match="another process is training there")
    with only_run_in(tmp_path / "run", Ranks()), mine, only_run_in(tmp_path / "run", Ranks()):
        pytest.fail("both run")
    assert not (tmp_path / "run").exists()


def test_whoever_waited_at_a_file_that_was_taken_away_holds_the_new_one(tmp_path, monkeypatch):
    """A run ends, and removes its file, between another's opening and locking it."""
    real, run = os.open, tmp_path / "run"

    def opened(path, *args, **kwargs):
        descriptor = real(path, *args, **kwargs)
        if os.fspath(path).endswith(LOCK) and not seen:
            seen.append(path)
            os.unlink(path)
        return descriptor

    seen = []
    monkeypatch.setattr(os, "open", opened)
    mine = pytest.raises(ConfigError, match=f"process {os.getpid()} ")
    with only_run_in(run, Ranks()), mine, only_run_in(run, Ranks()):
        pytest.fail("both run")
    assert seen
