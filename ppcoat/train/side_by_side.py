"""Two measured training runs side by side, one process each, taking turns; and the largest batch that fits.

The processes share cores, memory bus and clock, so they must not run at once, and a machine that slows down
must hit both alike: while one takes a few steps the other waits at its pipe, asleep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

from ppcoat.errors import ConfigError
from ppcoat.train.child_process import ChildProcess
from ppcoat.train.measure import BenchmarkCase, StepRecord, serve

PROBE_STEPS = 2  # the optimizer's states exist from the first update on: the second step is the fullest
GROWTH = 4  # a batch is tried only up to this many times the largest that was seen to fit


class MeasuredProcess(ChildProcess):
    """A `MeasuredTraining` in a process of its own.

    facts: what it said of model and machine, from entering on. Raises ConfigError and MemoryError as the
    process met them, and what ChildProcess raises.
    """

    def __init__(self, case: BenchmarkCase) -> None:
        super().__init__(serve, case, daemon=True)

    def __enter__(self) -> MeasuredProcess:
        self.facts: dict = self.answer()
        return self

    def steps(self, count: int) -> list[StepRecord]:
        """Take `count` steps and wait for them."""
        self.pipe.send(count)
        return self.answer()

    def result(self) -> dict:
        """The memory numbers (`MeasuredTraining.result`). The process ends."""
        self.pipe.send(0)
        return self.answer()


def run_side_by_side(
    cases: dict[str, BenchmarkCase], steps: int, on_turn: Callable[[str, int], None]
) -> tuple[dict, dict[str, dict]]:
    """Run all variants, `steps` steps each, in turns -> facts, {variant: memory numbers and "steps"}.

    on_turn(variant, steps taken) is called after each turn. Raises what MeasuredProcess raises.
    """
    turn = max(1, min(5, steps // 10))
    records: dict[str, list[StepRecord]] = {name: [] for name in cases}
    with ExitStack() as stack:
        # One after the other: they are built, too, only one at a time.
        processes = {name: stack.enter_context(MeasuredProcess(case)) for name, case in cases.items()}
        while any(len(done) < steps for done in records.values()):
            for name, process in processes.items():
                taken = process.steps(min(turn, steps - len(records[name])))
                records[name] += taken
                on_turn(name, len(taken))
        facts = next(iter(processes.values())).facts
        return facts, {name: {**p.result(), "steps": records[name]} for name, p in processes.items()}


def measured_peak(case: BenchmarkCase, budget_bytes: float) -> float:
    """Peak bytes of PROBE_STEPS steps in a fresh process; infinite if the memory does not suffice.

    Raises ConfigError if the machine has less memory than the budget, or does not tell.
    """
    try:
        with MeasuredProcess(case) as process:
            _check_budget(budget_bytes, process.facts["environment"]["memory_bytes"])
            process.steps(PROBE_STEPS)
            return process.result()["peak_bytes"]
    except MemoryError:
        return math.inf


def largest_batch(peak_of: Callable[[int], float], budget: float) -> tuple[int, dict[int, float]]:
    """The largest batch with peak_of(batch) <= budget (0 if none), and every peak that was measured for it.

    Batches 1 and 2 give a line; where it meets the budget the next batch is measured, until the answer has
    been measured to fit and the batch above it was measured, or is predicted by the line, not to.
    """
    peaks = {batch: peak_of(batch) for batch in (1, 2)}
    while True:
        fitting = [batch for batch, peak in peaks.items() if peak <= budget]
        if not fitting:
            return 0, peaks
        best = max(fitting)
        too_large = min((batch for batch in peaks if batch > best), default=math.inf)
        # A batch that the device could not run at all gives no line to follow: halve the distance to it.
        limit = (best + too_large) // 2 if peaks.get(too_large) == math.inf else too_large - 1
        guess = min(_meets(peaks, budget), GROWTH * best, limit)
        if guess <= best:
            return best, peaks
        peaks[guess] = peak_of(guess)


def _meets(peaks: dict[int, float], budget: float) -> float:
    """Batch at which the line through the two largest measured batches reaches the budget; infinite if it
    does not rise.
    """
    points = sorted((batch, peak) for batch, peak in peaks.items() if math.isfinite(peak))[-2:]
    if len(points) < 2 or points[1][1] <= points[0][1]:
        return math.inf
    (x0, y0), (x1, y1) = points
    return math.floor(x1 + (budget - y1) * (x1 - x0) / (y1 - y0))


def _check_budget(budget: float, total: int | None) -> None:
    if total is None:
        raise ConfigError("memory_budget_gb: this system does not tell the memory of a process; leave it out")
    if budget > total:
        raise ConfigError(
            f"memory_budget_gb: came {budget / 1e9:g}, but this device has {total / 1e9:.1f} GB; give less"
        )
