"""Both codecs against float64 numpy and ml_dtypes emulations, and their edge cases."""

from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8.formats import E4M3, E5M2, INT8
from ppcoat.fp8.quantize import (
    dequantize,
    log_decode,
    log_encode,
    quantize,
    signed_log_decode,
    signed_log_encode,
)

NF4 = Path(__file__).parents[1] / "fixtures" / "nf4" / "refs.npz"
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BOTH = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def emulate_linear(x: np.ndarray, fmt, group: int) -> np.ndarray:
    """Linear group quantisation in float64, rounding done by ml_dtypes."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group].astype(np.float64)
        scale = np.abs(part).max(-1, keepdims=True) / fmt.max
        scale[scale == 0] = 1.0
        codes = (part / scale).astype(np.float32).astype(DTYPES[fmt.name])
        out[..., start : start + group] = codes.astype(np.float64) * scale
    return out


def emulate_log(x: np.ndarray, fmt, k16: np.ndarray, dither: np.ndarray | float) -> np.ndarray:
    """Codes evenly spaced in log2 x, k * 2^mantissa_bits of them an octave, in float64."""
    x = x.astype(np.float64)
    amax = x.max(-1, keepdims=True)
    per_octave = k16 / 16 * 2.0**fmt.mantissa_bits
    codes = np.clip(np.floor(255 + per_octave * np.log2(x / amax) + dither), 1, 255)
    return amax * 2 ** ((codes - 255) / per_octave)


def emulate_mu_law(x: np.ndarray, fmt, k16: np.ndarray, dither: np.ndarray | float) -> np.ndarray:
    """ITU-T G.711's continuous companding F = ln(1 + mu |x|) / ln(1 + mu) in 127 levels, in float64."""
    x = x.astype(np.float64)
    amax = np.abs(x).max(-1, keepdims=True)
    mu = 2 ** (127 / (k16 / 16 * 2.0**fmt.mantissa_bits)) - 1
    codes = np.floor(127 * np.log1p(mu * np.abs(x) / amax) / np.log1p(mu) + dither)
    return np.sign(x) * amax * np.expm1(np.minimum(codes, 127) / 127 * np.log1p(mu)) / mu


