"""Norms for blocks, references and kernels: against autograd in float64, from floats and from FP8."""

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from ppcoat.fp8 import norm, quantize
from ppcoat.fp8.formats import E4M3, E5M2, Groups

assert norm.modulated_norm.name == "modulated_norm"
EPSILON = 1e-6


def random(shape, seed, size=1.0, offset=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size + offset).astype(np.float32)


def modulated(shift, scale):
    """The formula, for tensors of any dtype."""
    shift, scale = (paddle.to_tensor(t.astype(np.float64)) for t in (shift, scale))
    return lambda x: F.layer_norm(x, x.shape[-1:], epsilon=EPSILON) * (1 + scale) + shift


def close(got, want, roundings=64):
    """Within so many roundings of float32 of the row's largest number."""
    allowed = roundings * 2.0**-24 * np.abs(want).max(-1, keepdims=True) + 1e-30
    assert (np.abs(got.astype("float32").numpy() - want) <= allowed).all()


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 2, 300), (3, 1, 5), (1, 1, 1)])
def test_modulated_norm_and_its_gradient(shape, run, in_float64):
    x, dy = random(shape, 0, 3, 1), random(shape, 1)
    shift, scale = (random([shape[0], 1, shape[2]], seed) for seed in (2, 3))
    value, gradient = in_float64(modulated(shift, scale), x, dy)
    x, shift, scale, dy = (paddle.to_tensor(t) for t in (x, shift, scale, dy))
    close(run("modulated_norm")(x, shift, scale), value)
    if shape[-1] > 1:
        close(run("modulated_norm_grad")(x, scale, dy), gradient, 256)


@pytest.mark.parametrize(("fmt", "group"), [(E4M3, 16), (E5M2, 48), (E4M3, None), (E4M3, 7)])
def test_from_codes_it_is_that_of_the_values_they_decode_to(fmt, group, run, in_float64):
    x, dy = random([2, 2, 40], 0, 3), random([2, 2, 40], 1)
    shift, scale = random([2, 1, 40], 2), random([2, 1, 40], 3)
    codes, code_scale = quantize.quantize(paddle.to_tensor(x), fmt, group)
    numpy_format = ml_dtypes.float8_e4m3fn if fmt is E4M3 else ml_dtypes.float8_e5m2
    factors = code_scale.numpy().astype(np.float64)
    if group is not None:
        factors = np.repeat(factors, group, axis=-1)[..., :40]
    values = codes.numpy().view(numpy_format).astype(np.float64) * factors
    value, gradient = in_float64(modulated(shift, scale), values, dy)
    groups = Groups(code_scale, fmt, group)
    shift, scale, dy = (paddle.to_tensor(t) for t in (shift, scale, dy))
    close(run("modulated_norm")(codes, shift, scale, groups), value)
    close(run("modulated_norm_grad")(codes, scale, dy, groups), gradient)


def rms_normalised(weight, scale, epsilon):
    """The formula, for tensors of any dtype."""
    factor = paddle.to_tensor(weight.astype(np.float64) * (1.0 if scale is None else 1.0 + scale))
    return lambda x: x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * factor


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 2, 300), (3, 1, 5)])
def test_rms_norm_and_its_gradient(shape, epsilon, modulated, run, in_float64):
    x, dy, weight = random(shape, 0, 3, 1), random(shape, 1), random(shape[-1:], 2)
    scale = random([shape[0], 1, shape[2]], 3) if modulated else None
    value, gradient = in_float64(rms_normalised(weight, scale, epsilon), x, dy)
    x, weight, dy = (paddle.to_tensor(t) for t in (x, weight, dy))
    scale = None if scale is None else paddle.to_tensor(scale)
    close(run("rms_norm")(x, weight, scale, epsilon), value)
    close(run("rms_norm_grad")(x, weight, scale, dy, epsilon), gradient, 256)


@pytest.mark.parametrize(("fmt", "group"), [(E4M3, 16), (E5M2, 48), (E4M3, None), (E4M3, 7)])
def test_rms_norm_from_codes_is_that_of_the_values_they_decode_to(fmt, group, run, in_float64):
    x, dy = random([2, 2, 40], 0, 3), random([2, 2, 40], 1)
    weight, scale = random([40], 2), random([2, 1, 40], 3)
    codes, code_scale = quantize.quantize(paddle.to_tensor(x), fmt, group)
    values = quantize.dequantize(codes, code_scale, fmt, group).numpy()
    value, gradient = in_float64(rms_normalised(weight, scale, EPSILON), values, dy)
    groups = Groups(code_scale, fmt, group)
    weight, scale, dy = (paddle.to_tensor(t) for t in (weight, scale, dy))
    close(run("rms_norm")(codes, weight, scale, groups=groups), value)
    close(run("rms_norm_grad")(codes, weight, scale, dy, groups=groups), gradient, 256)


