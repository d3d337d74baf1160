import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.nn.attention import SDPBackend, sdpa_kernel

import ppcoat.nn.attention as module
from ppcoat.nn.attention import (
    EFFICIENT,
    FLASH,
    MATH,
    attention,
    attention_kernel,
    kernel_of_paddle,
    padding_of,
    rotary_angles,
    rotate,
)

BF16, HALF, FLOAT = paddle.bfloat16, paddle.float16, paddle.float32


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


class Gpu:
    """The place of a pretended card."""

    def is_gpu_place(self):
        return True

    def gpu_device_id(self):
        return 0


@pytest.fixture
def card(monkeypatch):
    """card(8, 9): Paddle's selector believes that there is a card of sm_89 and a wheel with both kernels."""
    checks = [
        F.sdpa.check_sm_version,
        F.sdpa.minimum_gemm_alignment,
        F.sdpa.use_tensor_cores,
        F.sdpa.check_flash_attention_hardware_support,
        F.sdpa.check_mem_efficient_hardware_support,
    ]

    def forget():
        for check in checks:
            check.cache_clear()

    def pretend(*capability):
        forget()
        monkeypatch.setattr(F.sdpa, "check_cuda_is_available", lambda: True)
        monkeypatch.setattr(F.sdpa, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(paddle.device, "get_all_device_type", lambda: ["gpu"])

    with sdpa_kernel(list(SDPBackend)[1:]):  # all but ERROR
        yield pretend
    forget()


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "kernel"),
    [
        ((8, 9), 128, BF16, FLASH),  # FLUX on an RTX 4090
        ((9, 0), 96, BF16, FLASH),  # NewBie on an H100
        ((12, 0), 128, HALF, FLASH),
        ((7, 5), 128, HALF, EFFICIENT),  # Turing: too old for flash attention
        ((8, 9), 128, FLOAT, EFFICIENT),
        ((8, 9), 264, BF16, EFFICIENT),  # heads too large
        ((8, 9), 98, BF16, MATH),  # and of no multiple of 8
    ],
)
def test_the_kernel_is_what_paddles_selector_takes(card, capability, head_dim, dtype, kernel):
    card(*capability)
    assert kernel_of_paddle(Gpu(), head_dim, dtype) == kernel


def test_the_users_switches_and_a_wheel_without_kernels_count(card):
    card(8, 9)
    for backends, kernel in (
        ([SDPBackend.MATH], MATH),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], EFFICIENT),
    ):
        with sdpa_kernel(backends):
            assert kernel_of_paddle(Gpu(), 128, BF16) == kernel


def test_an_older_paddle_has_flash_attention_in_half_precision(monkeypatch):
    monkeypatch.delattr(F, "sdpa")
    asked = []
    monkeypatch.setattr(F.flash_attention, "_select_sdp", lambda head_dim: asked.append(head_dim) or FLASH)
    assert [kernel_of_paddle(Gpu(), 128, dtype) for dtype in (BF16, HALF, FLOAT)] == [FLASH, FLASH, MATH]
    assert asked == [128, 128]


def test_a_cpu_writes_attention_out_and_a_bias_needs_flash_attention(monkeypatch):
    q, bias = paddle.zeros([1, 4, 2, 64]), paddle.zeros([1, 1, 1, 4])
    assert attention_kernel(q) == MATH
    monkeypatch.setattr(module, "kernel_of_paddle", lambda place, head_dim, dtype: EFFICIENT)
    assert (attention_kernel(q), attention_kernel(q, bias)) == (EFFICIENT, MATH)


def test_no_padding_means_no_mask():
    assert padding_of([5, 5], 5) is None and padding_of([3], 3) is None
    bias = padding_of([5, 3], 5).bias
    assert bias.shape == [2, 1, 1, 5]  # of keys, not of pairs of tokens
    np.testing.assert_array_equal(bias[:, 0, 0].numpy() == 0, [[True] * 5, [True] * 3 + [False] * 2])


def test_attention_runs_in_the_kernel_that_is_named(monkeypatch):
    """Both forms with padding, beside the formula over each sample's own tokens."""
    rng, lengths = np.random.default_rng(3), (6, 4)
    q = rng.standard_normal((2, 6, 4, 8), dtype="float32")
    k, v = rng.standard_normal((2, 2, 6, 2, 8), dtype="float32")
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **more: calls.append(1) or attend(*a, **more)
    )
    for kernel, fused in ((MATH, 0), (EFFICIENT, 2)):
        monkeypatch.setattr(module, "attention_kernel", lambda q, bias=None, kernel=kernel: kernel)
        result = attention(*map(paddle.to_tensor, (q, k, v)), padding=padding_of(lengths, 6)).numpy()
        assert len(calls) == fused and np.isfinite(result).all()
        for i, n in enumerate(lengths):
            keys, values = (x[i : i + 1, :n].repeat(2, axis=2) for x in (k, v))
            wanted = reference_attention(q[i : i + 1, :n], keys, values)
            np.testing.assert_allclose(result[i : i + 1, :n], wanted, atol=1e-6)


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
