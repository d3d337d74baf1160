"""The harness itself: what it computes, refuses and leaves behind."""

from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from half_precision import HalfPrecision, MissingOnGpu, MixedDtypes, RoundingNoise
from pretended_gpu import PretendedGpu
from triton.runtime.jit import KernelInterface

from ppcoat import device
from ppcoat.fp8 import backend
from ppcoat.fp8.formats import E4M3
from ppcoat.fp8.quantize import quantize
from ppcoat.models.loading import weights_in
from ppcoat.nn import attention
from ppcoat.nn.saved_tensors import count_saved_tensors

HALVES = ("bfloat16", "float16")


def random(*shape, dtype="bfloat16", seed=0):
    x = np.random.default_rng(seed).standard_normal(shape, dtype="float32")
    return paddle.to_tensor(x).astype(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_missing_operator_and_its_gradient_are_float32s_rounded_once(dtype):
    x, w = random(4, 8, dtype=dtype), random(8, 6, dtype=dtype, seed=1)
    x.stop_gradient = False
    with pytest.raises(RuntimeError, match="not registered"):
        F.gelu(x, approximate=True)
    with HalfPrecision() as half:
        y = F.gelu(x, approximate=True)
        (y @ w).sum().backward()
    x32, w32 = (each.detach().astype("float32") for each in (x, w))
    x32.stop_gradient = False
    y32 = F.gelu(x32, approximate=True)
    assert half.emulated["gelu"] == 1 and y.dtype == x.grad.dtype == x.dtype
    assert (y == y32.astype(dtype)).all()
    (y32 @ w32).sum().backward()
    np.testing.assert_allclose(x.grad.astype("float32").numpy(), x32.grad.numpy(), rtol=2.0**-7, atol=2.0**-7)


def test_sums_are_taken_in_float32():
    x = paddle.full([4096], 1.0, "bfloat16")  # in bfloat16, 256 + 1 is 256
    with HalfPrecision():
        assert float(x.sum()) == 4096 and float(x.mean()) == 1


def test_what_a_gpu_refuses_or_silently_widens_is_an_error_with_its_place():
    half, wide = random(4, 4), paddle.ones([4, 4])
    with HalfPrecision() as context:
        with pytest.raises(
            MixedDtypes, match="^add_ at .*test_half_precision.py test_what.*bfloat16 and float32"
        ):
            half.add_(wide)
        with pytest.raises(MixedDtypes, match="^matmul at .*does not promote"):
            paddle.matmul(half, wide)
        assert (half * wide).dtype == paddle.float32 and sum(context.promoted.values()) == 1
        assert half.add_(half).dtype == paddle.bfloat16
    assert half.clone().add_(wide).dtype == paddle.float32  # Paddle by itself


def test_what_a_gpu_does_not_have_is_an_error():
    with HalfPrecision():
        with pytest.raises(MissingOnGpu, match="^channel_shuffle at .*: a GPU has no bfloat16 of it"):
            F.channel_shuffle(random(1, 4, 2, 2), 2)
        with pytest.raises(MissingOnGpu, match="^repeat_interleave at .*: a GPU has no float16 of it"):
            paddle._C_ops.repeat_interleave(random(2, 4, dtype="float16"), 2, 0, -1)


def test_hooks_see_the_half_tensors_that_a_gpu_would_save():
    x, w = random(64, 64), random(64, 64, seed=1)
    x.stop_gradient = w.stop_gradient = False
    with HalfPrecision(), count_saved_tensors() as saved:
        y = F.softmax(F.gelu(x, approximate=True) @ w)
    assert saved.bytes_kept == 4 * 2 * 64 * 64  # x, its gelu, w, the softmax
    with HalfPrecision():
        y.sum().backward()
    assert x.grad.dtype == paddle.bfloat16


def test_attention_is_flash_attentions_with_its_gradients():
    q, k, v = (random(1, 5, 2, 8, seed=seed) for seed in range(3))
    wide = [x.astype("float32") for x in (q, k, v)]
    for x in (q, k, v, *wide):
        x.stop_gradient = False
    with PretendedGpu(), count_saved_tensors() as saved:
        o = attention.attention(q, k, v)
        (o * o).sum().backward()
    assert (
        saved.bytes_kept == 4 * o.size * 2 + 4 * 5 * 2 + o.size * 0
    )  # q, k, v, the result; a float32 per row
    wanted = attention.attention(*wide)
    (wanted * wanted).sum().backward()
    for found, exact in zip((o, q.grad, k.grad, v.grad), (wanted, *(x.grad for x in wide)), strict=True):
        assert found.dtype == paddle.bfloat16
        np.testing.assert_allclose(found.astype("float32").numpy(), exact.numpy(), rtol=0.02, atol=0.02)


def test_attention_without_flash_attention_takes_what_a_gpu_has(monkeypatch):
    q, k, v = (random(1, 5, 2, 8, seed=seed) for seed in range(3))
    wanted = attention.attention(*(x.astype("float32") for x in (q, k, v)))
    monkeypatch.setattr(attention, "_place_of", lambda x: SimpleNamespace(is_gpu_place=lambda: True))
    monkeypatch.setattr(attention, "kernel_of_paddle", lambda place, head_dim, dtype: attention.MATH)
    with HalfPrecision():
        found = attention.attention(q, k, v)
    assert found.dtype == paddle.bfloat16
    np.testing.assert_allclose(found.astype("float32").numpy(), wanted.numpy(), rtol=0.03, atol=0.03)


def test_a_launcher_is_called_and_what_it_refuses_or_returns_differently_is_counted(monkeypatch):
    with PretendedGpu() as gpu:
        quantize(random(4, 256), E4M3, 128)
        assert gpu.launches == {"quantize_kernel": 1} and gpu.different == gpu.unsuited == {}
        quantize(random(4, 256).t(), E4M3, 128)
        assert ["not contiguous" in reason for _, reason in gpu.unsuited] == [True]
        short = lambda *_: (paddle.zeros([4, 256], "uint8"), paddle.zeros([4], "bfloat16"))  # noqa: E731
        monkeypatch.setattr(backend.Op, "version", lambda op, name: short)
        quantize(random(4, 256), E4M3, 128)
        assert [op for op, what in gpu.different if "bfloat16 [4]'], reference" in what] == ["quantize"]


def test_the_contexts_leave_nothing_behind():
    places = [(paddle._C_ops, "matmul"), (paddle.Tensor, "__add__"), (paddle.autograd, "saved_tensors_hooks"),
              (F, "scaled_dot_product_attention"), (device, "computes_in_half"), (backend.Op, "__call__"),
              (attention, "attention_kernel"), (paddle.nn.Layer, "__call__"),
              (KernelInterface, "__getitem__")]  # fmt: skip
    before = [getattr(owner, name) for owner, name in places]
    with pytest.raises(ZeroDivisionError), PretendedGpu(), RoundingNoise(0):
        assert device.default_dtype() == "bfloat16" and [getattr(*place) for place in places] != before
        with weights_in(None):
            assert paddle.get_default_dtype() == "bfloat16"
        raise ZeroDivisionError
    assert [getattr(owner, name) for owner, name in places] == before
    assert device.default_dtype() == "float32"


def test_noise_is_of_the_size_of_rounding():
    x = random(64, 64, dtype="float32")
    layer = paddle.nn.Linear(64, 64)
    layer.weight.stop_gradient = layer.bias.stop_gradient = True
    wanted = layer(x)
    layer_in_half = lambda: F.linear(*(each.astype("bfloat16") for each in (x, layer.weight, layer.bias)))  # noqa: E731
    with RoundingNoise(0):
        outside, noisy = x + 1.0, layer(x)
    with HalfPrecision():
        rounded = layer_in_half().astype("float32")
    assert (outside == x + 1.0).all() and (layer(x) == wanted).all()
    by_noise, by_rounding = (float((y - wanted).std() / wanted.std()) for y in (noisy, rounded))
    assert 0.7 < by_noise / by_rounding < 1.1  # the noise leaves x as it is