def test_rms_norm_of_heads_and_under_autograd(run, in_float64):
    """Any number of axes; the reference has a gradient of its own, which is the closed form."""
    x, dy, weight = random([2, 3, 4, 16], 0), random([2, 3, 4, 16], 1), random([16], 2)
    value, gradient = in_float64(rms_normalised(weight, None, EPSILON), x, dy)
    x, dy, weight = (paddle.to_tensor(t) for t in (x, dy, weight))
    close(run("rms_norm")(x, weight), value)
    close(run("rms_norm_grad")(x, weight, None, dy), gradient, 256)
    x.stop_gradient = False
    y = norm.rms_norm.reference(x, weight)
    close(paddle.grad([y], [x], [dy])[0], gradient, 256)


def rotated(weight, angles):
    """The formula, by pairs: (a, b) -> (a cos - b sin, a sin + b cos)."""
    weight = paddle.to_tensor(weight.astype(np.float64))
    cos, sin = (paddle.to_tensor(f(angles.astype(np.float64))).unsqueeze(1) for f in (np.cos, np.sin))

    def function(x):
        y = x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight
        a, b = y[..., 0::2], y[..., 1::2]
        return paddle.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    return function


@pytest.mark.parametrize("shape", [(2, 3, 2, 16), (1, 5, 3, 12), (1, 1, 1, 2), (2, 20, 3, 128)])
def test_rms_norm_with_rotation_and_its_gradient(shape, run, in_float64):
    batch, tokens, heads, dim = shape
    x, dy, weight = random(shape, 0, 5), random(shape, 1), np.abs(random([dim], 2)) + 0.5
    angles = random([tokens, dim // 2], 3, 3)
    value, gradient = in_float64(rotated(weight, angles), x, dy)
    pair = tuple(paddle.to_tensor(f(angles)) for f in (np.cos, np.sin))
    y, rstd = run("rms_norm_rotated")(paddle.to_tensor(x), paddle.to_tensor(weight), pair)
    assert rstd.shape == [batch, tokens, heads, 1] and rstd.dtype == paddle.float32
    np.testing.assert_allclose(
        rstd.numpy()[..., 0], 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1) + EPSILON), rtol=1e-6
    )
    close(y, value)
    dx = run("rms_norm_rotated_grad")(paddle.to_tensor(dy), y, rstd, paddle.to_tensor(weight), pair)
    # two equal terms are subtracted where a head has two channels
    size = np.abs(dy * weight).max() * np.abs(rstd.numpy()).max()
    assert (np.abs(dx.numpy() - gradient) <= 64 * 2.0**-24 * max(size, np.abs(gradient).max())).all()


def test_what_is_not_finite_stays_in_its_token(run):
    x, one = random([1, 3, 40], 0), paddle.ones([1, 1, 40])
    x[0, 1, 5], x[0, 2] = np.inf, 0.0
    want = np.zeros([1, 3, 40], bool)
    want[0, 1] = True
    tensor = paddle.to_tensor(x)
    assert (np.isnan(run("modulated_norm")(tensor, one, one).numpy()) == want).all()
    assert (np.isnan(run("modulated_norm_grad")(tensor, one, tensor * 0 + 1.0).numpy())[0, 0] == 0).all()
    weight = one[0, 0]
    assert (np.isnan(run("rms_norm")(tensor, weight, one).numpy()).any(-1) == want.any(-1)).all()
    got = run("rms_norm_grad")(tensor, weight, one, tensor * 0 + 1.0).numpy()
    assert (np.isnan(got).any(-1) == want.any(-1)).all()
    assert not run("rms_norm")(tensor, weight, one).numpy()[0, 2].any()
    # a token of zeros has xhat 0: what remains is the shift
    np.testing.assert_array_equal(run("modulated_norm")(tensor, one, one).numpy()[0, 2], np.ones(40))


def test_edges_of_rms_norm_with_rotation(run):
    """Heads of 0, subnormal, 448 and with an infinity or a NaN: of a constant the norm is 1, turned by 90
    degrees (a, b) is (-b, a); what is not finite stays visible in its own head."""
    x = np.ones([1, 5, 1, 8], np.float32) * np.float32([0.0, 1e-40, 448.0, 1.0, 1.0])[:, None, None]
    x[0, 3, 0, 2], x[0, 4, 0, 5] = np.inf, np.nan
    turn = paddle.zeros([5, 4]), paddle.ones([5, 4])
    x, weight = paddle.to_tensor(x), paddle.full([8], 2.0)
    y, rstd = run("rms_norm_rotated")(x, weight, turn)
    got = y.numpy()[0, :, 0]
    np.testing.assert_allclose(rstd.numpy()[0, :3, 0, 0], [1e3, 1e3, 1 / 448], rtol=1e-6)
    np.testing.assert_allclose(got[:2], 0.0, atol=1e3 * 2.0**-126)
    np.testing.assert_allclose(got[2], [-2, 2] * 4, rtol=1e-6)
    assert np.isnan(got[3]).any() and np.isnan(got[4]).any()
    dx = run("rms_norm_rotated_grad")(paddle.ones_like(x), y, rstd, weight, turn).numpy()[0, :, 0]
    np.testing.assert_allclose(dx[:2], [[2e3, -2e3] * 4] * 2, rtol=1e-6)  # turned back, 1 / rms = 1000
    assert np.isnan(dx[3:]).any(axis=-1).all()
