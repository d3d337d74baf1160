"""Moment codecs and one step of the flat AdamW against float64."""

import numpy as np
import paddle
import pytest

from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, adamw_step, decode_moments, dither, encode_moments
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
    """Encoding a decoded moment must not drift away: k settles, and then every bit stays."""
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal([32, 128]).astype("float32"))
    codec = MomentCodec(fmt, expand, positive=False)
    once = codec.decode(codec.encode(x))
    often = once
    for _ in range(20):
        often = codec.decode(codec.encode(often))
    error = float(paddle.square(often - x).mean() / paddle.square(once - x).mean())
    assert error < 2.5
    before, after = codec.encode(often), codec.encode(codec.decode(codec.encode(often)))
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_error_of_the_first_moment_does_not_grow_with_the_scales_in_its_group(fmt):
    """Gradient scales exp(3 z): m is stored relative to sqrt(v), so every element has the same small error
    in the update, however small its gradients are."""
    rng = np.random.default_rng(1)
    scale = np.exp(3 * rng.standard_normal([32, 128]))
    m, v = (scale * rng.standard_normal([32, 128])).astype("float32"), np.square(scale).astype("float32")
    codecs = (MomentCodec(fmt, True, positive=False), MomentCodec(fmt, True, positive=True))
    decoded = decode_moments(encode_moments(paddle.to_tensor(m), paddle.to_tensor(v), codecs), codecs)[0]
    error = (decoded.numpy() - m) / scale
    for part in (scale < np.median(scale), scale >= np.median(scale)):
        assert np.sqrt(np.mean(error[part] ** 2)) < 0.01


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_moments_forget_a_gradient_that_vanished(fmt, beta1):
    """Element 3 gets no gradient after step 20. Rounded to nearest, its v would stay for ever where it was
    relative to the others, and m would stick at a small code: a step in a direction nobody asks for."""
    rng = np.random.default_rng(2)
    codecs = (MomentCodec(fmt, True, positive=False), MomentCodec(fmt, True, positive=True))
    zeros = paddle.zeros([4, 128])
    states = encode_moments(zeros if beta1 else None, zeros.clone(), codecs)
    states["beta_powers"] = {name: paddle.ones([1], "float64") for name in ("beta1", "beta2")}
    states["count"] = {name: paddle.zeros([1], dtype="int64") for name in ("steps", "skipped")}
    hyper = AdamWHyper(lr=0.0, weight_decay=0.0, beta1=beta1, beta2=0.99, epsilon=1e-8)
    exact = np.zeros([4, 128])
    for step in range(200):
        grad = rng.standard_normal([4, 128]).astype("float32")
        grad[:, 3] *= step < 20
        exact = 0.99 * exact + 0.01 * grad.astype(np.float64) ** 2
        adamw_step(paddle.ones([4, 128]), paddle.to_tensor(grad), states, codecs, hyper, TRUE)
    m, v = decode_moments(states, codecs)
    np.testing.assert_allclose(np.log(v.numpy()[:, 3] / exact[:, 3]), 0, atol=0.35)
    if beta1:
        assert not m.numpy()[:, 3].any()


def test_dither_fills_the_interval_evenly_and_depends_on_the_step_alone():
    drawn = np.stack([dither(paddle.to_tensor([step]), 128).numpy()[0] for step in range(1000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    for edge in (0.1, 0.37, 0.8):  # a sequence of 1000 even draws misses by at most a few
        assert np.abs((drawn < edge).sum(0) - 1000 * edge).max() <= 4
    assert len(np.unique(drawn[17])) == 128
    np.testing.assert_array_equal(
        dither(paddle.to_tensor([2**40]), 128), dither(paddle.to_tensor([2**40]), 128)
    )


def step(grad: np.ndarray, beta1: float, finite: paddle.Tensor) -> dict[str, np.ndarray]:
    codec = MomentCodec(None, False, False)
    hyper = AdamWHyper(lr=0.01, weight_decay=0.1, beta1=beta1, beta2=0.5, epsilon=1e-3)
    param = paddle.ones([2, 4])
    states = {
        "m2": codec.zeros(2, 4),
        "beta_powers": {name: paddle.ones([1], "float64") for name in ("beta1", "beta2")},
    }
    states["count"] = {name: paddle.zeros([1], dtype="int64") for name in ("steps", "skipped")}
    if beta1:
        states["m1"] = codec.zeros(2, 4)
    for _ in range(2):
        adamw_step(param, paddle.to_tensor(grad), states, (codec, codec), hyper, finite)
    m = states["m1"]["values"].numpy() if beta1 else None
    count = {name: int(number) for name, number in states["count"].items()}
    return {"param": param.numpy(), "m": m, "v": states["m2"]["values"].numpy(), "count": count}


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
    assert got["count"] == {"steps": 2, "skipped": 0}


def test_a_step_that_is_not_finite_changes_nothing():
    got = step(np.full([2, 4], np.nan, dtype="float32"), 0.875, FALSE)
    assert (got["param"] == 1).all() and not got["m"].any() and not got["v"].any()
    assert got["count"] == {"steps": 0, "skipped": 2}
