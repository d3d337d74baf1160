"""The checks on first use: kernels pass, the reference passes, and what is wrong fails."""

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import adamw, backend, checks, matmul, norm, pointwise
from ppcoat.fp8.backend import Unsuited

for op in (adamw.adamw_step, norm.modulated_norm, pointwise.gelu, matmul.scaled_matmul):
    assert op.name in backend.OPS
ENCODERS, DECODERS = ("log_encode", "signed_log_encode"), ("log_decode", "signed_log_decode")


@pytest.mark.parametrize("name", backend.MODULES["triton"])
def test_every_triton_kernel_passes(name, on_triton):
    op = backend.OPS[name]
    assert op.check()(on_triton(op.version("triton")), op.reference) <= 1.0


def passed(name: str, candidate) -> bool:
    return getattr(checks, name)(candidate, backend.OPS[name].reference) <= 1.0


@pytest.mark.parametrize("name", backend.MODULES["triton"])
def test_the_reference_passes(name):
    op = backend.OPS[name]
    assert op.check()(op.reference, op.reference) <= 1.0


def changed(name: str, change):
    """The reference with `change` put on its results."""
    return lambda *args, **kwargs: change(backend.OPS[name].reference(*args, **kwargs))


def more(codes: paddle.Tensor, by: int) -> paddle.Tensor:
    return (codes.astype("int32") + by * (codes > 20).astype("int32")).clip(0, 255).astype("uint8")


def test_codes_cut_off_instead_of_rounded_fail():
    assert not passed("quantize", changed("quantize", lambda pair: (more(pair[0], -1), pair[1])))


def test_a_nan_that_vanishes_fails():
    def hide(pair):
        return pair[0], paddle.where(paddle.isnan(pair[1]), paddle.ones_like(pair[1]), pair[1])

    assert not passed("quantize", changed("quantize", hide))


def test_a_scale_that_is_a_little_off_fails():
    assert not passed("quantize", changed("quantize", lambda pair: (pair[0], pair[1] * 1.02)))


def test_decoded_values_that_are_off_fail():
    assert not passed("dequantize", changed("dequantize", lambda x: x * 1.01))
    for name in DECODERS:
        assert not passed(name, changed(name, lambda x: x * 1.01))


@pytest.mark.parametrize("name", ENCODERS)
def test_codes_two_steps_off_fail(name):
    assert not passed(name, changed(name, lambda state: (more(state[0], -2), *state[1:])))


def test_a_version_that_takes_none_of_the_cases_fails():
    def nothing(*args):
        raise Unsuited("nothing")

    assert np.isnan(checks.quantize(nothing, backend.OPS["quantize"].reference))


@pytest.mark.parametrize("fault", ["rate", "skip", "counter", "moment", "stored"])
def test_faults_of_a_step_fail(fault):
    def faulty(param, grad, states, codecs, hyper, finite, stored):
        if fault == "skip":
            finite = paddle.to_tensor([True])
        backend.OPS["adamw_step"].reference(param, grad, states, codecs, hyper, finite, stored)
        if fault == "rate":
            paddle.assign(param * 1.001, output=param)
        elif fault == "counter":
            states["count"]["steps"].add_(paddle.ones([1], "int64"))
        elif fault == "moment" and "codes" in states["m2"]:
            paddle.assign(more(states["m2"]["codes"], -2), output=states["m2"]["codes"])
        elif fault == "stored":
            paddle.assign(stored * 0.98, output=stored)

    assert not passed("adamw_step", faulty)
