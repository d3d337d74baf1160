"""Activations and gated residual, references and kernels: against autograd in float64."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8 import pointwise
from ppcoat.fp8.formats import E4M3, E5M2, Groups
from ppcoat.fp8.quantize import quantize

assert pointwise.gelu.name == "gelu"


def gelu(x):
    return 0.5 * x * (1 + paddle.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + paddle.exp(-x))


ACTIVATIONS = pytest.mark.parametrize(("name", "formula"), [("gelu", gelu), ("silu", silu)])


def random(shape, seed, size=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


def close(got, want, x):
    """Within 64 roundings of float32 of x: what a rounding of tanh makes of it."""
    assert (np.abs(got.numpy() - want) <= 64 * 2.0**-24 * np.maximum(np.abs(x), 1.0)).all()


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(3, 50), (2, 1500), (1,), (2, 3, 7)])
def test_value_and_gradient(name, formula, shape, run, in_float64):
    x, dy = random(shape, 0, 3), random(shape, 1)
    value, gradient = in_float64(formula, x, dy)
    close(run(name)(paddle.to_tensor(x)), value, x)
    close(run(f"{name}_grad")(paddle.to_tensor(x), paddle.to_tensor(dy)), gradient, x * dy)


@ACTIVATIONS
@pytest.mark.parametrize(("fmt", "group"), [(E4M3, 16), (E5M2, 128), (E4M3, None)])
def test_from_codes_it_is_that_of_the_values_they_decode_to(name, formula, fmt, group, run, in_float64):
    x, dy = random([3, 50], 0, 3), random([3, 50], 1)
    codes, scale = quantize(paddle.to_tensor(x), fmt, group)
    numpy_format = ml_dtypes.float8_e4m3fn if fmt is E4M3 else ml_dtypes.float8_e5m2
    factors = scale.numpy().astype(np.float64)
    if group is not None:
        factors = np.repeat(factors, group, axis=-1)[:, :50]
    x = codes.numpy().view(numpy_format).astype(np.float64) * factors
    value, gradient = in_float64(formula, x, dy)
    groups = Groups(scale, fmt, group)
    close(run(name)(codes, groups), value, x)
    close(run(f"{name}_grad")(codes, paddle.to_tensor(dy), groups), gradient, x * dy)


@ACTIVATIONS
def test_edges(name, formula, run):
    """Far out both are x or 0, and their gradients 1 or 0; a NaN stays."""
    x = paddle.to_tensor(np.float32([0.0, -0.0, 1e-40, 448.0, 1e4, -448.0, -1e4, np.inf, np.nan]))
    with np.errstate(all="ignore"):
        value = run(name)(x).numpy()
        slope = run(f"{name}_grad")(x, paddle.ones_like(x)).numpy()
    np.testing.assert_array_equal(value[3:8], [448, 1e4, 0, 0, np.inf])
    np.testing.assert_allclose(value[:3], 0.0, atol=1e-40)
    np.testing.assert_allclose(slope[:7], [0.5, 0.5, 0.5, 1, 1, 0, 0], atol=1e-6)
    assert np.isnan(value[8]) and np.isnan(slope[8])


@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 1, 1), (2, 2, 3000)])
def test_gated_residual_and_its_gradient(shape, run):
    y, x, gate = random(shape, 0), random(shape, 1), random([shape[0], 1, shape[2]], 2)
    tensors = [paddle.to_tensor(t) for t in (y, gate, x)]
    exact = y.astype(np.float64) * gate
    np.testing.assert_allclose(run("gated_residual")(*tensors[:2]).numpy(), exact, rtol=2.0**-23)
    got = run("gated_residual")(*tensors).numpy()
    assert (np.abs(got - (exact + x)) <= 2.0**-23 * (np.abs(exact) + np.abs(x))).all()
    for tensor, before in zip(tensors, (y, gate, x), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), before)


def test_edges_of_the_gated_residual(run):
    """Each stays in its own element; where the gate is 0, an infinity becomes NaN and does not vanish."""
    edges = np.float32([0.0, -0.0, 1e-40, 448.0, -448.0, 3e38, np.inf, -np.inf, np.nan])
    y = paddle.to_tensor(edges.reshape([1, 1, 9]))
    one, none = paddle.ones_like(y), paddle.zeros_like(y)
    smallest = 2.0**-126  # below it numbers may be flushed
    np.testing.assert_allclose(run("gated_residual")(y, one).numpy()[0, 0], edges, rtol=0, atol=smallest)
    np.testing.assert_array_equal(run("gated_residual")(y, one, one).numpy()[0, 0, 3:], edges[3:] + 1)
    np.testing.assert_array_equal(run("gated_residual")(one, one, y).numpy()[0, 0, 3:], edges[3:] + 1)
    with np.errstate(invalid="ignore"):
        shut = run("gated_residual")(y, none, one).numpy()[0, 0]
    np.testing.assert_array_equal(shut, [1, 1, 1, 1, 1, 1, np.nan, np.nan, np.nan])
