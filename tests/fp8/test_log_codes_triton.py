"""Triton codecs of the optimizer against their formulas in float64; odd sizes and edge groups."""

import inspect

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import quantize as references
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, E5M2

kernels = pytest.importorskip("ppcoat.fp8.log_codes_triton", reason="Triton is not installed")

BOTH = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
KINDS = pytest.mark.parametrize("kind", ["", "signed_"], ids=["positive", "signed"])


@pytest.fixture(scope="module")
def codec(on_triton):
    """codec(kind) -> encode, decode."""
    return lambda kind: tuple(on_triton(getattr(kernels, f"{kind}log_{end}code")) for end in ("en", "de"))


def rows(kind: str, shape: list[int]) -> np.ndarray:
    """Log-normal rows, their spread growing from row to row."""
    rng = np.random.default_rng(shape[1])
    x = np.exp(np.linspace(0.05, 2.0, shape[0])[:, None] * rng.standard_normal(shape))
    return (x * (rng.choice([-1, 1], shape) if kind else 1)).astype("float32")


def positions(kind: str, x: np.ndarray, amax: np.ndarray, k: np.ndarray, fmt) -> np.ndarray:
    """Where x lies on the scale of the codes before rounding, float64: the formulas in the references'
    docstrings."""
    per_octave = k.astype(np.float64) / 16 * 2.0**fmt.mantissa_bits
    ratio = np.abs(x).astype(np.float64) / amax
    if not kind:
        return 255 + per_octave * np.log2(ratio)
    mu = 2 ** (127 / per_octave) - 1
    return 127 * np.log1p(mu * ratio) / np.log1p(mu)


@BOTH
@KINDS
@pytest.mark.parametrize("shape", [[40, 128], [3, 48], [1, 16], [5, 2000]])
@pytest.mark.parametrize("columns", [False, True], ids=["nearest", "dithered"])
def test_codes_follow_the_formula_in_float64(fmt, kind, shape, columns, codec):
    x = rows(kind, shape)
    offset = np.linspace(0, 0.99, shape[1], dtype=np.float32)[None] if columns else 0.5
    codes, amax, k = codec(kind)[0](paddle.to_tensor(x), fmt, paddle.to_tensor(offset) if columns else 0.5)
    assert (codes.dtype, amax.dtype, k.dtype) == (paddle.uint8, paddle.float32, paddle.uint8)
    assert codes.shape == shape and amax.shape == k.shape == [shape[0], 1]
    np.testing.assert_array_equal(amax.numpy(), np.abs(x).max(-1, keepdims=True))
    wanted_k = getattr(references, f"{kind}log_encode").reference(paddle.to_tensor(x), fmt)[2].numpy()
    assert np.abs(k.numpy().astype(int) - wanted_k).max() <= 1  # cut off: 1e-7 may decide
    numbers = codes.numpy().view("int8" if kind else "uint8").astype(np.float64)
    assert (numbers * x > 0)[np.abs(numbers) > 0].all()
    place = positions(kind, x, amax.numpy(), k.numpy(), fmt) + offset
    low, high = (0, 127) if kind else (1, 255)
    # floor, up to the rounding of the logarithm: 2^-21 of at most 255 codes
    assert (np.abs(numbers) >= np.clip(np.floor(place - 2e-4), low, high)).all()
    assert (np.abs(numbers) <= np.clip(np.floor(place + 2e-4), low, high)).all()


@BOTH
@KINDS
@pytest.mark.parametrize("shape", [[20, 128], [3, 48]])
def test_values_follow_the_formula_in_float64(fmt, kind, shape, codec):
    rng = np.random.default_rng(0)
    numbers = rng.integers(-127 if kind else 0, 128 if kind else 256, shape)
    k = np.linspace(4, 255, shape[0]).astype(np.uint8)[:, None]
    amax = np.exp(rng.standard_normal([shape[0], 1])).astype("float32")
    codes = numbers.astype("int8" if kind else "uint8").view("uint8")
    got = codec(kind)[1](paddle.to_tensor(codes), paddle.to_tensor(amax), paddle.to_tensor(k), fmt).numpy()
    per_octave = k / 16 * 2.0**fmt.mantissa_bits
    if kind:
        span = np.log(2) * 127 / per_octave
        want = np.sign(numbers) * amax * np.expm1(np.abs(numbers) / 127 * span) / np.expm1(span)
    else:
        want = np.where(numbers > 0, amax * 2 ** ((numbers - 255) / per_octave), 0.0)
    step = np.abs(want) + (amax / np.expm1(span) if kind else 0)  # float32 rounds 1 + mu |x|
    assert (np.abs(got - want) <= 2e-5 * step + 2.0**-126).all()


@BOTH
@KINDS
def test_edge_groups(fmt, kind, codec):
    encode, decode = codec(kind)
    sign = -1 if kind else 1
    lonely = np.where(np.arange(128) == 5, sign * 1e-20, 0)
    outlier = np.where(
        np.arange(128) == 0, 1e-12, np.abs(np.random.default_rng(3).standard_normal(128)) + 0.1
    )
    x = np.float32([np.zeros(128), np.full(128, sign * 0.7), lonely, outlier, np.full(128, 1e-40)])
    decoded = decode(*encode(paddle.to_tensor(x), fmt), fmt).numpy()
    assert not decoded[0].any() and np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded[1:3], x[1:3], rtol=1e-5)
    others = np.arange(128) > 0
    assert np.sqrt(np.mean((decoded[3] - x[3])[others] ** 2) / np.mean(x[3] ** 2)) < 0.06
    if not kind:
        assert decoded[3, 0] > 0  # a second moment that is not zero stays so
    assert (decoded[4] >= 0).all() and decoded[4].max() < 1e-37


@BOTH
@KINDS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_stay_visible_in_their_group(fmt, kind, bad, codec):
    encode, decode = codec(kind)
    x = np.ones([3, 32], dtype="float32")
    x[1, 7] = bad
    decoded = decode(*encode(paddle.to_tensor(x), fmt), fmt).numpy()
    np.testing.assert_array_equal(np.isnan(decoded), np.arange(3)[:, None] * np.ones(32) == 1)


def test_gaps_and_dtypes_are_refused(codec):
    encode, decode = codec("")
    with pytest.raises(Unsuited, match=r"x \[16, 8\] is not contiguous"):
        encode(paddle.ones([8, 16]).t(), E4M3)
    with pytest.raises(Unsuited, match="x is bfloat16, wanted float32"):
        encode(paddle.ones([8, 16]).astype("bfloat16"), E4M3)
    with pytest.raises(Unsuited, match="k is float32, wanted uint8"):
        decode(paddle.ones([8, 16]).astype("uint8"), paddle.ones([8, 1]), paddle.ones([8, 1]), E4M3)


def test_signatures_are_the_references():
    for name in ("log_encode", "log_decode", "signed_log_encode", "signed_log_decode"):
        twin = inspect.signature(getattr(kernels, name)).parameters.values()
        reference = inspect.signature(getattr(references, name).reference).parameters.values()
        assert [(p.name, p.default) for p in twin] == [(p.name, p.default) for p in reference]
