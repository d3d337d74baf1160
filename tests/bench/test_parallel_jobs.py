"""Jobs at the same time: in processes of their own, results in order, faults raised here, none left over."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ppcoat.atomic import is_running
from ppcoat.bench import parallel_jobs
from ppcoat.bench.parallel_jobs import Job, batched, run_parallel
from ppcoat.device import set_device
from ppcoat.errors import ConfigError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
two_cores = pytest.mark.skipif(CORES < 2, reason="jobs run at once on two cores or more")
# A process that starts two jobs and can only be ended: prints their process ids, then waits for them.
PARENT = """
import sys
from pathlib import Path
from ppcoat.bench.parallel_jobs import Job, run_parallel
if __name__ == "__main__":
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    run_parallel([Job(name, exec, (code, {}), Path(sys.argv[1]) / name) for name in "ab"], "cpu")
"""


@pytest.fixture(autouse=True)
def all_cores(monkeypatch):
    """Also where OMP_NUM_THREADS, which Paddle sets when it is imported, came to these tests as 1."""
    monkeypatch.setattr(parallel_jobs, "core_count", lambda: CORES)


@two_cores
def test_results_come_in_order_from_processes_that_share_the_cores_and_print_to_their_logs(tmp_path, capsys):
    # the first one ends last
    facts = "({}, __import__('time').sleep({}), __import__('os').getpid(), "
    facts += "__import__('ppcoat.device').device.core_count(), 'ppdiffusers' in __import__('sys').modules, "
    facts += "print('out {}'), __import__('sys').stderr.write('err'))"
    logs = [tmp_path / "new" / "0.log", tmp_path / "1.log"]
    jobs = [Job(str(i), eval, (facts.format(i, 1 - i, i),), log) for i, log in enumerate(logs)]
    before = os.environ.get("OMP_NUM_THREADS")
    (i, _, first, threads, *models), (j, _, second, others, *_) = run_parallel(jobs, "cpu")
    assert (i, j) == (0, 1)
    assert len({first, second, os.getpid()}) == 3
    assert threads == others == CORES // 2
    assert models[0] is False  # whose import takes seconds
    assert os.environ.get("OMP_NUM_THREADS") == before
    for i, log in enumerate(logs):
        assert sorted(log.read_text().replace("\n", "")) == sorted(f"out {i}err")
    assert capsys.readouterr().out == f"0 (prints to {logs[0]})\n1 (prints to {logs[1]})\n"


@two_cores
@pytest.mark.parametrize(
    ("job", "error", "words", "first", "printed"),
    [
        (Job("bad", set_device, ("tpu",)), ConfigError, "wanted auto, cpu", False, []),
        pytest.param(Job("end", sys.exit, (130,)), SystemExit, "130", True, [], marks=pytest.mark.slow),
        (Job("death", os._exit, (7,)), ChildProcessError, "exit code 7", False, []),
        (Job("fault", eval, ("1 / 0",)), ZeroDivisionError, "", True, ["Traceback", "ZeroDivisionError"]),
    ],
)
def test_a_fault_is_raised_here_at_once_and_the_other_is_stopped(
    forked, job, error, words, first, printed, tmp_path
):
    """A traceback is printed where the fault is no message to the user."""
    started, long = time.monotonic(), Job("long", time.sleep, (600,))
    job = replace(job, log=tmp_path / "job.log")
    with pytest.raises(error, match=words):
        run_parallel([job, long] if first else [long, job], "cpu")
    assert time.monotonic() - started < 300
    said = job.log.read_text()
    assert all(word in said for word in printed) and bool(said) == bool(printed)


WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@two_cores
def test_jobs_end_with_the_process_that_started_them(forked, tmp_path):
    jobs = [Job(name, exec, (WAIT, {}), tmp_path / name) for name in "ab"]
    parent = parallel_jobs.multiprocessing.get_context("fork").Process(
        target=run_parallel, args=(jobs, "cpu")
    )
    parent.start()
    try:
        pids = [wait_for_number(tmp_path / name) for name in "ab"]
    finally:
        parent.kill()
        parent.join()
    assert all_end(pids)


@two_cores
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_end_with_the_command_that_started_them(tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=unset)
    try:
        pids = [wait_for_number(tmp_path / name) for name in "ab"]
    finally:
        parent.send_signal(number)
        parent.wait(60)
    assert all_end(pids)


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while (running := any(is_running(pid) for pid in pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running


def wait_for_number(file: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()).endswith("\n"):
            return int(text.splitlines()[-1])
        time.sleep(0.05)
    raise AssertionError(f"{file} was not written")


@pytest.mark.parametrize(("cores", "device"), [(1, "cpu"), (4, "gpu:0")])
def test_one_core_or_a_gpu_does_one_job_after_the_other_here(monkeypatch, capsys, cores, device):
    monkeypatch.setattr(parallel_jobs, "core_count", lambda: cores)
    jobs = [Job(f"job {i}", print, (i,), Path("unused.log")) for i in range(3)]
    assert run_parallel(jobs, device) == [None] * 3
    assert capsys.readouterr().out == "job 0\n0\njob 1\n1\njob 2\n2\n"


def test_batches_keep_the_order_and_the_rest():
    assert list(batched("abcde", 2)) == [("a", "b"), ("c", "d"), ("e",)]
    assert list(batched([], 2)) == []
