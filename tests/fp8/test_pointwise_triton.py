"""What only the kernels of the activations promise: one rounding, refusals, the references' signatures."""

import inspect

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend, pointwise
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, Groups
from ppcoat.fp8.quantize import quantize

kernels = pytest.importorskip("ppcoat.fp8.pointwise_triton", reason="Triton is not installed")
NAMES = [name for name, module in backend.MODULES["triton"].items() if module == "pointwise_triton"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_floats_are_rounded_once(dtype, on_triton):
    random = np.random.default_rng(0).standard_normal([3, 2, 50]).astype(np.float32)
    x, dy, gate = (paddle.to_tensor(t).unsqueeze(1).astype(dtype) for t in random)
    wide = [t.astype("float32") for t in (x, dy, gate)]
    codes, scale = quantize(wide[0], E4M3, 16)
    half = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    for got, want in (
        (on_triton(kernels.gelu)(x), pointwise.gelu(wide[0])),
        (on_triton(kernels.silu_grad)(x, dy), pointwise.silu_grad(*wide[:2])),
        (on_triton(kernels.gelu_grad)(codes, dy, Groups(scale, E4M3, 16, dtype)),
         pointwise.gelu_grad(codes, wide[1], Groups(scale, E4M3, 16))),
        (on_triton(kernels.gated_residual)(x, gate, dy), pointwise.gated_residual(wide[0], wide[2], wide[1])),
    ):  # fmt: skip
        assert got.dtype == getattr(paddle, dtype)
        allowed = half * np.abs(want.numpy()) + 2.0**-17
        assert (np.abs(got.astype("float32").numpy() - want.numpy()) <= allowed).all()


def test_nothing_in_nothing_out(on_triton):
    assert on_triton(kernels.gelu)(paddle.zeros([0, 8])).shape == [0, 8]
    assert on_triton(kernels.gated_residual)(paddle.zeros([1, 0, 8]), paddle.zeros([1, 1, 8])).shape == [
        1,
        0,
        8,
    ]


def test_what_a_kernel_does_not_take_is_refused_in_one_line(on_triton):
    x = paddle.ones([8, 16])
    for call in (kernels.gelu, kernels.silu):
        with pytest.raises(Unsuited, match=r"x \[16, 8\] is not contiguous: call .contiguous\(\)"):
            on_triton(call)(x.t())
    with pytest.raises(Unsuited, match=r"dy \[16, 8\] is not contiguous"):
        on_triton(kernels.gelu_grad)(paddle.ones([16, 8]), x.t())
    with pytest.raises(Unsuited, match="x is uint8"):
        on_triton(kernels.gelu)(x.astype("uint8"))
    with pytest.raises(Unsuited, match=r"gate \[2, 1, 16\] for \[1, 8, 16\]; wanted \[1, 1, 16\]"):
        on_triton(kernels.gated_residual)(x.unsqueeze(0), paddle.ones([2, 1, 16]))
    codes, groups = paddle.ones([1, 9000]).astype("uint8"), Groups(paddle.ones([1, 1]), E4M3, 9000)
    with pytest.raises(Unsuited, match="a group of 9000 elements"):
        on_triton(kernels.gelu)(codes, groups)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_references(name):
    parameters = [
        [(p.name, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (getattr(kernels, name), backend.OPS[name].reference)
    ]
    assert parameters[0] == parameters[1]
