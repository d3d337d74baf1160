"""Two real processes over gloo: what they compute together, and that none outlives another."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed
import pytest

from ppcoat.errors import ConfigError
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig
from ppcoat.train import ranks as module
from ppcoat.train.rank_line import _END, _FRAME, GREETING, LOST_EXIT, Line, Patience, greeting
from ppcoat.train.ranks import Ranks

SHAPES = ([3, 5], [7], [2, 2, 2])


def gradients(rank):
    """Per parameter an array, or None where the rank has no gradient: the second on rank 1, the last on
    both."""
    rng = np.random.default_rng(rank)
    drawn = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    return [drawn[0], None if rank == 1 else drawn[1], None]


def finish(processes, seconds=20):
    """Exit codes; a process that still runs after `seconds` in all has None."""
    end = time.time() + seconds
    for process in processes:
        process.join(timeout=max(0, end - time.time()))
    return [process.exitcode for process in processes]


def hear(receiver, seconds=20):
    assert receiver.poll(seconds), "the rank said nothing"
    return receiver.recv()


def work_together(ranks, tell):
    told, calls = {"rank": (ranks.rank, ranks.size, ranks.is_first)}, []
    reduce_all = paddle.distributed.all_reduce
    paddle.distributed.all_reduce = lambda *a, **k: (calls.append(a), reduce_all(*a, **k))[1]
    parameters = [paddle.create_parameter(shape, "float32") for shape in SHAPES]
    for parameter, gradient in zip(parameters, gradients(ranks.rank), strict=True):
        if gradient is not None:
            (parameter * paddle.to_tensor(gradient)).sum().backward()
    ranks.average_gradients(parameters)
    told["gradients"] = [parameter.grad.numpy() for parameter in parameters]
    told["reductions"] = len(calls)
    spoilt = np.ones(SHAPES[0], np.float32)
    spoilt[0, 0] = np.nan if ranks.rank == 1 else 1
    parameters[0].grad = paddle.to_tensor(spoilt)
    ranks.average_gradients(parameters)
    told["nan"] = np.isnan(parameters[0].grad.numpy()).sum()

    bits = np.arange(8, dtype=np.int16) - 4 + 100 * ranks.rank  # as bfloat16 some are NaN with a payload
    tensors = [paddle.to_tensor(bits).view("bfloat16"), paddle.full([2], ranks.rank + 0.5)]
    tensors.append(paddle.full([3], ranks.rank + 1.0).astype("float16"))
    ranks.broadcast(tensors)
    told["broadcast"] = [tensors[0].view("int16").numpy(), tensors[1].numpy(), tensors[2].numpy()]

    tensors = {"lora": {"a": tensors[0], "b": paddle.ones([3])}, "optimizer": {"c": tensors[0].view("uint8")}}
    given = ({"step": 7}, tensors) if ranks.is_first else (None, {})
    facts, found = ranks.hand_over(*given)
    told["handed"] = facts, [found["lora"]["a"].view("int16").numpy(), found["lora"]["b"].numpy(),
                             found["optimizer"]["c"].numpy()]  # fmt: skip
    told["bytes"] = len(ranks.from_first(b"x" * 1000 if ranks.is_first else b""))

    told["gathered"] = ranks.gather([[0.1, 0.7], [float("nan"), float("-inf")]][ranks.rank])
    told["share"] = [ranks.share([1, 2, 3, 4]), ranks.share(np.arange(6).reshape(2, 3)).tolist()]
    with pytest.raises(ConfigError, match="batch of 3 cannot be shared by 2 ranks"):
        ranks.share([1, 2, 3])
    ranks.close()
    tell(told)


def test_two_ranks_compute_together(start):
    processes, heard = start(work_together)
    first, second = hear(heard[0]), hear(heard[1])
    assert finish(processes) == [0, 0]
    assert (first["rank"], second["rank"]) == ((0, 2, True), (1, 2, False))
    drawn = [gradients(rank) for rank in (0, 1)]
    for i, shape in enumerate(SHAPES):
        both = [np.zeros(shape) if g[i] is None else g[i].astype(np.float64) for g in drawn]
        np.testing.assert_allclose(first["gradients"][i], np.mean(both, axis=0), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(first["gradients"][i], second["gradients"][i])
    assert first["reductions"] == second["reductions"] == 1
    assert first["nan"] == second["nan"] == 1
    for told in (first, second):
        np.testing.assert_array_equal(told["broadcast"][0], np.arange(8) - 4)
        np.testing.assert_array_equal(told["broadcast"][1], [0.5, 0.5])
        np.testing.assert_array_equal(told["broadcast"][2], [1, 1, 1])
        facts, found = told["handed"]
        assert facts == {"step": 7} and told["bytes"] == 1000
        bits = np.arange(8, dtype=np.int16) - 4
        for value, expected in zip(found, (bits, [1, 1, 1], bits.view(np.uint8)), strict=True):
            np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(told["gathered"], [[0.1, 0.7], [np.nan, -np.inf]])
    assert (first["share"], second["share"]) == ([[1, 2], [[0, 1, 2]]], [[3, 4], [[3, 4, 5]]])


def train(ranks, tell=None):
    """Five steps of a small regression with FP8AdamW and clipping; each rank computes on its share."""
    rng = np.random.default_rng(0)
    layer = paddle.nn.Linear(6, 4)
    for parameter in layer.parameters():
        paddle.assign(rng.standard_normal(parameter.shape).astype(np.float32), output=parameter)
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = FP8AdamW(
        1e-2, layer.parameters(), grad_clip=clip, fp8_config=FP8QuantizationConfig(block_size=16)
    )
    ranks.broadcast(layer.parameters())
    losses = []
    for _ in range(5):
        x, y = (rng.standard_normal((2, width)).astype(np.float32) for width in (6, 4))
        loss = (layer(paddle.to_tensor(ranks.share(x))) - paddle.to_tensor(ranks.share(y))).square().mean()
        loss.backward()
        losses.append(ranks.gather([float(loss)]).mean())
        ranks.average_gradients(layer.parameters())
        optimizer.step()
        optimizer.clear_grad()
    ranks.close()
    result = losses, [parameter.numpy() for parameter in layer.parameters()]
    if tell is None:
        return result
    return tell(result)


def test_two_ranks_of_batch_one_are_one_rank_of_batch_two(start):
    processes, heard = start(train)
    (losses, weights), (other_losses, other_weights) = hear(heard[0]), hear(heard[1])
    assert finish(processes) == [0, 0]
    expected_losses, expected_weights = train(Ranks())
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-6)
    assert losses == other_losses
    for weight, other, expected in zip(weights, other_weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(weight, other)


def wait_for_the_dead(ranks, tell, dying):
    ranks.barrier()
    if ranks.rank == dying:
        tell("dying")
        os.kill(os.getpid(), signal.SIGKILL)
    errors = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(errors):
        ranks.gather([1.0])
    tell((left.value.code, errors.getvalue()))


@pytest.mark.parametrize("dying", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_waits_for_a_dead_one_leaves_with_one_line(start, dying):
    advice = "give --the_flag"
    processes, heard = start(lambda ranks, tell: wait_for_the_dead(ranks, tell, dying), again=advice)
    assert hear(heard[dying]) == "dying"
    killed = time.time()
    code, said = hear(heard[1 - dying])
    assert code == LOST_EXIT
    assert said == f"rank {dying} has died and so ends this one; {advice} to go on from the checkpoint\n"
    assert time.time() - killed < 2
    assert finish(processes)[dying] == -signal.SIGKILL


@contextlib.contextmanager
def one_line_before_leaving():
    """What is said within it goes to the StringIO; it must end in LOST_EXIT after one line."""
    errors = io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stderr(errors):
        yield errors
    assert left.value.code == LOST_EXIT
    assert re.fullmatch(r"rank 1 has died.*go on from the checkpoint\n", errors.getvalue())


def notice_while_at_work(ranks, tell):
    """Rank 0 does not wait for anybody when rank 1 dies."""
    ranks.barrier()
    if ranks.rank == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    with one_line_before_leaving() as errors:
        end = time.monotonic() + 5
        while not errors.getvalue().endswith("\n") and time.monotonic() < end:
            time.sleep(0.01)
        tell(("within the time of grace", errors.getvalue()))
        ranks.barrier()
    tell("once")


def test_a_death_is_told_at_once_and_once(start):
    """A launcher may end this process before its time of grace is over, and the line would be lost."""
    _, heard = start(notice_while_at_work, grace=60)
    assert "rank 1 has died" in hear(heard[0])[1]
    assert hear(heard[0]) == "once"


def exchange_with_the_dead(ranks, tell):
    """Rank 1 dies between the meeting and the transfer, where the process group notices it first."""
    ranks.barrier()
    if ranks.rank == 1:
        ranks.barrier()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with one_line_before_leaving():
        ranks.gather([1.0])
    tell("left")


def test_a_death_in_a_transfer_is_told_as_any_other(start):
    _, heard = start(exchange_with_the_dead, grace=2)
    assert hear(heard[0]) == "left"


@pytest.mark.slow
def test_an_error_of_the_process_group_that_is_no_death_stays_what_it_is(start, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the network card is on fire")

    def work(ranks, tell):
        monkeypatch.setattr(paddle.distributed, "all_reduce", broken)
        with pytest.raises(RuntimeError, match="on fire"):
            ranks.gather([1.0])
        ranks.close()
        tell("raised")

    processes, heard = start(work)
    assert [hear(receiver) for receiver in heard] == ["raised", "raised"]
    assert finish(processes) == [0, 0]


def work_alone(ranks, tell):
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as a main thread does that waits inside nccl


def test_a_dead_rank_ends_those_that_do_not_wait_for_it(start):
    processes, _ = start(work_alone, size=3)
    assert finish(processes) == [LOST_EXIT, -signal.SIGKILL, LOST_EXIT]


def end_early(ranks, tell, close):
    ranks.barrier()
    if close:
        ranks.close()
    if ranks.rank == 0:
        time.sleep(0.8)  # rank 0 may go on alone, to write its last file


@pytest.mark.parametrize(
    ("close", "codes"), [(True, [0, 0]), pytest.param(False, [LOST_EXIT, 0], marks=pytest.mark.slow)]
)
def test_only_after_close_may_a_rank_end_alone(start, close, codes):
    processes, _ = start(lambda ranks, tell: end_early(ranks, tell, close))
    assert finish(processes) == codes


def test_close_waits_for_the_slowest(start):
    def work(ranks, tell):
        ranks.barrier()
        if ranks.is_first:
            time.sleep(0.4)
        before = time.time()
        ranks.close()
        tell(time.time() - before)

    processes, heard = start(work)
    assert hear(heard[1]) > 0.3
    assert finish(processes) == [0, 0]


def test_the_first_goes_ahead_and_the_others_follow(start, tmp_path):
    def work(ranks, tell):
        with ranks.first_ahead():
            there = (tmp_path / "written").exists()
            if ranks.is_first:
                time.sleep(0.2)
                (tmp_path / "written").touch()
        tell(there)
        ranks.close()

    processes, heard = start(work)
    assert [hear(receiver) for receiver in heard] == [False, True]
    assert finish(processes) == [0, 0]


def test_a_stranger_at_the_port_is_not_a_rank():
    server, run = socket.create_server(("127.0.0.1", 0)), bytes(16)
    address, lines = server.getsockname(), []
    line = Line(0, 2, server, run)
    for words in (greeting(b"1" * 16, 1, 2), greeting(run, 0, 2), greeting(run, 2, 2), greeting(run, 1, 3),
                  b"GET / HTTP/1.1\r\n".ljust(40), greeting(run, 1, 2)):  # fmt: skip
        lines.append(socket.create_connection(address, timeout=5))
        lines[-1].sendall(words)
    answers = [each.recv(GREETING.size) for each in lines]
    assert answers == [b""] * 5 + [greeting(run, 0, 2)]
    lines[5].sendall(_FRAME.pack(_END, 0))  # else its end would end this process
    line.end()
    assert line.own_address == "127.0.0.1" and line._peers[1].getpeername() == lines[5].getsockname()


def test_what_differs_between_ranks_is_named_on_all(start):
    def work(ranks, tell):
        ranks.agree({"train.lr": 0.1, "name": "连衣裙"})
        with pytest.raises(ConfigError) as refused:
            more = dict.fromkeys("abc"[: ranks.rank * 3], 1)
            ranks.agree({"train.lr": 0.1 * (1 + ranks.rank), **more, "same": 0})
        tell(str(refused.value))

    processes, heard = start(work)
    expected = (
        "the ranks do not start alike: train.lr is 0.1 on rank 0 and 0.2 on rank 1, a is None on rank 0 and "
        "1 on rank 1, b is None on rank 0 and 1 on rank 1, 1 more; start them all with the same settings, "
        "versions, model and pictures"
    )
    assert [hear(receiver) for receiver in heard] == [expected, expected]
    assert finish(processes) == [0, 0]  # nobody has died


def test_a_store_whose_port_is_taken_gets_another(start, monkeypatch):
    monkeypatch.setattr(module, "_store_address", lambda found=module._store_address: (held(), found())[1])
    taken = []

    def held():
        host, _, port = os.environ["PADDLE_MASTER"].rpartition(":")
        taken.append(socket.create_server((host, int(port))))

    def work(ranks, tell):
        tell((os.environ["PADDLE_MASTER"], ranks.gather([ranks.rank]).tolist()))
        ranks.close()

    _, heard = start(work)
    first, second = hear(heard[0]), hear(heard[1])
    assert first == second and first[1] == [[0], [1]]


def test_a_port_of_rank_0_that_is_taken_is_told(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", f"{address},127.0.0.1:1")
        with pytest.raises(ConfigError, match=f"cannot listen at {address} .*another program uses that port"):
            module._connect(0, 2, Patience())
    for wrong in ("", "127.0.0.1", "127.0.0.1:x"):
        monkeypatch.setenv("PADDLE_TRAINER_ENDPOINTS", wrong)
        with pytest.raises(ConfigError, match="ENDPOINTS: came '.*' for rank 0, wanted host:port"):
            module._connect(0, 2, Patience())


def test_the_network_of_an_address_has_a_name():
    assert module._interface_of("127.0.0.1") == "lo"
    assert module._interface_of("203.0.113.7") is None


def test_one_process_needs_no_group(monkeypatch):
    for name in ("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.current()
    assert ranks == Ranks(0, 1) and ranks.is_first
    assert not paddle.distributed.is_initialized()
    parameter = paddle.create_parameter([2], "float32")
    ranks.average_gradients([parameter])
    ranks.broadcast([parameter])
    ranks.barrier()
    ranks.close()
    assert parameter.grad is None
    with ranks.first_ahead():
        assert ranks.gather([0.1, 2]).tolist() == [[0.1, 2]]
    assert ranks.share([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("2", "2", "PADDLE_TRAINER_ID=2"),
        ("0", "two", "came 'two'"),
        ("-1", "2", "came '-1'"),
        ("0", "0", "=0"),
    ],
)
def test_wrong_numbers_are_refused(monkeypatch, rank, size, message):
    monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", size)
    with pytest.raises(ConfigError, match=message):
        Ranks.current()


def test_ranks_with_one_gpu_between_them_are_refused(monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(ConfigError, match=r"device: came gpu:1 with 2 ranks, wanted gpu or auto.*--gpus"):
        Ranks.current("gpu:1")


@pytest.mark.slow
def test_ranks_meet_after_longer_than_gloo_waits(start):
    def work(ranks, tell):
        if ranks.is_first:
            time.sleep(33)  # gloo alone raises after 30
        tell(ranks.gather([ranks.rank]).mean())
        ranks.close()

    processes, heard = start(work)
    assert [hear(receiver, 60) for receiver in heard] == [0.5, 0.5]
    assert finish(processes) == [0, 0]


LAUNCHED = """
import os, signal, sys, time
from ppcoat.train.ranks import Ranks
ranks = Ranks.current()
for step in range(10**6):
    ranks.gather([step])
    if step == 50 and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_launcher_ends_when_a_rank_is_killed(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED)
    options = ["--nproc_per_node", "2", "--log_dir", tmp_path / "log"]
    command = [sys.executable, "-m", "paddle.distributed.launch", *options, script]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True)
    assert done.returncode != 0
    assert "rank 1 has died" in (tmp_path / "log" / "workerlog.0").read_text()
