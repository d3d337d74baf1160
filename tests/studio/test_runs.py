"""Runs as processes: started, stopped, queued, found again, and never mistaken for another. The program that
is started is a shell script in the place of Python."""

import json
import os
import signal
import sys
import time

import pytest

from ppcoat.errors import ConfigError
from ppcoat.studio import runs
from ppcoat.studio.runs import ChildRun, Note, Queue, birth

FAKE = """#!/bin/sh
shift 2  # -m ppcoat
case $1 in
  train) trap 'echo "stopped at step 3; saved"; exit 143' TERM; echo "begins in $PWD"
         i=0; while [ $i -lt 400 ]; do i=$((i+1)); sleep 0.02; done ;;
  short) echo "one"; printf 'bar 1/2\\rbar 2/2\\n'; echo "error: no such model"; exit 2 ;;
esac
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job("a", "train") -> a prepared ChildRun in tmp_path/a. What still runs at the end is ended."""
    program = tmp_path / "python"
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    made = []

    def make(name, *argv):
        made.append(ChildRun(tmp_path / name))
        made[-1].prepare(argv, tmp_path)
        return made[-1]

    yield make
    for each in made:
        if each.is_alive:
            os.kill(each.note.pid, signal.SIGKILL)


def until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_goes_on_by_itself_and_stops_when_asked(job, tmp_path):
    run = job("a", "train")
    assert run.status == "waiting"
    process = run.start()
    assert run.status == "running" and os.getsid(process.pid) == process.pid
    until(lambda: run.tail())
    assert run.tail() == [f"begins in {tmp_path}"] and run.memory > 0
    with pytest.raises(ConfigError, match="running"):
        run.start()
    with pytest.raises(ConfigError, match="stop it, or give this run another name"):
        run.prepare(["train"], tmp_path)
    run.stop()
    assert run.status in ("stopping", "stopped")
    assert process.wait(10) == 143
    assert run.status == "stopped" and run.tail()[-1] == "stopped at step 3; saved" and run.memory is None
    run.start()  # it goes on with what it was
    assert run.status == "running"


def test_a_child_that_nobody_waited_for_is_not_alive(job):
    run = job("a", "short")
    process = run.start()
    until(lambda: not run.is_alive)  # a zombie until it is waited for
    assert process.returncode is None and birth(process.pid) is None
    assert run.status == "ended" and run.error == "no such model"
    assert run.tail() == ["one", "bar 2/2", "error: no such model"]


def test_a_process_that_got_the_id_is_left_alone(job, tmp_path, monkeypatch):
    run = job("a", "train")
    run._keep(Note(("train",), str(tmp_path), os.getpid(), "another boot 1"))
    monkeypatch.setattr(runs.os, "kill", lambda *_: pytest.fail("a stranger was killed"))
    assert not run.is_alive and run.status == "ended"
    run.stop()
    assert birth(os.getpid()) == birth(os.getpid()) != birth(1)
    assert birth(2**22 + 1) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"argv": 3}', '{"argv": [], "cwd": "", "pid": "x"}'])
def test_a_damaged_note_is_none(tmp_path, text):
    (tmp_path / "studio.json").write_text(text)
    run = ChildRun(tmp_path)
    assert run.note is None and run.status == "new"
    with pytest.raises(ConfigError, match="nothing to start"):
        run.start()


def test_the_queue_trains_one_after_the_other_and_outlives_the_studio(job, tmp_path):
    first, second, third = (job(name, "train") for name in "abc")
    queue = Queue(tmp_path)
    for each in (first, second, third):
        queue.add(each)
    with pytest.raises(ConfigError, match="waiting already"):
        queue.add(second)
    queue.tick()
    queue.tick()
    assert first.is_alive and queue.current == first and queue.waiting == [second.folder, third.folder]
    again = Queue(tmp_path)  # the studio starts anew
    assert again.current == first and again.waiting == [second.folder, third.folder]
    again.tick()
    assert second.status == "waiting"
    again.remove(third)
    os.kill(first.note.pid, signal.SIGKILL)
    until(lambda: not first.is_alive)
    again.tick()
    assert second.is_alive and again.waiting == []


@pytest.mark.parametrize("moment", [(ChildRun, "start"), (Queue, "_save")], ids=["before", "after"])
def test_a_studio_that_is_killed_at_a_start_loses_no_run(job, tmp_path, monkeypatch, moment):
    run = job("a", "train")
    queue = Queue(tmp_path)
    queue.add(run)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*moment, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        queue.tick()
    again = Queue(tmp_path)
    assert again.waiting == [run.folder] and again.current is None
    again.tick()
    assert run.is_alive and again.current == run and again.waiting == [] and again.refused == {}
    assert Queue(tmp_path).current == run and Queue(tmp_path).waiting == []


def test_a_run_that_cannot_start_holds_nobody_up(job, tmp_path):
    broken, good = ChildRun(tmp_path / "gone"), job("b", "train")
    queue = Queue(tmp_path)
    queue.add(broken)
    queue.add(good)
    queue.tick()
    assert "nothing to start" in queue.refused[str(broken.folder)]
    queue.tick()
    assert good.is_alive


def test_a_damaged_queue_is_an_empty_one(tmp_path):
    (tmp_path / "queue.json").write_text('{"waiting": 3}')
    assert Queue(tmp_path).waiting == [] and Queue(tmp_path).current is None


def test_memory_of_a_card_is_that_of_the_process(job, tmp_path, monkeypatch):
    run = job("a", "train")
    assert runs.device_memory(run) is None
    run.start()
    table = f"{run.note.pid}, 1000\\n1{run.note.pid}, 7\\n{run.note.pid}, 24\\n"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{table}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert runs.device_memory(run) == 1024 << 20
    assert json.loads((run.folder / "studio.json").read_text())["pid"] == run.note.pid
