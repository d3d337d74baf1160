"""One rank of several is stopped, killed, hangs or fails, at any place: the others end within the bound, each
says for whom it waited, and the same command goes on and ends with the same bits."""

import os
import re
import shutil
import socket
import time

import pytest
from counts import judge
from rank_strikes import Run, Strike

SILENT = (
    r"rank {0} was waited for and showed no sign of work: train.rank_timeout is 4 s; run the same command"
)
IN_STORE = r"rank [01] was stopped, or hangs in the store of the process group, where rank 0 waits for all at"
DIED = r"rank {0} has died and so ends this one; run the same command again"

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
    if strike.where == "in a transfer":  # where all seem to wait for all
        said = f"{said}|an exchange of all ranks has not ended in 4 s \\(train.rank_timeout\\)"
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


NOT_COME = r"waited 4 s for rank 1, which has not come \(train.rank_timeout\); its log may say why"
NO_ANSWER = r"waited 4 s \(train.rank_timeout\) for rank 0, which does not answer at 127.0.0.1"
UNLIKE = (
    "error: the ranks do not start alike: {}; "
    "start them all with the same settings, versions, model and pictures"
)
OTHER_LR = UNLIKE.format("train.lr is 0.01 on rank 0 and 0.02 on rank 1")
OTHER_DATA = UNLIKE.format(
    r"a checksum of their names, bytes and captions is \d+ on rank 0 and \d+ on rank 1"
)


def take(variable):
    """In the process of rank 0: another program listens at this address, one of the launcher's."""

    def before(rank):
        if rank == 0:
            host, _, port = os.environ[variable].split(",")[0].rpartition(":")
            taken.append(socket.create_server((host, int(port))))

    return before


taken = []
NOBODY, LAUNCHED = Strike(-1, "killed", "in a step"), "PADDLE_TRAINER_ENDPOINTS"
# Name: (strike, flag of rank 1, the address that is taken, what each rank says, statuses)
FAULTS = {
    "rank 1 killed before it joins": (
        Strike(1, "killed", "before it joins"), "", "", [NOT_COME, ""], [75, -9]),
    "rank 0 killed before it joins": (
        Strike(0, "killed", "before it joins"), "", "", ["", NO_ANSWER], [-9, 75]),
    "rank 1 stopped before it joins": (
        Strike(1, "stopped", "before it joins"), "", "", [NOT_COME, ""], [75, None]),
    "no GPU on rank 1": (
        Strike(1, "no GPU", "on its device"), "", "", [NOT_COME, "error: device: "], [75, 2]),
    "full disk on rank 0": (
        Strike(0, "full disk", "in a save"), "", "",
        ["error: step 2 could not be saved .*No space left", DIED.format(0)], [2, 75]),
    "full disk on rank 1, whose folder is its own": (
        Strike(1, "full disk", "storing an encoding"), "output_dir=OWN", "",
        [DIED.format(1), "error: encoded pictures .* could not be written .*No space left"], [75, 2]),
    "another learning rate on rank 1": (NOBODY, "train.lr=0.02", "", [OTHER_LR] * 2, [2, 2]),
    "other pictures on rank 1": (NOBODY, "datasets.0.folder_path=OTHER", "", [OTHER_DATA] * 2, [2, 2]),
    "rank 0's port in use": (
        NOBODY, "", LAUNCHED, ["error: rank 0 cannot listen at 127.0.0.1:", NO_ANSWER], [2, 75]),
    "the store's port in use": (NOBODY, "", "PADDLE_MASTER", ["", ""], [0, 0]),
}  # fmt: skip


@pytest.mark.slow
def test_every_fault_of_one_rank(new_run, calm, tmp_path):
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    (tmp_path / "other" / "0000.txt").write_text("[trigger] another caption")
    for number, (name, (strike, flag, address, said, statuses)) in enumerate(FAULTS.items()):
        run = new_run(f"fault{number}")
        flag = flag.replace("OTHER", str(tmp_path / "other")).replace("OWN", str(tmp_path / "own"))
        run.of_rank = {1: [flag] if flag else []}
        began = time.monotonic()
        run.start(strike, **({"before": take(address)} if address else {}))
        ends = [rank for rank, status in enumerate(statuses) if status is not None]
        found, seconds = run.codes(40, ends), time.monotonic() - began
        heard = [run.said(0), run.said(1)]
        plain = all(re.search(each, told) and "Traceback" not in told
                    for each, told in zip(said, heard, strict=True))  # fmt: skip
        judge("ranks", "ends, says for whom", plain and found == statuses, f"{name}: {found} {heard}")
        run.end()
        run.of_rank = {}
        again = resumes(run, calm)
        judge("ranks", "resumes bit-equal", not again, f"{name}: {again}")
        print(
            f"{name}: ended after {seconds:.1f} s, {found}, {plain}, resumes {again or 'equal'}", flush=True
        )


@pytest.mark.slow
def test_every_strike_at_every_place(new_run, calm):
    for number, strike in enumerate(STRIKES):
        try_strike(new_run(f"run{number}"), strike, calm)