@BOTH
@pytest.mark.parametrize("width", [128, 256, 300, 5, 1])
def test_groups_agree_with_the_emulation(fmt, width):
    x = (np.random.default_rng(width).standard_normal([3, 4, width]) * 10).astype("float32")
    codes, scale = quantize(paddle.to_tensor(x), fmt, 128)
    assert codes.dtype == paddle.uint8 and codes.shape == [3, 4, width]
    assert scale.dtype == paddle.float32 and scale.shape == [3, 4, -(-width // 128)]
    got = dequantize(codes, scale, fmt, 128).numpy()
    want = emulate_linear(x, fmt, 128)
    # float32 division may fall to the other side of a rounding tie: almost all equal, none further than one
    # step
    assert np.isclose(got, want, rtol=1e-5).mean() > 0.999
    np.testing.assert_allclose(
        got, want, rtol=2.0**-fmt.mantissa_bits, atol=np.abs(x).max() * 2 * fmt.min_subnormal / fmt.max
    )


@pytest.mark.parametrize("width", [256, 200, 1])
def test_int8_is_the_nearest_whole_number_of_a_127th(width):
    x = (np.random.default_rng(width).standard_normal([6, width]) * 10).astype("float32")
    codes, scale = quantize(paddle.to_tensor(x), INT8, 128)
    numbers = codes.numpy().view(np.int8)
    for start in range(0, width, 128):
        part = x[:, start : start + 128].astype("float64")
        want = np.abs(part).max(1, keepdims=True) / 127
        np.testing.assert_allclose(scale.numpy()[:, start // 128, None], want, rtol=2.0**-23)
        np.testing.assert_array_less(np.abs(numbers[:, start : start + 128] - part / want), 0.5001)
    assert np.abs(numbers).max() == 127 and codes.shape == [6, width]
    decoded = dequantize(codes, scale, INT8, 128).numpy()
    factors = np.repeat(scale.numpy(), 128, 1)[:, :width]
    np.testing.assert_allclose(decoded, numbers * factors, rtol=2.0**-23)


def test_int8_has_the_errors_of_the_fixture():
    """Computed by another program, the same in each kind of weights to its third digit."""
    refs = np.load(NF4)
    column = list(refs["formats"]).index("int8 group 128")
    for kind, want in zip(refs["kinds"], refs["rel_rms"][:, column], strict=True):
        w = (refs[f"{kind}/w_bf16"].astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
        got = dequantize(*quantize(paddle.to_tensor(w), INT8, 128), INT8, 128).numpy()
        error = np.sqrt(((got - w) ** 2).sum() / (w.astype("float64") ** 2).sum())
        assert error == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_int8_keeps_what_is_not_finite_visible(bad):
    x = np.ones([1, 64], "float32")
    x[0, 5] = bad
    decoded = dequantize(*quantize(paddle.to_tensor(x), INT8, 32), INT8, 32).numpy()
    assert np.isnan(decoded[:, :32]).all() and (decoded[:, 32:] == 1).all()


def test_per_tensor_has_one_scale():
    x = np.random.default_rng(0).standard_normal([6, 50]).astype("float32")
    codes, scale = quantize(paddle.to_tensor(x), E4M3)
    assert scale.shape == [1] and float(scale) == pytest.approx(np.abs(x).max() / 448)
    want = emulate_linear(x.reshape(1, -1), E4M3, x.size).reshape(x.shape)
    assert np.isclose(dequantize(codes, scale, E4M3).numpy(), want, rtol=1e-5).mean() > 0.99


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [16, None])
def test_non_finite_input_stays_visible_in_its_group_only(bad, group):
    x = np.ones([2, 32], dtype="float32")
    x[1, 20] = bad
    decoded = dequantize(*quantize(paddle.to_tensor(x), E4M3, group), E4M3, group).numpy()
    expected = np.zeros([2, 32], dtype=bool)
    if group:
        expected[1, 16:] = True
    else:
        expected[:] = True
    np.testing.assert_array_equal(np.isnan(decoded), expected)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-37, 1e-12, 1e30])
def test_linear_zeros_and_extreme_sizes(size):
    x = paddle.to_tensor((np.linspace(-1, 1, 64) * size).astype("float32")).reshape([1, 64])
    decoded = dequantize(*quantize(x, E4M3, 64), E4M3, 64).numpy()
    assert np.isfinite(decoded).all()
    np.testing.assert_allclose(decoded, x.numpy(), rtol=0.07, atol=max(size / 448 / 128, 1e-37))


def test_low_precision_input_and_output():
    x = paddle.to_tensor(np.linspace(-3, 3, 256).astype("float32")).reshape([2, 128]).astype("bfloat16")
    decoded = dequantize(*quantize(x, E4M3, 128), E4M3, 128, dtype="bfloat16")
    assert decoded.dtype == paddle.bfloat16
    assert float((decoded.astype("float32") - x.astype("float32")).abs().max()) <= 3 / 16


def log_normal(spread: float, signed: bool) -> np.ndarray:
    rng = np.random.default_rng(int(10 * spread))
    x = np.exp(spread * rng.standard_normal([64, 128]))
    return (x * rng.choice([-1, 1], x.shape) if signed else x).astype("float32")


@BOTH
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "positive"])
def test_log_codes_agree_with_the_formula_in_float64(fmt, spread, signed):
    x = log_normal(spread, signed)
    encode, decode, emulate = (
        (signed_log_encode, signed_log_decode, emulate_mu_law)
        if signed
        else (log_encode, log_decode, emulate_log)
    )
    columns = np.linspace(0, 0.99, 128)[None].astype("float32")
    for dither in (0.5, columns):
        given = dither if isinstance(dither, float) else paddle.to_tensor(dither)
        codes, amax, k = encode(paddle.to_tensor(x), fmt, given)
        assert (codes.dtype, amax.dtype, k.dtype) == (paddle.uint8, paddle.float32, paddle.uint8)
        assert codes.shape == [64, 128] and amax.shape == k.shape == [64, 1]
        got = decode(codes, amax, k, fmt).numpy()
        want = emulate(x, fmt, k.numpy().astype(np.float64), dither)
        # float32 may fall to the other side of a limit between two codes
        assert np.isclose(got, want, rtol=1e-4, atol=1e-6 * float(np.abs(x).max())).mean() > 0.998


@BOTH
def test_positive_log_codes_have_the_error_of_255_even_steps(fmt):
    """Steps of R / 254 in ln x, R the range of the group: relative RMS error R / 254 / sqrt(12)."""
    x = log_normal(2.0, signed=False)
    decoded = log_decode(*log_encode(paddle.to_tensor(x), fmt), fmt).numpy()
    span = np.log(x.max(-1) / x.min(-1))
    ideal = np.sqrt(np.mean(span**2) / 12) / 254
    assert np.sqrt(np.mean((decoded / x - 1) ** 2)) < 1.05 * ideal


@BOTH
def test_signed_log_codes_of_normal_values_are_close_to_even_steps(fmt):
    """Even steps of amax / 127 have the RMS error amax / 127 / sqrt(12)."""
    x = np.random.default_rng(5).standard_normal([256, 128]).astype("float32")
    decoded = signed_log_decode(*signed_log_encode(paddle.to_tensor(x), fmt), fmt).numpy()
    even = np.abs(x).max(-1).mean() / 127 / np.sqrt(12)
    assert np.sqrt(np.mean((decoded - x) ** 2)) < 1.25 * even


