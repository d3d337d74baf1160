"""Optimizer state under names that last, and its bytes."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.coat import COATConfig, COATTrainer
from ppcoat.config.schema import CoatOptimizerConfig
from ppcoat.train.run_state import optimizer_state_bytes, optimizer_tensors, set_optimizer_tensors

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
