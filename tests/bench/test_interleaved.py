"""The search for the largest batch, on known memory curves; and what a process that fails leads to."""

import math
import os
import signal
import sys
import time

import pytest

from ppcoat.bench import bench_worker
from ppcoat.bench.bench_worker import (
    BenchmarkCase,
    MeasuredProcess,
    largest_batch,
    measured_peak,
    run_interleaved,
)
from ppcoat.errors import ConfigError


def counted(curve):
    """A peak function that notes what was measured."""
    asked = []

    def peak_of(batch):
        asked.append(batch)
        return curve(batch)

    return peak_of, asked


@pytest.mark.parametrize("budget", [3.0, 4.4, 9.9, 20.0, 60.0])
@pytest.mark.parametrize(
    "curve",
    [
        lambda n: 2 + 0.7 * n,  # a line
        lambda n: 2 + 0.7 * math.ceil(n / 4) * 4,  # in large pieces: 1 and 2 are equal
        lambda n: 2 + 0.3 * n + 0.02 * n * n,
        lambda n: 2 + n**0.7,
        lambda n: 2 + 0.1 * n if n < 13 else math.inf,  # the device ends before the budget
    ],
)
def test_the_answer_was_measured_to_fit(curve, budget):
    peak_of, asked = counted(curve)
    batch, peaks = largest_batch(peak_of, budget)
    assert set(asked) == set(peaks) and len(asked) == len(peaks) <= 12
    if batch == 0:
        assert curve(1) > budget
        return
    assert batch in asked and curve(batch) <= budget
    largest = max(n for n in range(1, 5000) if curve(n) <= budget)
    assert batch <= largest and batch >= 0.75 * largest


def test_a_line_needs_one_check():
    peak_of, asked = counted(lambda n: 2 + 0.7 * n)
    assert largest_batch(peak_of, 2 + 0.7 * 7.5)[0] == 7
    assert asked == [1, 2, 7]


def test_a_batch_is_never_tried_far_beyond_what_was_seen_to_fit():
    """One measurement too low must not send the machine into its swap."""
    peak_of, asked = counted(lambda n: 3.0 if n < 3 else 2 + n)
    assert largest_batch(peak_of, 50.0)[0] == 48
    seen = 1
    for batch in asked[1:]:
        assert batch <= 4 * seen
        seen = max(seen, batch)


def test_nothing_fits():
    assert largest_batch(lambda n: 10.0 * n, 9.0) == (0, {1: 10.0, 2: 20.0})


class FakeProcess:
    """In the place of MeasuredProcess: notes the order of all calls."""

    log: list = []
    total = 8e9

    def __init__(self, case):
        self.name = case.policy
        self.facts = {"environment": {"memory_bytes": self.total}}

    def __enter__(self):
        self.log.append((self.name, "built"))
        return self

    def __exit__(self, *error):
        self.log.append((self.name, "left"))

    def steps(self, count):
        if self.name == "coat+recompute":
            raise MemoryError("full")
        self.log.append((self.name, count))
        return [None] * count

    def result(self):
        return {"peak_bytes": 5}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(bench_worker, "MeasuredProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "log", [])
    return FakeProcess


CASES = {"standard": BenchmarkCase(), "coat": BenchmarkCase(policy="coat")}


@pytest.mark.parametrize(("steps", "turns"), [(3, [1, 1, 1]), (23, [2] * 11 + [1]), (50, [5] * 10)])
def test_variants_take_turns(fake, steps, turns):
    done = []
    _, results = run_interleaved(CASES, steps, lambda *turn: done.append(turn))
    wanted = [(name, count) for count in turns for name in ("none", "coat")]
    assert [entry for entry in fake.log if isinstance(entry[1], int)] == wanted
    assert done == [({"none": "standard"}.get(name, name), count) for name, count in wanted]
    assert all(len(result["steps"]) == steps for result in results.values())
    assert fake.log[:2] == [("none", "built"), ("coat", "built")]
    assert sorted(fake.log[-2:]) == [("coat", "left"), ("none", "left")]


def test_a_probe_runs_past_the_making_of_the_states(fake):
    assert measured_peak(BenchmarkCase(), 1e9) == 5
    assert fake.log == [("none", "built"), ("none", 2), ("none", "left")]


def test_a_batch_that_the_device_cannot_run_does_not_fit(fake):
    assert measured_peak(BenchmarkCase(policy="coat+recompute"), 1e9) == math.inf


@pytest.mark.parametrize("total", [None, 8e9])
def test_a_budget_beyond_the_machine_is_refused(fake, monkeypatch, total):
    monkeypatch.setattr(fake, "total", total)
    with pytest.raises(
        ConfigError, match="memory_budget_gb: came 9, .* has 8.0 GB" if total else "does not tell"
    ):
        measured_peak(BenchmarkCase(), 9e9)


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (lambda: sys.exit(7), ChildProcessError, "exit code 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), MemoryError, "killed"),  # what Linux does then
    ],
)
def test_a_process_that_dies_is_reported(forked, monkeypatch, end, error, words):
    monkeypatch.setattr(bench_worker, "serve", lambda connection, case: end())
    with pytest.raises(error, match=words), MeasuredProcess(BenchmarkCase()):
        pass


def test_what_a_process_sends_is_raised(forked, monkeypatch):
    def refuse(connection, case):
        connection.send(ConfigError("device: came gpu"))

    monkeypatch.setattr(bench_worker, "serve", refuse)
    with pytest.raises(ConfigError, match="came gpu"), MeasuredProcess(BenchmarkCase()):
        pass


def test_an_error_here_ends_the_process_there(forked, monkeypatch):
    def wait_for_ever(connection, case):
        connection.send({})
        connection.recv()
        time.sleep(60)

    monkeypatch.setattr(bench_worker, "serve", wait_for_ever)
    with pytest.raises(KeyboardInterrupt), MeasuredProcess(BenchmarkCase()) as process:
        raise KeyboardInterrupt
    assert process.process.exitcode == -signal.SIGTERM
