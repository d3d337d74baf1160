"""The watch over ranks: processes with connections and no process group, a bound of a second."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from ppcoat.train import rank_keeper, rank_line
from ppcoat.train.rank_line import LOST_EXIT, Patience
from ppcoat.train.ranks import _connect, _reach

CONTEXT = multiprocessing.get_context("fork")
BOUND, BUSY = 1.0, 20  # seconds: of waiting; that a busy machine may take in all
SILENT = "rank {} was waited for and showed no sign of work: train.rank_timeout is 1 s; run the same command"


class Group:
    """Ranks that run the works with a line each, all groups of a test at the same time. A work that is None
    is of a rank that never comes."""

    def __init__(self, folder, *works, **patience):
        self.folder, self.processes = folder, []
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"

        def run(rank):
            os.environ["PADDLE_TRAINER_ENDPOINTS"] = address
            sys.stderr = open(folder / f"said.{rank}", "w", buffering=1)  # noqa: SIM115
            works[rank](_connect(rank, len(works), Patience(**{"bound": BOUND, **patience})))

        for rank, work in enumerate(works):
            self.processes.append(CONTEXT.Process(target=run, args=(rank,)))
            if work is not None:
                self.processes[-1].start()

    def said(self, rank):
        return (self.folder / f"said.{rank}").read_text()

    def codes(self, *ranks):
        return codes([self.processes[rank] for rank in ranks])

    def wake(self, rank):
        os.kill(self.processes[rank].pid, signal.SIGCONT)


@pytest.fixture
def group(tmp_path, monkeypatch):
    """group(work of rank 0, ...) -> its Group."""
    groups = []
    monkeypatch.setattr(rank_line, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(rank_line, "NOTICE_SECONDS", 1.5)  # above the bound of all but one

    def make(*works, **patience):
        groups.append(Group(tmp_path / str(len(groups)), *works, **patience))
        return groups[-1]

    yield make
    for each in groups:
        for process in each.processes:
            if process.pid is not None:
                process.kill()


def codes(processes):
    """Exit codes; None for who still runs, or never came."""
    end = time.monotonic() + BUSY
    for process in processes:
        if process.pid is not None:
            process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def meets(line):
    for _ in range(2):
        line.meet()
    line.end()


def stops(line):
    line.meet()
    os.kill(os.getpid(), signal.SIGSTOP)
    line.meet()
    line.end()


def hangs(line):
    line.meet()
    threading.Event().wait()


def works_on(line):
    end = time.monotonic() + 1.6 * BOUND
    while time.monotonic() < end:
        time.sleep(0.05)  # where it is nearly always seen
    meets(line)


def stands(line):
    time.sleep(2 * BOUND)
    meets(line)


def tells(line):
    line.meet()
    told = line.exchange(f"rank {line._rank}, a 连衣裙")
    line.end()
    sys.exit(told != ["rank 0, a 连衣裙", "rank 1, a 连衣裙", "rank 2, a 连衣裙"])


def test_who_works_or_wakes_in_time_is_waited_for(group):
    told, working = group(tells, tells, tells), group(works_on, meets)
    woken = group(meets, stops, bound=10.0)
    time.sleep(BOUND)
    woken.wake(1)
    assert told.codes(0, 1, 2) == [0, 0, 0], told.said(0)
    assert working.codes(0, 1) == [0, 0], working.said(1)
    assert woken.codes(0, 1) == [0, 0], (woken.said(0), woken.said(1))
    assert not any(each.said(rank) for each in (told, woken) for rank in (0, 1))
    assert re.fullmatch(r"rank 1 waits for rank 0, which is at work, since \d s\n", working.said(1))


def test_who_shows_no_sign_of_work_ends_all_and_is_named_by_all(group):
    first, last = group(stops, meets, meets), group(meets, meets, stops)
    hung, still = group(meets, hangs), group(stands, meets)
    elsewhere, absent = group(meets, lambda line: line.exchange("x")), group(meets, meets, None)
    noted = group(meets, meets, stops, bound=2.2)

    for stopped, number, others in ((first, 0, (1, 2)), (last, 2, (0, 1))):
        assert stopped.codes(*others) == [LOST_EXIT, LOST_EXIT]
        for rank in others:
            assert stopped.said(rank).startswith(SILENT.format(number)), rank
            assert stopped.said(rank).count("\n") == 1
        stopped.wake(number)
        assert stopped.codes(number) == [LOST_EXIT]
        said = f"has died|the others have waited 1 s for this rank, {number}, and ended; it stood in "
        assert re.search(said, stopped.said(number))
    for each, number in ((hung, 1), (still, 0), (elsewhere, 1)):
        assert each.codes(0, 1) == [LOST_EXIT, LOST_EXIT]
        assert each.said(1 - number).startswith(SILENT.format(number)) or each is elsewhere
    assert "others have waited 1 s for this rank, 1, and ended; it stood in threading.py:" in hung.said(1)
    assert SILENT.format(1) in elsewhere.said(0) or SILENT.format(0) in elsewhere.said(1)

    assert absent.codes(0, 1) == [LOST_EXIT, LOST_EXIT]
    missing = "waited 1 s for rank 2, which has not come (train.rank_timeout); its log may say why; run"
    assert absent.said(0).startswith(missing) and absent.said(1).startswith(SILENT.format(2))

    assert noted.codes(0, 1) == [LOST_EXIT, LOST_EXIT]
    for rank, more in ((0, ", of which there is no sign"), (1, "")):
        notice, end = noted.said(rank).splitlines()
        assert notice.startswith(f"rank {rank} waits for rank 2{more}, since ")
        assert notice.endswith(" s; 2.2 s without a sign of work end the run (train.rank_timeout)")
        assert end.startswith("rank 2 was waited for")


def test_rank_0_that_does_not_answer_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = stranger.getsockname()
        with pytest.raises(SystemExit) as left:
            _reach(address, b"x" * 40, Patience(bound=0.3))
    assert left.value.code == LOST_EXIT
    with pytest.raises(SystemExit):  # nobody is there
        _reach(address, b"x" * 40, Patience(bound=0.3, setting="--rank_timeout"))
    first, second = capsys.readouterr().err.splitlines()
    missing = f"for rank 0, which does not answer at 127.0.0.1:{address[1]}; its log may say why; run"
    assert first.startswith(f"waited 0.3 s (train.rank_timeout) {missing}")
    assert second.startswith(f"waited 0.3 s (--rank_timeout) {missing}")


def test_a_keeper_ends_a_process_that_cannot(capfd):
    def stopped():
        tells = rank_keeper.start_keeper(3, 1.0, "train.rank_timeout", "start again", margin=0.0)
        os.write(tells, b"the store\n\n")
        os.kill(os.getpid(), signal.SIGSTOP)

    process = CONTEXT.Process(target=stopped)
    process.start()
    assert codes([process]) == [-signal.SIGKILL]
    said = (
        "rank 3 was stopped, or hangs in the store: nothing of it ran for 1 s (train.rank_timeout), so it was"
    )
    assert capfd.readouterr().err.startswith(said)


def test_a_keeper_ends_a_process_that_sigterm_does_not_reach(capfd):
    def waits():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        rank_keeper.start_keeper(3, 60.0, "train.rank_timeout", "start again", margin=1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(BUSY)

    process = CONTEXT.Process(target=waits)
    process.start()
    assert codes([process]) == [-signal.SIGKILL]
    assert capfd.readouterr().err == "terminated\n"


def test_a_keeper_leaves_a_process_that_runs_and_ends_with_it(capfd):
    def runs():
        tells = rank_keeper.start_keeper(3, 0.5, "train.rank_timeout", "start again", margin=0.0)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for _ in range(9):
            os.write(tells, b"\n")
            time.sleep(0.1)
        tell.send(children)

    heard, tell = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=runs)
    process.start()
    (keeper,) = heard.recv()
    assert codes([process]) == [0]
    end = time.monotonic() + BUSY
    while Path(f"/proc/{keeper}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{keeper}").exists()
    assert capfd.readouterr().err == ""
