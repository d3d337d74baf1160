"""What only the kernels of the norms promise: one rounding, refusals, the references' signatures."""

import inspect

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend, norm
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, Groups
from ppcoat.fp8.quantize import quantize

kernels = pytest.importorskip("ppcoat.fp8.norm_triton", reason="Triton is not installed")
NAMES = [name for name, module in backend.MODULES["triton"].items() if module == "norm_triton"]


def random(shape, seed):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_floats_are_rounded_once(dtype, on_triton):
    x, shift, scale, dy = (random([1, 2, 40], i).astype(dtype) for i in range(4))
    shift, scale = shift[:, :1].contiguous(), scale[:, :1].contiguous()
    x32, shift32, scale32, dy32 = (t.astype("float32") for t in (x, shift, scale, dy))
    codes, code_scale = quantize(x32, E4M3, 16)
    groups = Groups(code_scale, E4M3, 16, dtype)
    exact = quantize(x32, E4M3, 16), Groups(code_scale, E4M3, 16)
    half = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for got, want in (
        (on_triton(kernels.modulated_norm)(x, shift, scale), norm.modulated_norm(x32, shift32, scale32)),
        (on_triton(kernels.modulated_norm_grad)(x, scale, dy), norm.modulated_norm_grad(x32, scale32, dy32)),
        (on_triton(kernels.modulated_norm)(codes, shift, scale, groups),
         norm.modulated_norm(exact[0][0], shift32, scale32, exact[1])),
    ):  # fmt: skip
        assert got.dtype == getattr(paddle, dtype)
        want = want.numpy()
        allowed = half * np.abs(want) + 2.0**-17 * np.abs(want).max(-1, keepdims=True)
        assert (np.abs(got.astype("float32").numpy() - want) <= allowed).all()


def test_one_row_of_modulation_serves_all_samples(on_triton):
    x, shift, scale = random([3, 2, 8], 0), random([1, 1, 8], 1), random([1, 1, 8], 2)
    got = on_triton(kernels.modulated_norm)(x, shift, scale).numpy()
    np.testing.assert_allclose(got, norm.modulated_norm(x, shift, scale).numpy(), rtol=1e-5, atol=1e-6)


def test_what_a_kernel_does_not_take_is_refused_in_one_line(on_triton):
    forward, backward = on_triton(kernels.modulated_norm), on_triton(kernels.modulated_norm_grad)
    x, row = paddle.ones([1, 4, 8]), paddle.ones([1, 1, 8])
    with pytest.raises(Unsuited, match=r"x \[1, 8, 4\] is not contiguous"):
        forward(x.transpose([0, 2, 1]), paddle.ones([1, 1, 4]), paddle.ones([1, 1, 4]))
    with pytest.raises(Unsuited, match="scale .* is not contiguous"):
        backward(x, paddle.ones([1, 1, 16])[:, :, ::2], x)
    with pytest.raises(Unsuited, match=r"shift \[2, 1, 8\] for \[1, 4, 8\]; wanted \[1, 1, 8\]"):
        forward(x, paddle.ones([2, 1, 8]), row)
    with pytest.raises(Unsuited, match="x is int64"):
        forward(x.astype("int64"), row, row)
    with pytest.raises(Unsuited, match="over 10000 channels; a program holds 8192"):
        forward(paddle.ones([1, 1, 10000]), paddle.ones([1, 1, 10000]), paddle.ones([1, 1, 10000]))
    with pytest.raises(Unsuited, match=r"shift \[1, 1, 8\] beside scale \[2, 1, 8\]"):
        forward(paddle.ones([2, 4, 8]), row, paddle.ones([2, 1, 8]))
    with pytest.raises(Unsuited, match=r"weight \[4\] for \[1, 4, 8\]; wanted \[8\]"):
        on_triton(kernels.rms_norm)(x, paddle.ones([4]))
    rotated, weight = on_triton(kernels.rms_norm_rotated), paddle.ones([4])
    angles = paddle.ones([2, 2]), paddle.ones([2, 2])
    with pytest.raises(Unsuited, match=r"angles \[2, 2\] for \[1, 3, 1, 4\]"):
        rotated(paddle.ones([1, 3, 1, 4]), weight, angles)
    with pytest.raises(Unsuited, match="x .* is not contiguous"):
        rotated(paddle.ones([1, 2, 4, 2]).transpose([0, 1, 3, 2]), weight, angles)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_references(name):
    parameters = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(kernels, name), backend.OPS[name].reference)
    ]
    assert parameters[0] == parameters[1]
