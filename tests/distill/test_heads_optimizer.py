"""Heads updated one after the other: as one optimizer over all of them would, and nothing is kept."""

import numpy as np
import paddle
import pytest

from ppcoat.distill.trainer import HeadsOptimizer
from ppcoat.optim import FP8AdamW

WIDTHS = (40, 24, 56)


@pytest.fixture
def heads():
    """build() -> the same small heads every time."""

    def build():
        paddle.seed(0)
        return [paddle.nn.Linear(width, 8) for width in WIDTHS]

    return build


def give_gradients(heads, step, size=1.0):
    rng = np.random.default_rng(step)
    for head in heads:
        x = paddle.to_tensor(rng.standard_normal((5, head.weight.shape[0]), dtype=np.float32) * size)
        head(x).square().sum().backward()


def fp8(parameters):
    return FP8AdamW(1e-2, parameters=parameters, beta1=0.0, weight_decay=0.1)


def plain(parameters):
    return paddle.optimizer.AdamW(1e-2, parameters=parameters, weight_decay=0.1)


@pytest.mark.parametrize("make", [fp8, plain])
@pytest.mark.parametrize("size", [0.01, 10.0], ids=["below the bound", "clipped"])
def test_steps_are_those_of_one_optimizer(heads, make, size):
    """Clipping is by the norm of all heads together, as paddle.nn.ClipGradByGlobalNorm does it."""
    apart, together = heads(), heads()
    mine = HeadsOptimizer(apart, make, max_grad_norm=0.5)
    whole = make([p for head in together for p in head.parameters()])
    clip = paddle.nn.ClipGradByGlobalNorm(0.5)
    for step in range(4):
        give_gradients(apart, step, size)
        give_gradients(together, step, size)
        mine.step()
        pairs = clip([(p, p.grad) for head in together for p in head.parameters()])
        for parameter, gradient in pairs:
            parameter.grad.set_value(gradient)
        whole.step()
        whole.clear_grad()
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_allclose(one.weight.numpy(), other.weight.numpy(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(one.bias.numpy(), other.bias.numpy(), rtol=0, atol=2e-5)
    assert np.abs(apart[0].weight.numpy() - heads()[0].weight.numpy()).max() > 1e-2


def test_gradients_are_given_back(heads):
    apart = heads()
    optimizer = HeadsOptimizer(apart, fp8)
    give_gradients(apart, 0)
    optimizer.step()
    assert all(p.grad is None for head in apart for p in head.parameters())
    give_gradients(apart, 1)
    optimizer.clear_grad()
    assert all(p.grad is None for head in apart for p in head.parameters())


@pytest.mark.parametrize("make", [fp8, plain])
def test_a_state_goes_on_bit_for_bit(heads, make):
    first = heads()
    optimizer = HeadsOptimizer(first, make)
    give_gradients(first, 0)
    optimizer.step()
    state = {
        name: v.clone() if isinstance(v, paddle.Tensor) else v for name, v in optimizer.state_dict().items()
    }
    values = [p.clone() for head in first for p in head.parameters()]
    give_gradients(first, 1)
    optimizer.step()
    wanted = [p.numpy() for head in first for p in head.parameters()]
    for parameter, value in zip([p for head in first for p in head.parameters()], values, strict=True):
        parameter.set_value(value)
    optimizer.set_state_dict(state)
    give_gradients(first, 1)
    optimizer.step()
    for parameter, value in zip([p for head in first for p in head.parameters()], wanted, strict=True):
        np.testing.assert_array_equal(parameter.numpy(), value)


def test_bytes_are_those_of_all_heads(heads):
    whole = fp8([p for head in heads() for p in head.parameters()])
    assert HeadsOptimizer(heads(), fp8).state_bytes() == whole.state_bytes()
