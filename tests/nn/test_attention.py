import numpy as np
import paddle
import pytest

from ppcoat.nn.attention import attention, rotary_angles, rotate


def reference_attention(q, k, v):
    """In float64: one softmax row per query, written as the formula."""
    q, k, v = (x.astype("float64") for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("shape", [(2, 5, 5, 3, 4), (1, 7, 3, 2, 8), (2, 4, 6, 1, 2)])
def test_attention_is_the_formula(shape):
    batch, queries, keys, heads, dim = shape
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, queries, heads, dim), dtype="float32")
    k, v = rng.standard_normal((2, batch, keys, heads, dim), dtype="float32")
    result = attention(*map(paddle.to_tensor, (q, k, v)))
    np.testing.assert_allclose(result.numpy(), reference_attention(q, k, v), atol=1e-6)


def test_attention_gradients_are_those_of_paddles_own():
    rng = np.random.default_rng(1)
    arrays = rng.standard_normal((3, 2, 5, 3, 4), dtype="float32")
    grad = paddle.to_tensor(rng.standard_normal((2, 5, 3, 4), dtype="float32"))
    gradients = []
    for function in (attention, paddle.nn.functional.scaled_dot_product_attention):
        q, k, v = tensors = [paddle.to_tensor(a, stop_gradient=False) for a in arrays]
        paddle.autograd.backward([function(q, k, v)], [grad])
        gradients.append([t.grad.numpy() for t in tensors])
    for ours, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def rotation_by_formula(x, ids, axes):
    """Complex float64: pair i of a token at position p turns by p * 10000^(-2i/dim of its axis)."""
    angles = []
    for axis, dim in enumerate(axes):
        angles += [ids[:, axis] * 10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    turn = np.exp(1j * np.stack(angles, axis=-1))[None, :, None]
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def test_rotation_is_the_formula_forward_and_backward():
    rng = np.random.default_rng(2)
    x, g = rng.standard_normal((2, 2, 6, 3, 12), dtype="float32")
    ids = np.stack([np.zeros(6), np.arange(6) * 11, np.arange(6)[::-1]], axis=1)
    cos, sin = rotary_angles(paddle.to_tensor(ids.astype("float32")), (4, 2, 6))
    assert cos.dtype == sin.dtype == paddle.float32
    tensor = paddle.to_tensor(x, stop_gradient=False)
    rotated = rotate(tensor, cos, sin)
    paddle.autograd.backward([rotated], [paddle.to_tensor(g)])
    np.testing.assert_allclose(rotated.numpy(), rotation_by_formula(x, ids, (4, 2, 6)), atol=1e-6)
    # The adjoint of a turn is the turn back.
    np.testing.assert_allclose(tensor.grad.numpy(), rotation_by_formula(g, -ids, (4, 2, 6)), atol=1e-6)


def test_angles_keep_their_digits_at_far_positions():
    position = 4095.0
    cos, _ = rotary_angles(paddle.to_tensor([[position]]), (56,))
    wanted = np.cos(position * 10000.0 ** (-np.arange(0, 56, 2) / 56))
    np.testing.assert_allclose(cos.numpy()[0], wanted, atol=1e-7)
