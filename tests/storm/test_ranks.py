"""One rank of several is stopped, killed, hangs or fails, at any place: the others end within the bound, each
says for whom it waited, and the same command goes on and ends with the same bits."""

import os
import re
import time

import pytest
from counts import judge
from strikes import Run, Strike

SILENT = (
    r"rank {0} was waited for and showed no sign of work: train.rank_timeout is 4 s; run the same command"
)
IN_STORE = r"rank [01] was stopped, or hangs in the store of the process group, where rank 0 waits for all at"
DIED = r"rank {0} has died and so ends this one; run the same command again"
SLACK = 6.0  # of a busy machine

STRIKES = [
    Strike(rank, how, where)
    for where, ranks in {
        "in the store": (0, 1),
        "encoding": (0,),
        "waiting for encoding": (1,),
        "before the first step": (0, 1),
        "in a step": (0, 1),
        "in a transfer": (0, 1),
        "in a save": (0,),
    }.items()
    for rank in ranks
    for how in ("stopped", "killed", "hangs")
    if not (where.startswith("waiting") and how == "hangs")
]


@pytest.fixture
def new_run(tmp_path, write_run, drawings, encoders_read_once):
    """new_run(name, **of Run) -> a Run of four steps that saves every second."""
    data, runs = tmp_path / "data", []
    drawings(data, 6)

    def make(name, **more):
        folder = tmp_path / name
        folder.mkdir()
        train = {"steps": 4, "batch_size": 1, "lr": 1e-2}
        file = write_run(folder, data, train=train, coat={"optimizer": {"block_size": 16}},
                         save={"save_every": 2})  # fmt: skip
        runs.append(Run(file, **more))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture
def calm(new_run):
    """What the run gives that nobody disturbs."""
    run = new_run("calm").start()
    assert run.codes(120) == [0, 0], run.said(0) + run.said(1)
    return run.result()


def ended(run, struck, said, codes=(75,)):
    """Seconds until the ranks that were not struck have ended, or what is wrong with how they did."""
    others = [rank for rank in range(run.size) if rank != struck]
    began = time.monotonic()
    found = run.codes(90, others)
    seconds = time.monotonic() - began
    for rank in others:
        if found[rank] not in codes:
            return f"rank {rank}: status {found[rank]} after {seconds:.0f} s, {run.said(rank)[-600:]}"
        if not re.search(said.format(struck), run.said(rank)):
            return f"rank {rank} said: {run.said(rank)[-600:]}"
        if "Traceback" in run.said(rank):
            return f"rank {rank}: a traceback"
    return seconds


def resumes(run, expected):
    """ "" where the same command ends with the expected bits, else what it said."""
    codes = run.start().codes(120)
    if codes != [0] * run.size:
        return f"{codes}: {run.said(0)[-600:]}"
    return "" if run.result() == expected else "other bits"


def try_strike(run, strike, expected):
    case = f"rank {strike.rank} {strike.how} {strike.where}"
    run.start(strike)
    said, codes = (DIED if strike.how == "killed" else SILENT), [75]
    if strike.where == "in the store":  # which holds Python's lock, so the keeper ends who waits there
        said, codes = f"{said}|{IN_STORE}", [75, -9]
    found = ended(run, strike.rank, said, codes)
    if strike.how == "stopped":
        run.wake(strike.rank)
    own = run.codes(20)[strike.rank]
    right = not isinstance(found, str) and own in ([-9] if strike.how == "killed" else [75, -9])
    run.end()
    again = resumes(run, expected)
    judge("ranks", "ends, says for whom", right, f"{case}: {found}, its own status {own}")
    judge("ranks", "resumes bit-equal", not again, f"{case}: {again}")
    print(f"{case}: ended after {found if isinstance(found, str) else f'{found:.1f} s'}, own status {own}, "
          f"resumes {again or 'equal'}", flush=True)  # fmt: skip


@pytest.mark.slow
def test_every_strike_at_every_place(new_run, calm):
    for number, strike in enumerate(s for s in STRIKES if re.search(os.environ.get("K", ""), str(s))):
        try_strike(new_run(f"run{number}"), strike, calm)
