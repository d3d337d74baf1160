"""Moment codecs and one step of the flat AdamW against float64."""

import numpy as np
import paddle
import pytest

from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, adamw_step
from ppcoat.fp8.formats import E4M3, E5M2

TRUE, FALSE = paddle.to_tensor([True]), paddle.to_tensor([False])


@pytest.mark.parametrize("fmt", [E4M3, E5M2, None])
@pytest.mark.parametrize("expand", [True, False])
def test_a_second_moment_that_is_not_zero_stays_so(fmt, expand):
    """Decoded as 0, it would turn the update m / (sqrt(v) + eps) into a spike."""
    v = paddle.to_tensor(np.float32([[1.0] * 107 + [1e-30] + [0.0] * 20]))
    codec = MomentCodec(fmt, expand, positive=True)
    decoded = codec.decode(codec.encode(v)).numpy()[0]
    assert (decoded[:108] > 0).all() and not decoded[108:].any()


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("expand", [True, False])
def test_storing_again_what_was_stored_changes_little(fmt, expand):
    """Encoding a decoded moment must not drift away with every step."""
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([32, 128]).astype("float32"))
    codec = MomentCodec(fmt, expand, positive=False)
    once = codec.decode(codec.encode(x))
    often = once
    for _ in range(20):
        often = codec.decode(codec.encode(often))
    error = float(paddle.square(often - x).mean() / paddle.square(once - x).mean())
    assert error < 1.5


def step(grad: np.ndarray, beta1: float, finite: paddle.Tensor) -> dict[str, np.ndarray]:
    codec = MomentCodec(None, False, False)
    hyper = AdamWHyper(lr=0.01, weight_decay=0.1, beta1=beta1, beta2=0.5, epsilon=1e-3)
    param = paddle.ones([2, 4])
    m, v = codec.zeros(2, 4), codec.zeros(2, 4)
    powers = {"beta1": paddle.ones([1]), "beta2": paddle.ones([1])}
    for _ in range(2):
        moment1 = m if beta1 else None
        adamw_step(param, paddle.to_tensor(grad), moment1, v, powers, (codec, codec), hyper, finite)
    return {"param": param.numpy(), "m": m["values"].numpy(), "v": v["values"].numpy()}


@pytest.mark.parametrize("beta1", [0.875, 0.0])
def test_two_steps_equal_the_published_formula_in_float64(beta1):
    grad = np.linspace(-2, 1, 8).reshape(2, 4)
    param, m, v = np.ones([2, 4]), 0.0, 0.0
    for t in (1, 2):
        m, v = beta1 * m + (1 - beta1) * grad, 0.5 * v + 0.5 * grad**2
        param = param * (1 - 0.01 * 0.1) - 0.01 * m / (1 - beta1**t) / (np.sqrt(v / (1 - 0.5**t)) + 1e-3)
    got = step(grad.astype("float32"), beta1, TRUE)
    np.testing.assert_allclose(got["param"], param, rtol=1e-6)
    np.testing.assert_allclose(got["v"], v, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    got = step(np.full([2, 4], np.nan, dtype="float32"), 0.875, FALSE)
    assert (got["param"] == 1).all() and not got["m"].any() and not got["v"].any()
