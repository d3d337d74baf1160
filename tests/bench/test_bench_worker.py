"""MeasuredTraining: the two variants see the same numbers, and its byte counts are those of the layouts."""

import dataclasses
import multiprocessing
import threading

import numpy as np
import paddle
import pytest

from ppcoat.bench import bench_worker
from ppcoat.bench.bench_worker import BenchmarkCase, MeasuredTraining, draw_batch, serve
from ppcoat.errors import ConfigError
from ppcoat.optim import FP8AdamW

TINY = BenchmarkCase(
    hidden_size=64, num_layers=2, batch_size=2, tokens=16, text_tokens=8, rank=4, device="cpu"
)
# Inputs plus outputs of the Linears that have a LoRA, at width d = 64. Double block: 8 times d -> d, 2 times
# each d -> 4d and 4d -> d; single block: 3 times d -> d, d -> 4d, 5d -> d.
LORA_WIDTHS = 64 * (8 * 2 + 4 * 5 + 3 * 2 + 5 + 6)


@pytest.fixture
def host_as_it_is(monkeypatch):
    monkeypatch.setattr(bench_worker, "tune_host", lambda: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 100}, ["hidden_size", "64", "100", "nearest is 128"]),
        ({"hidden_size": 0}, ["hidden_size", "at least 1", "0"]),
        ({"num_layers": 0}, ["num_layers", "at least 1"]),
        ({"batch_size": -1}, ["batch_size", "-1"]),
        ({"tokens": 0}, ["tokens"]),
        ({"rank": 0}, ["rank"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"policy": "coat+recompte"}, ["coat+recompte", "coat+recompute"]),
        ({"policy": "coat+recompute", "full_training": True}, ["coat+recompute", "full_training"]),
    ],
)
def test_wrong_values_are_named(change, words):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(TINY, **change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("layers", "blocks"), [(1, (0, 1)), (2, (1, 1)), (8, (3, 5)), (57, (19, 38))])
def test_a_third_of_the_blocks_are_double(layers, blocks):
    assert dataclasses.replace(TINY, num_layers=layers).blocks == blocks


@pytest.mark.parametrize(
    ("tokens", "pixels"), [(256, (256, 256)), (4096, (1024, 1024)), (12, (64, 48)), (7, (112, 16))]
)
def test_tokens_are_a_picture(tokens, pixels):
    assert dataclasses.replace(TINY, tokens=tokens).picture_size == pixels


def test_a_batch_depends_on_the_generator_alone():
    first, second = (draw_batch(TINY, np.random.default_rng([0, 3]), "float32") for _ in range(2))
    assert list(first["latents"].shape) == [2, 16, 8, 8]
    assert list(first["prompt_embeds"].shape) == [2, 8, 4096] and list(first["pooled"].shape) == [2, 768]
    assert all(np.array_equal(first[name].numpy(), second[name].numpy()) for name in first)


def test_lora_variants_start_equal_and_count_what_they_hold():
    standard = MeasuredTraining(TINY)
    coat = MeasuredTraining(dataclasses.replace(TINY, fp8_states=True, policy="coat"))
    weights = zip(standard.model.parameters(), coat.model.parameters(), strict=True)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in weights)
    losses = [[training.step().loss for _ in range(4)] for training in (standard, coat)]
    assert losses[0][0] == losses[1][0]  # the forward pass is exact
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
    assert losses[0][1:] != losses[1][1:]  # the updates are not

    a, b = standard.result(), coat.result()
    trained = standard.facts()["model"]["trained_parameters"]
    assert trained == coat.facts()["model"]["trained_parameters"] == TINY.rank * LORA_WIDTHS
    assert a["optimizer_bytes"] == 8 * trained
    assert b["optimizer_bytes"] == trained * (2 + 2 * 5 / 128)  # codes, amax float32 and k per 128
    assert b["bytes_kept"] < a["bytes_kept"] and b["bytes_kept_bf16"] < a["bytes_kept_bf16"]
    assert a["bytes_kept"] == a["bytes_unpacked"]
    # not above 0 for certain: so small a model may fit into memory that this process had used before
    assert 0 <= a["growth_bytes"] == a["peak_bytes"] - a["loaded_bytes"]


def test_full_training_trains_every_parameter():
    case = dataclasses.replace(TINY, full_training=True, fp8_states=True, policy="coat", tokens=64)
    training = MeasuredTraining(case)
    before = [p.numpy() for p in training.model.parameters()]
    training.step()
    model = training.facts()["model"]
    assert model["trained_parameters"] == model["parameters"]
    assert type(training.optimizer) is FP8AdamW
    assert not any(
        np.array_equal(old, new.numpy()) for old, new in zip(before, training.model.parameters(), strict=True)
    )
    result = training.result()
    assert 2 < result["optimizer_bytes_per_parameter"] < 2.3
    assert result["bytes_kept"] < result["bytes_unpacked"]


def test_only_the_first_step_of_the_standard_variant_has_hooks(monkeypatch):
    training, entered = MeasuredTraining(TINY), []
    make = training.coat.saved_tensors
    monkeypatch.setattr(training.coat, "saved_tensors", lambda: entered.append(1) or make())
    kept = [(training.step(), training.result()["bytes_kept"])[1] for _ in range(3)]
    assert len(entered) == 1
    assert kept[0] > 0 and kept == [kept[0]] * 3


def served(case):
    """serve() in a thread -> our end of the pipe."""
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, case), daemon=True)
    thread.start()
    return ours, thread


def test_serve_answers_facts_steps_and_result(host_as_it_is):
    pipe, thread = served(TINY)
    assert pipe.recv()["model"]["double_blocks"] == 1
    pipe.send(2)
    records = pipe.recv()
    assert len(records) == 2 and records[0].started_at < records[1].started_at
    assert not pipe.poll(0.1)  # it waits for its turn
    pipe.send(0)
    assert pipe.recv()["optimizer"] == "AdamW"
    thread.join(10)
    assert not thread.is_alive()


def test_serve_sends_what_went_wrong(host_as_it_is, monkeypatch):
    pipe, _ = served(dataclasses.replace(TINY, device="gpu:99"))
    assert isinstance(error := pipe.recv(), ConfigError) and "gpu:99" in str(error)

    def full(_):
        raise MemoryError("a page\nof text")

    monkeypatch.setattr(bench_worker, "MeasuredTraining", full)
    pipe, _ = served(TINY)
    assert isinstance(error := pipe.recv(), MemoryError) and "\n" not in str(error)


def test_serve_ends_when_the_parent_is_gone(host_as_it_is):
    pipe, thread = served(TINY)
    pipe.recv()
    pipe.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_policy_reaches_the_trainer():
    for policy in ("none", "coat", "coat+recompute", "coat+recompute+attention"):
        coat = bench_worker.coat_of(dataclasses.replace(TINY, policy=policy))
        assert coat.policy == policy
        parameter = paddle.create_parameter([4, 128], "float32")
        assert type(coat.create_optimizer([parameter])) is paddle.optimizer.AdamW  # fp8_states is off
