"""The loop's own parts: optimizer state under lasting names, signals, checkpointing, memory lines."""

import os
import signal

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file

from ppcoat.config.schema import CoatOptimizerConfig
from ppcoat.train.coat import COATConfig, COATTrainer
from ppcoat.train.flux_lora import train_flux_lora
from ppcoat.train.trainer import (
    Trainer,
    _FinishStepOnSignal,
    optimizer_state_bytes,
    optimizer_tensors,
    set_optimizer_tensors,
)

OFF, FP8 = COATConfig(enabled=False), COATConfig(optimizer=CoatOptimizerConfig(block_size=16))


class Regression:
    """A layer of 4 -> 3, its optimizer, and steps on fixed data; automatic names are new each time."""

    def __init__(self, config):
        layer = nn.Linear(4, 3)
        start = np.random.default_rng(0)
        for parameter in layer.parameters():
            parameter.set_value(start.standard_normal(parameter.shape, dtype=np.float32))
        self.layer = layer
        self.parameters = {"block.weight": layer.weight, "block.bias": layer.bias}
        self.optimizer = COATTrainer(config).create_optimizer(self.parameters.values(), lr=1e-2)

    def steps(self, count, seed):
        x = paddle.to_tensor(np.random.default_rng(seed).standard_normal((6, 4), dtype=np.float32))
        for _ in range(count):
            (self.layer(x) - 2).square().mean().backward()
            self.optimizer.step()
            self.optimizer.clear_grad()

    def values(self):
        return [parameter.numpy() for parameter in self.parameters.values()]


@pytest.mark.parametrize("config", [OFF, FP8], ids=["adamw", "fp8"])
def test_optimizer_state_moves_to_parameters_of_other_automatic_names(config):
    first, second = Regression(config), Regression(config)
    assert first.layer.weight.name != second.layer.weight.name
    first.steps(3, seed=1)
    tensors = optimizer_tensors(first.optimizer, first.parameters)
    assert tensors and not any(first.layer.weight.name in name for name in tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, parameter in second.parameters.items():
        parameter.set_value(first.parameters[name].numpy())
    set_optimizer_tensors(second.optimizer, tensors, second.parameters)
    first.steps(4, seed=2)
    second.steps(4, seed=2)
    for ours, theirs in zip(first.values(), second.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_names_of_adamw_moments_are_paths():
    run = Regression(OFF)
    run.steps(1, seed=1)
    names = set(optimizer_tensors(run.optimizer, run.parameters))
    assert {name.partition("|")[0] for name in names} == {"block.weight", "block.bias"}
    assert {name.partition("|")[2].split("_")[0] for name in names} == {
        "moment1",
        "moment2",
        "beta1",
        "beta2",
    }


def test_without_the_moments_the_next_step_is_another_one():
    """So that the round trip above could fail."""
    first, second = Regression(OFF), Regression(OFF)
    first.steps(3, seed=1)
    for name, parameter in second.parameters.items():
        parameter.set_value(first.parameters[name].numpy())
    first.steps(1, seed=2)
    second.steps(1, seed=2)
    assert not np.array_equal(first.values()[0], second.values()[0])


def test_optimizer_bytes_are_those_of_the_moments():
    """15 values: two float32 moments each; in FP8 a byte each in two groups of 16 (one per parameter), with a
    float32 scale and a one-byte exponent per group."""
    plain, packed = Regression(OFF), Regression(FP8)
    plain.steps(1, seed=1)
    packed.steps(1, seed=1)
    assert optimizer_state_bytes(plain.optimizer) == 2 * 15 * 4
    assert optimizer_state_bytes(packed.optimizer) == 2 * 2 * (16 + 4 + 1)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def usual_ctrl_c():
    """Python's own handler, also where the tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signal_guard_notes_the_first_signal_and_hands_back_the_handlers(usual_ctrl_c):
    before = handlers()
    with _FinishStepOnSignal() as stop:
        assert handlers() != before and not stop.signal
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert handlers() == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_signal_guard_hands_back_the_handlers_after_an_error():
    before = handlers()
    with pytest.raises(RuntimeError, match="in a step"), _FinishStepOnSignal():
        raise RuntimeError("in a step")
    assert handlers() == before


def test_ctrl_c_finishes_the_step_saves_and_leaves_with_130(make_config, monkeypatch, capfd):
    config, before, step = make_config("save.save_every=100"), handlers(), Trainer.train_step

    def interrupted(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Trainer, "train_step", interrupted)
        train_flux_lora(config)
    assert stopped.value.code == 130
    assert handlers() == before
    assert (config.run_dir / "checkpoints" / "000000001").is_dir()
    assert "stopped at step 1; run the same command again" in capfd.readouterr().err
    assert len(train_flux_lora(config).losses) == 3
    assert "resuming from" in capfd.readouterr().out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_memory_not_numbers(make_config, dropout):
    # With its usual epsilon AdamW makes a whole step of any gradient, even of one that is all rounding.
    common = ("coat.enabled=false", f"network.dropout={dropout}", "train.steps=3", "train.epsilon=1e-6")
    plain = train_flux_lora(make_config("name=plain", *common))
    again = train_flux_lora(make_config("name=again", "train.gradient_checkpointing=true", *common))
    np.testing.assert_allclose(again.losses, plain.losses, atol=1e-5)
    wanted = load_file(plain.lora_file)
    for name, value in load_file(again.lora_file).items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, err_msg=name)


def test_gradient_checkpointing_with_coat_keeps_fp8_block_inputs_only(make_config):
    kept = train_flux_lora(make_config("name=kept", "train.steps=2"))
    again = train_flux_lora(make_config("name=again", "train.gradient_checkpointing=true", "train.steps=2"))
    assert 0 < again.bytes_kept < kept.bytes_kept
    np.testing.assert_allclose(again.losses, kept.losses, rtol=0.02)  # blocks run again from FP8 inputs
    assert again.optimizer_bytes == kept.optimizer_bytes > 0


def test_memory_lines_come_only_when_asked_for(make_config, capsys):
    train_flux_lora(make_config("name=quiet", "train.steps=1"))
    assert "before_forward" not in capsys.readouterr().out
    train_flux_lora(make_config("name=loud", "train.steps=1", "coat.memory.log_memory_stats=true"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    stages = ["before_forward", "after_forward", "after_backward", "after_optimizer_step"]
    assert [line.split("]")[0][1:] for line in lines] == stages
    assert all("step 1: resident" in line for line in lines)
