"""The kernels' float64 truths hold with the errors of the special function units' approximations.

The interpreter computes them exactly, so each is replaced by itself with the largest relative error that the
PTX instruction set's description allows, and with subnormal numbers as zeros. What a card does lies within.
"""

import importlib

import pytest

from ppcoat.fp8 import truth
from ppcoat.fp8.truth import PaddleTensors

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

OPS = {
    "log_codes_triton": ("log_encode", "log_decode", "signed_log_encode", "signed_log_decode"),
    "adamw_triton": ("adamw_step",),
    "norm_triton": (
        *("modulated_norm", "modulated_norm_grad", "rms_norm", "rms_norm_grad"),
        *("rms_norm_rotated", "rms_norm_rotated_grad"),
    ),
    "pointwise_triton": ("gelu", "gelu_grad", "silu", "silu_grad"),
    "quantize_triton": ("quantize_with_residual",),
}


@triton.jit
def flushed(x):
    return tl.where(tl.abs(x) < 1.1754943508222875e-38, x * 0.0, x)


@triton.jit
def wrong(x, y, error):
    """y off by `error`, upwards or downwards as the last bit of x says."""
    odd = (x.to(tl.int32, bitcast=True) & 1).to(tl.float32)
    return flushed(y * (1.0 + error * (2.0 * odd - 1.0)))


@triton.jit
def fast_exp2(x):
    return wrong(x, tl.exp2(flushed(x)), 2.0**-22)


@triton.jit
def fast_log2(x):
    odd = (x.to(tl.int32, bitcast=True) & 1).to(tl.float32)
    y = tl.log2(flushed(x))
    return y + tl.maximum(tl.abs(y), 1.0) * (2.0**-22 * (2.0 * odd - 1.0))


@triton.jit
def fast_inverse(x):
    return wrong(x, 1.0 / flushed(x), 2.0**-23)


@triton.jit
def fast_sqrt(x):
    return wrong(x, tl.sqrt(flushed(x)), 2.0**-23)


@triton.jit
def fast_rsqrt(x):
    return wrong(x, 1.0 / tl.sqrt(flushed(x)), 2.0**-22.9)


APPROXIMATIONS = (fast_exp2, fast_log2, fast_inverse, fast_sqrt, fast_rsqrt)


@pytest.mark.parametrize(
    "module",
    [
        "adamw_triton",
        "pointwise_triton",
        "quantize_triton",
        pytest.param("log_codes_triton", marks=pytest.mark.slow),
        pytest.param("norm_triton", marks=pytest.mark.slow),
    ],
)
def test_truths_hold_with_the_documented_errors(module, on_triton, monkeypatch):
    kernels, codes = (importlib.import_module(f"ppcoat.fp8.{each}") for each in (module, "log_codes_triton"))
    assert any(hasattr(kernels, each.__name__) for each in APPROXIMATIONS)
    for place in (kernels, codes):  # AdamW's codes are those of the second
        for each in APPROXIMATIONS:
            if hasattr(place, each.__name__):
                monkeypatch.setattr(place, each.__name__, each)
    for op in OPS[module]:
        found = truth.errors(op, on_triton(getattr(kernels, op)), PaddleTensors())
        assert found and all(error <= 1 for error in found.values()), found
