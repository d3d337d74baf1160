"""Jobs at the same time: in processes of their own, results in order, faults raised here, none left over."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ppcoat.cli import at_once
from ppcoat.cli.at_once import Job, batched, run_at_once
from ppcoat.errors import ConfigError
from ppcoat.host import is_running, set_device

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
two_cores = pytest.mark.skipif(CORES < 2, reason="jobs run at once on two cores or more")
# A process that starts two jobs and can only be ended: prints their process ids, then waits for them.
PARENT = """
import sys
from pathlib import Path
from time import sleep
from ppcoat.cli.at_once import Job, run_at_once
if __name__ == "__main__":
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    run_at_once([Job(exec, (code, {}), Path(sys.argv[1]) / name) for name in "ab"], "cpu")
"""


@pytest.fixture(autouse=True)
def all_cores(monkeypatch):
    """Also where OMP_NUM_THREADS, which Paddle sets when it is imported, came to these tests as 1."""
    monkeypatch.setattr(at_once, "core_count", lambda: CORES)


@two_cores
def test_results_come_in_order_from_processes_that_share_the_cores(tmp_path):
    jobs = [
        Job(eval, ("(__import__('os').getpid(), __import__('ppcoat.host').host.core_count())",), tmp_path / n)
        for n in "ab"
    ]
    before = os.environ.get("OMP_NUM_THREADS")
    (first, threads), (second, others) = run_at_once(jobs, "cpu")
    assert len({first, second, os.getpid()}) == 3
    assert threads == others == CORES // 2
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert run_at_once([Job(time.sleep, (0.3,)), Job(math.sqrt, (9.0,))], "cpu") == [None, 3.0]


@two_cores
def test_what_a_job_prints_goes_to_its_log(tmp_path):
    log = tmp_path / "new" / "job.log"
    code = "import sys; print('out'); sys.stderr.write('err')"
    assert run_at_once([Job(math.sqrt, (1.0,)), Job(exec, (code, {}), log)], "cpu") == [1.0, None]
    assert sorted(log.read_text().replace("\n", "")) == sorted("outerr")


@two_cores
def test_a_fault_is_raised_here_and_the_others_are_stopped():
    started, long = time.monotonic(), Job(time.sleep, (600,))
    with pytest.raises(ConfigError, match="wanted auto, cpu"):
        run_at_once([Job(set_device, ("tpu",)), long], "cpu")
    with pytest.raises(SystemExit) as stop:
        run_at_once([Job(sys.exit, (130,)), long], "cpu")
    assert stop.value.code == 130
    with pytest.raises(ChildProcessError, match="exit code 7"):
        run_at_once([Job(os._exit, (7,)), long], "cpu")
    assert time.monotonic() - started < 300


@two_cores
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_jobs_end_with_the_process_that_started_them(tmp_path, number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    unset = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=unset)
    try:
        pids = [wait_for_number(tmp_path / name) for name in "ab"]
    finally:
        parent.send_signal(number)
        parent.wait(60)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in pids)


def wait_for_number(file: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()).endswith("\n"):
            return int(text.splitlines()[-1])
        time.sleep(0.1)
    raise AssertionError(f"{file} was not written")


@pytest.mark.parametrize(("cores", "device"), [(1, "cpu"), (4, "gpu:0")])
def test_one_core_or_a_gpu_does_one_job_after_the_other_here(monkeypatch, cores, device):
    monkeypatch.setattr(at_once, "core_count", lambda: cores)
    order = []
    assert run_at_once([Job(order.append, (i,)) for i in range(3)], device) == [None] * 3
    assert order == [0, 1, 2]


def test_batches_keep_the_order_and_the_rest():
    assert list(batched("abcde", 2)) == [("a", "b"), ("c", "d"), ("e",)]
    assert list(batched([], 2)) == []
