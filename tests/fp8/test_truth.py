"""The float64 truth of the ops: kernels pass, the references pass, and what is wrong fails."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import adamw, backend, four_bit, matmul, norm, pointwise, truth
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, E5M2, Groups
from ppcoat.fp8.quantize import dequantize, floats, quantize

for op in (
    adamw.adamw_step,
    norm.modulated_norm,
    pointwise.gelu,
    matmul.scaled_matmul,
    four_bit.dequantize_fp4,
):
    assert op.name in backend.OPS
ENCODERS, DECODERS = ("log_encode", "signed_log_encode"), ("log_decode", "signed_log_decode")
NORMS = ("modulated_norm", "modulated_norm_grad", "rms_norm", "rms_norm_grad")
POINTWISE = ("gelu", "gelu_grad", "silu", "silu_grad", "gated_residual")
FOUR_BITS = ("dequantize_fp4", "dequantize_nf4")
DEQUANTISED = ("dropout", "dequantize_blocks", "dequantize_with_residual", *FOUR_BITS)
LAYERS = (*NORMS, *POINTWISE, "rms_norm_rotated", "rms_norm_rotated_grad")


def test_every_op_has_its_truth():
    assert set(truth.CASES) == set(backend.OPS)


@pytest.mark.parametrize("name", backend.MODULES["triton"])
def test_every_triton_kernel_passes(name, on_triton):
    op = backend.OPS[name]
    assert op.check(on_triton(op.version("triton"))) <= 1.0


def on_cpu(name):
    """The reference; that of a layer in float32, rounded to the dtype of its values, because a CPU does not
    compute in 16 bits."""

    def wide(x):
        if isinstance(x, Groups):
            return replace(x, dtype="float32")
        return x.astype("float32") if isinstance(x, paddle.Tensor) and x.dtype == paddle.bfloat16 else x

    def run(*args):
        groups = [arg.dtype for arg in args if isinstance(arg, Groups)]
        result = backend.OPS[name].reference(*(wide(arg) for arg in args))
        result, *others = result if isinstance(result, tuple) else (result,)
        result = result.astype(groups[0] if groups else args[0].dtype)
        return (result, *others) if others else result

    return run if name in LAYERS else backend.OPS[name].reference


@pytest.mark.parametrize("name", backend.OPS)
def test_the_reference_passes(name):
    """Under the names that the benchmark shows: each in 16 bits, too, but for codecs of float32 moments."""
    found = truth.errors(name, on_cpu(name))
    assert all(0 <= error <= 1.0 for error in found.values())
    shown = {"y = x W", "dx = dy W^T"} if name == "scaled_matmul" else {name}
    assert {case.partition(",")[0] for case in found} == shown
    in_16_bits = {case.partition(",")[0] for case in found if case.endswith("bfloat16")}
    assert in_16_bits == (set() if "log" in name else shown)


def passed(name, change):
    """`change` is put on the results of the reference."""
    run = on_cpu(name)
    return truth.largest_error(name, lambda *args: change(run(*args))) <= 1.0


def more(codes: paddle.Tensor, by: int) -> paddle.Tensor:
    return (codes.astype("int32") + by * (codes > 20).astype("int32")).clip(0, 255).astype("uint8")


def without_nan(x: paddle.Tensor) -> paddle.Tensor:
    return paddle.nan_to_num(x.astype("float32")).astype(x.dtype)


def test_codes_cut_off_instead_of_rounded_fail():
    assert not passed("quantize", lambda pair: (more(pair[0], -1), pair[1]))


def test_a_nan_that_vanishes_in_a_scale_fails():
    assert not passed("quantize", lambda pair: (pair[0], paddle.nan_to_num(pair[1], nan=1.0)))


def test_a_scale_that_is_a_little_off_fails():
    assert not passed("quantize", lambda pair: (pair[0], pair[1] * 1.02))


@pytest.mark.parametrize("name", ["dequantize", *DECODERS])
def test_decoded_values_that_are_off_fail(name):
    assert not passed(name, lambda x: x * 1.01)
    assert not passed(name, without_nan)


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_one_step_off_an_amax_or_a_k_off_fail(name):
    assert not passed(name, lambda state: (more(state[0], -1), *state[1:]))
    assert not passed(name, lambda state: (state[0], state[1] * 1.00001, state[2]))
    assert not passed(name, lambda state: (*state[:2], more(state[2], 1)))
    assert not passed(name, lambda state: (state[0], paddle.nan_to_num(state[1], nan=1.0), state[2]))


def test_a_version_that_takes_none_of_the_cases_fails():
    def nothing(*args):
        raise Unsuited("nothing")

    assert np.isnan(truth.largest_error("quantize", nothing))


def test_cases_that_a_version_does_not_take_are_left_out():
    def halves_only(x, fmt, group):
        if x.dtype != paddle.bfloat16 or fmt is not E4M3 or group is None:
            raise Unsuited("not this")
        return quantize.reference(x, fmt, group)

    assert set(truth.errors("quantize", halves_only)) == {"quantize, bfloat16"}


@pytest.mark.parametrize("fault", ["rate", "skip", "counter", "moment", "stored"])
def test_faults_of_a_step_fail(fault):
    def faulty(param, grad, states, codecs, hyper, finite, stored=None):
        if fault == "skip":
            finite = paddle.to_tensor([True])
        backend.OPS["adamw_step"].reference(param, grad, states, codecs, hyper, finite, stored)
        if fault == "rate":
            paddle.assign(param * 1.001, output=param)
        elif fault == "counter":
            states["count"]["steps"].add_(paddle.ones([1], "int64"))
        elif fault == "moment" and "codes" in states["m2"]:
            paddle.assign(more(states["m2"]["codes"], -1), output=states["m2"]["codes"])
        elif fault == "stored" and stored is not None:
            paddle.assign(stored * 0.98, output=stored)

    assert not truth.largest_error("adamw_step", faulty) <= 1.0


@pytest.mark.parametrize("name", [*NORMS, *POINTWISE, *DEQUANTISED, "rms_norm_rotated_grad", "scaled_matmul"])
def test_values_a_little_off_fail(name):
    assert not passed(name, lambda x: x * 1.02)


@pytest.mark.parametrize("name", [*NORMS, *POINTWISE, *DEQUANTISED, "rms_norm_rotated_grad"])
def test_a_nan_that_vanishes_fails(name):
    assert not passed(name, without_nan)


@pytest.mark.parametrize("by", [1, 16])
def test_a_residual_one_step_off_fails(by):
    def change(parts):
        codes, scale, residual = parts
        return codes, scale, (residual.astype("int32") + by).clip(max=255).astype("uint8")

    assert not passed("quantize_with_residual", change)
    assert not passed("quantize_with_residual", lambda parts: (more(parts[0], -1), *parts[1:]))


def test_dropout_of_other_places_fails():
    def moved(x, rate, seed):
        return backend.OPS["dropout"].reference(x, rate, seed + 1)

    assert not truth.largest_error("dropout", moved) <= 1.0


@pytest.mark.parametrize("part", [0, 1])
def test_rotated_queries_or_their_statistic_off_fail(part):
    def change(pair):
        return tuple(t * 1.0001 if i == part else t for i, t in enumerate(pair))

    assert not passed("rms_norm_rotated", change)


def test_gelu_by_the_error_function_fails():
    def erf(x, groups=None):
        values = floats(x, groups and replace(groups, dtype="float32")).astype("float32")
        result = paddle.nn.functional.gelu(values)
        return result.astype(groups.dtype if groups else x.dtype)

    assert not truth.largest_error("gelu", erf) <= 1.0


def test_an_epsilon_that_is_not_looked_at_fails():
    def fixed(x, weight, scale, epsilon, groups=None):
        return on_cpu("rms_norm")(x, weight, scale, 1e-6, *([groups] if groups else []))

    assert not truth.largest_error("rms_norm", fixed) <= 1.0


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("group", [128, None])
def test_numpy_codes_are_those_of_the_reference(fmt, group):
    """Inputs of the cases are encoded by NumPy: the same scales, and the same codes except where float32
    falls to the other side of a limit."""
    x = truth.codecs.edge_rows(300)[: None if group else -2]
    codes, scale = truth.codecs.encode(x, fmt, group)
    want, want_scale = quantize.reference(paddle.to_tensor(x), fmt, group)
    np.testing.assert_allclose(scale, want_scale.numpy(), rtol=2.0**-23)
    finite = np.isfinite(dequantize.reference(want, want_scale, fmt, group).numpy())
    assert (codes == want.numpy())[finite].mean() > 0.99
