"""The watch over ranks: processes with connections and no process group, a bound of a second."""

import multiprocessing
import os
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


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """lines(work, ...) -> (processes, said): each process runs its work(line); said(rank) is what it printed.
    A work that is None is of a rank that never comes."""
    started = []
    monkeypatch.setattr(rank_line, "_GRACE_SECONDS", 0.2)

    def lines(*works, **patience):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", ours)

        def run(rank):
            sys.stderr = open(tmp_path / f"said.{rank}", "w", buffering=1)  # noqa: SIM115
            works[rank](_connect(rank, len(works), Patience(**{"bound": BOUND, **patience})))

        for rank, work in enumerate(works):
            process = CONTEXT.Process(target=run, args=(rank,))
            if work is not None:
                process.start()
            started.append(process)
        return started, lambda rank: (tmp_path / f"said.{rank}").read_text()

    yield lines
    for process in started:
        if process.pid is not None:
            process.kill()


def codes(processes):
    end = time.monotonic() + BUSY
    for process in processes:
        if process.pid is not None:
            process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def meets(line):
    for _ in range(2):
        line.meet()
    line.end()


def stops_then(number):
    def work(line):
        line.meet()
        os.kill(os.getpid(), number)
        meets(line)

    return work


def hangs(line):
    line.meet()
    threading.Event().wait()


def test_ranks_meet_and_exchange_texts(lines):
    def work(line):
        line.meet()
        told = line.exchange(f"rank {line._rank}, a 连衣裙")
        line.end()
        sys.exit(told != ["rank 0, a 连衣裙", "rank 1, a 连衣裙", "rank 2, a 连衣裙"])

    processes, said = lines(work, work, work)
    assert codes(processes) == [0, 0, 0], said(0)


@pytest.mark.parametrize("silent", [0, 2])
def test_a_stopped_rank_ends_the_others_and_itself_when_it_wakes(lines, silent):
    works = [meets, meets, meets]
    works[silent] = stops_then(signal.SIGSTOP)
    processes, said = lines(*works)
    others = [rank for rank in range(3) if rank != silent]
    assert codes([processes[rank] for rank in others]) == [LOST_EXIT, LOST_EXIT]
    for rank in others:
        assert said(rank).startswith(SILENT.format(silent)), rank
        assert said(rank).count("\n") == 1
    os.kill(processes[silent].pid, signal.SIGCONT)
    assert codes(processes) == [LOST_EXIT] * 3
    assert "has died" in said(silent) or f"the others have waited 1 s for this rank, {silent}" in said(silent)


def test_a_rank_that_hangs_is_told_where_it_stood(lines):
    processes, said = lines(meets, hangs)
    assert codes(processes) == [LOST_EXIT, LOST_EXIT]
    assert said(0).startswith(SILENT.format(1))
    assert "the others have waited 1 s for this rank, 1, and ended; it stood in threading.py:" in said(1)


def test_a_rank_at_work_is_waited_for(lines):
    def works_on(line):
        end = time.monotonic() + 3 * BOUND
        while time.monotonic() < end:
            time.sleep(0.05)  # where it is nearly always seen
        meets(line)

    def stands(line):
        time.sleep(3 * BOUND)
        meets(line)

    processes, said = lines(works_on, meets)
    assert codes(processes) == [0, 0], said(1)
    processes, said = lines(stands, meets)
    assert codes(processes[2:]) == [LOST_EXIT, LOST_EXIT]
    assert said(1).startswith(SILENT.format(0))


def test_ranks_that_wait_at_different_places_end(lines):
    processes, said = lines(meets, lambda line: line.exchange("x"))
    assert codes(processes) == [LOST_EXIT, LOST_EXIT]
    assert said(0).startswith(SILENT.format(1))


def test_who_does_not_come_is_named(lines):
    processes, said = lines(meets, meets, None)
    assert codes(processes)[:2] == [LOST_EXIT, LOST_EXIT]
    assert said(0).startswith(
        "waited 1 s for rank 2, which has not come (train.rank_timeout); its log may say"
    )
    assert said(1).startswith(SILENT.format(2))


def test_rank_0_that_does_not_answer_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = stranger.getsockname()
        with pytest.raises(SystemExit) as left:
            _reach(address, b"x" * 40, Patience(bound=0.5))
    assert left.value.code == LOST_EXIT
    with pytest.raises(SystemExit):
        _reach(address, b"x" * 40, Patience(bound=0.5, setting="--rank_timeout"))
    first, second = capsys.readouterr().err.splitlines()
    port = address[1]
    assert first.startswith(
        f"waited 0.5 s (train.rank_timeout) for rank 0, which does not answer at 127.0.0.1:{port}"
    )
    assert "0.5 s (--rank_timeout)" in second


def test_a_long_wait_is_told_once_before_its_end(lines, monkeypatch):
    monkeypatch.setattr(rank_line, "NOTICE_SECONDS", 0.5)
    processes, said = lines(meets, meets, stops_then(signal.SIGSTOP), bound=2.0)
    assert codes(processes[:2]) == [LOST_EXIT] * 2
    for rank, start in (
        (0, "rank 0 waits for rank 2, of which there is no sign"),
        (1, "rank 1 waits for rank 2"),
    ):
        first, second = said(rank).splitlines()
        assert first.startswith(f"{start}, since")
        assert first.endswith("; 2 s without a sign of work end the run (train.rank_timeout)")
        assert second.startswith("rank 2 was waited for")


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


def test_a_keeper_leaves_a_process_that_runs_and_ends_with_it(capfd):
    def runs():
        tells = rank_keeper.start_keeper(3, 0.5, "train.rank_timeout", "start again", margin=0.0)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for _ in range(20):
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
