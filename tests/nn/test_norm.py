"""Norms of a FLUX block against float64 numpy, and their closed-form gradients against finite differences."""

import numpy as np
import paddle
import pytest

from ppcoat.nn.norm import (
    NORM_EPSILON,
    modulated_norm,
    modulated_norm_grad,
    rms_norm,
    rms_norm_grad,
    rms_rstd,
)


def layer_norm(x, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON) * (1 + scale) + shift


def root_mean_square_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON) * weight


def difference_quotients(function, x, dy, step=1e-5):
    """Gradient of sum(function(x) * dy) in float64, one element after the other."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = ((function(up) - function(down)) * dy).sum() / (2 * step)
    return gradient


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)) * rng.uniform(0.01, 30, (2, 3, 1)) + 1.0
    return x, rng.standard_normal((2, 1, 8)), rng.standard_normal((2, 1, 8)), rng.standard_normal((2, 3, 8))


def tensors(*arrays):
    return [paddle.to_tensor(array.astype("float32")) for array in arrays]


def test_modulated_norm_and_its_gradient(arrays):
    x, shift, scale, dy = arrays
    got = modulated_norm(*tensors(x, shift, scale))
    np.testing.assert_allclose(got.numpy(), layer_norm(x, shift, scale), rtol=1e-4, atol=1e-5)
    wanted = difference_quotients(lambda x: layer_norm(x, shift, scale), x, dy)
    gradient = modulated_norm_grad(*tensors(x, scale, dy)).numpy()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_rms_norm_and_its_gradient(arrays):
    x, _, weight, dy = arrays
    weight = weight[0, 0]
    got = rms_norm(*tensors(x, weight))
    np.testing.assert_allclose(got.numpy(), root_mean_square_norm(x, weight), rtol=1e-5, atol=1e-5)
    wanted = difference_quotients(lambda x: root_mean_square_norm(x, weight), x, dy)
    x, weight, dy = tensors(x, weight, dy)
    gradient = rms_norm_grad(x * rms_rstd(x), rms_rstd(x), weight, dy).numpy()
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_gradients_leave_their_arguments_alone(arrays):
    x, _, scale, dy = tensors(*arrays)
    before = [t.numpy().copy() for t in (x, scale, dy)]
    modulated_norm_grad(x, scale, dy)
    rms_norm_grad(x, rms_rstd(x), scale[0, 0], dy)
    for tensor, value in zip((x, scale, dy), before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), value)
