"""The checks on first use of the layers' ops: what is wrong fails. That kernels and references pass is in
test_checks.py, for all ops."""

import paddle
import pytest

from ppcoat.fp8 import backend, layer_checks, matmul, norm, pointwise

assert norm and pointwise and matmul
VALUES = (
    *("modulated_norm", "modulated_norm_grad", "gelu", "gelu_grad", "silu", "silu_grad", "gated_residual"),
    *("rms_norm_rotated_grad", "scaled_matmul"),
)
CODES = ("modulated_norm_quantized", "gelu_quantized")


def on_cpu(function):
    """`function` in float32, rounded to the dtype of its input: a CPU does not compute in 16 bits."""

    def wide(x):
        return x.astype("float32") if isinstance(x, paddle.Tensor) and x.dtype == paddle.bfloat16 else x

    def run(*args):
        result = function(*(wide(arg) for arg in args))
        return result.astype("bfloat16") if args[0].dtype == paddle.bfloat16 else result

    return run


def passed(name, change):
    """`change` is put on the results of the reference."""
    reference = backend.OPS[name].reference
    return getattr(layer_checks, name)(on_cpu(lambda *args: change(reference(*args))), reference) <= 1.0


@pytest.mark.parametrize("name", [*VALUES, *CODES, "rms_norm_rotated"])
def test_the_reference_rounded_once_passes(name):
    assert passed(name, lambda result: result)


@pytest.mark.parametrize("name", VALUES)
def test_values_a_little_off_fail(name):
    assert not passed(name, lambda x: x * 1.02)


@pytest.mark.parametrize("name", VALUES[:7])
def test_a_nan_that_vanishes_fails(name):
    assert not passed(name, paddle.nan_to_num)


@pytest.mark.parametrize("part", [0, 1])
def test_rotated_queries_or_their_statistic_off_fail(part):
    def change(pair):
        return tuple(t * 1.0001 if i == part else t for i, t in enumerate(pair))

    assert not passed("rms_norm_rotated", change)


@pytest.mark.parametrize("name", CODES)
def test_codes_one_off_or_a_scale_off_fail(name):
    def next_code(codes):
        return (codes.astype("int32") - (codes.astype("int32") % 128 > 20).astype("int32")).astype("uint8")

    assert not passed(name, lambda pair: (next_code(pair[0]), pair[1]))
    assert not passed(name, lambda pair: (pair[0], pair[1] * 1.02))
    assert not passed(name, lambda pair: (pair[0], paddle.nan_to_num(pair[1])))


def test_gelu_by_the_error_function_fails():
    def erf(x, groups=None):
        return paddle.nn.functional.gelu(x if groups is None else pointwise.floats(x, groups))

    assert not layer_checks.gelu(on_cpu(erf), backend.OPS["gelu"].reference) <= 1.0