@BOTH
def test_a_signed_group_of_two_sizes_keeps_both(fmt):
    """Half of the values are 100 times smaller: they must not all fall on code 0."""
    x = np.random.default_rng(6).standard_normal([64, 128]).astype("float32")
    x[:, ::2] *= 0.01
    decoded = signed_log_decode(*signed_log_encode(paddle.to_tensor(x), fmt), fmt).numpy()
    for part in (slice(0, None, 2), slice(1, None, 2)):
        error = np.sqrt(np.mean((decoded - x)[:, part] ** 2) / np.mean(x[:, part] ** 2))
        assert error < 0.05


def signed(x: list[float] | np.ndarray, fmt=E4M3) -> np.ndarray:
    return signed_log_decode(*signed_log_encode(paddle.to_tensor(np.float32([x])), fmt), fmt).numpy()[0]


def positive(x: list[float] | np.ndarray, fmt=E4M3) -> np.ndarray:
    return log_decode(*log_encode(paddle.to_tensor(np.float32([x])), fmt), fmt).numpy()[0]


@BOTH
@pytest.mark.parametrize("decoded_by", [signed, positive])
def test_edge_groups(fmt, decoded_by):
    sign = -1 if decoded_by is signed else 1
    assert not decoded_by(np.zeros(128), fmt).any()
    np.testing.assert_allclose(decoded_by(np.full(128, sign * 0.7), fmt), sign * 0.7, rtol=1e-6)
    np.testing.assert_allclose(decoded_by([sign * 0.3], fmt), [sign * 0.3], rtol=1e-6)
    one = np.zeros(128)
    one[5] = sign * 1e-20
    np.testing.assert_allclose(decoded_by(one, fmt), one, rtol=1e-6)


@BOTH
@pytest.mark.parametrize("zeros", [slice(0, 1), slice(0, None, 2)], ids=["element 0", "64 of 128"])
def test_zeros_stay_zero_and_cost_the_others_nothing(fmt, zeros):
    normal = np.random.default_rng(2).standard_normal(128).astype("float32")
    x = normal.copy()
    x[zeros] = 0
    rest = x != 0
    for decoded, exact in ((signed(x, fmt), x), (positive(np.square(x), fmt), np.square(x))):
        assert (decoded[~rest] == 0).all() and (np.sign(decoded[rest]) == np.sign(exact[rest])).all()
        assert np.sqrt(np.mean((decoded - exact) ** 2) / np.mean(exact**2)) < 0.015


@BOTH
def test_one_tiny_outlier_does_not_cost_the_others_their_precision(fmt):
    """COAT's own rule takes k = 0.31 here and the relative RMS error of the other 127 rises to 0.078."""
    x = np.random.default_rng(3).standard_normal([200, 128]).astype("float32")
    x[:, 7] = 1e-12
    others = np.delete(np.arange(128), 7)
    decoded = signed_log_decode(*signed_log_encode(paddle.to_tensor(x), fmt), fmt).numpy()
    error = (decoded - x)[:, others]
    assert np.sqrt(np.mean(error**2) / np.mean(x**2)) < 0.015
    assert np.abs(decoded[:, 7]).max() < 0.02
    v = np.square(x)
    decoded = log_decode(*log_encode(paddle.to_tensor(v), fmt), fmt).numpy()
    assert np.sqrt(np.mean((decoded / v - 1)[:, others] ** 2)) < 0.06
    assert (decoded[:, 7] > 0).all() and decoded[:, 7].max() < 1e-6


@BOTH
def test_a_positive_value_never_becomes_zero(fmt):
    x = np.float32([1.0] * 100 + [1e-30] * 2 + [0.0] * 26)
    decoded = positive(x, fmt)
    assert (decoded[:102] > 0).all() and not decoded[102:].any()


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("decoded_by", [signed, positive])
def test_log_codes_keep_a_non_finite_value_visible(fmt, bad, decoded_by):
    assert np.isnan(decoded_by([1.0] * 127 + [bad], fmt)).all()


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-12, 1e30])
def test_log_codes_of_extreme_sizes_are_finite_and_keep_signs(size):
    x = (np.linspace(-1, 1, 64) * size).astype("float32")
    decoded = signed(x)
    assert np.isfinite(decoded).all() and (np.sign(decoded) * np.sign(x) >= 0).all()
    if size > 1e-38:
        np.testing.assert_allclose(decoded, x, atol=0.02 * size)
        normal = np.abs(x)[np.abs(x) > 2.0**-126]
        np.testing.assert_allclose(positive(normal), normal, rtol=0.02)
