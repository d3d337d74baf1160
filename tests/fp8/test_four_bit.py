"""Weights in 4 bits: NF4 against bitsandbytes' own bytes, FP4 against float64 and its promise."""

import inspect
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend, four_bit
from ppcoat.fp8.backend import Unsuited

REFS = np.load(Path(__file__).parents[1] / "fixtures" / "nf4" / "refs.npz")
KINDS = pytest.mark.parametrize("kind", ["gaussian", "heavy_tailed", "outlier_channels", "rows_uneven"])
SHAPES = pytest.mark.parametrize("shape", [[3, 5], [1], [7, 33], [16, 16], [2, 8, 24], [0, 8]])


def weights(kind: str) -> np.ndarray:
    return REFS[f"{kind}/w_bf16"].view(np.uint16).view(ml_dtypes.bfloat16).astype("float32")


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    return np.sqrt(((got - want) ** 2).sum() / (want.astype("float64") ** 2).sum())


@KINDS
def test_nf4_is_bitsandbytes_bit_for_bit(kind):
    w = weights(kind)
    codes, absmax = four_bit.quantize_nf4(paddle.to_tensor(w))
    np.testing.assert_array_equal(codes.numpy(), REFS[f"{kind}/bytes"][:, 0])
    np.testing.assert_array_equal(absmax.numpy(), REFS[f"{kind}/absmax"])
    values = four_bit.dequantize_nf4(codes, (absmax,), list(w.shape)).numpy()
    np.testing.assert_allclose(values, REFS[f"{kind}/dequantised"], rtol=1e-7)


@KINDS
def test_double_quantisation_is_bitsandbytes_bit_for_bit(kind):
    absmax = paddle.to_tensor(REFS[f"{kind}/absmax"])
    codes, scale, offset = four_bit.quantize_absmax(absmax)
    np.testing.assert_array_equal(codes.numpy(), REFS[f"{kind}/dq_absmax"])
    np.testing.assert_allclose(scale.numpy(), REFS[f"{kind}/dq_state2_absmax"], rtol=1e-7)
    np.testing.assert_allclose(offset.numpy(), [REFS[f"{kind}/dq_offset"]], rtol=1e-7)
    again = four_bit.nf4_absmax(codes, scale, offset).numpy()
    np.testing.assert_allclose(again, REFS[f"{kind}/dq_absmax_values"], rtol=1e-6)
    shape, given = list(weights(kind).shape), paddle.to_tensor(REFS[f"{kind}/bytes"][:, 0])
    values = four_bit.dequantize_nf4(given, (codes, scale, offset), shape).numpy()
    np.testing.assert_allclose(values, REFS[f"{kind}/dq_dequantised"], rtol=1e-6)


def test_nf4_at_every_level_every_midpoint_and_in_blocks_of_one_value():
    codes, absmax = four_bit.quantize_nf4(paddle.to_tensor(REFS["edge/w"]))
    np.testing.assert_array_equal(codes.numpy(), REFS["edge/bytes"][:, 0])
    np.testing.assert_array_equal(absmax.numpy(), REFS["edge/absmax"])
    np.testing.assert_array_equal(four_bit.nf4_scale_table(), REFS["dq_code"])


@KINDS
def test_fp4_has_at_most_085_of_nf4s_error_in_at_most_4_and_a_half_bits(kind):
    w = weights(kind)
    codes, scale = four_bit.quantize_fp4(paddle.to_tensor(w))
    values = four_bit.dequantize_fp4(codes, scale, list(w.shape)).numpy()
    nf4 = relative_rms(REFS[f"{kind}/dequantised"], w)
    assert relative_rms(values, w) < 0.75 * nf4
    assert 8 * (codes.size + scale.size) <= 4.5 * w.size


def fp4_by_numpy(codes: np.ndarray, scale: np.ndarray, count: int) -> np.ndarray:
    """The format as its description says it, float64."""
    each = np.stack([codes >> 4, codes & 15], 1).ravel()[:count] - 8.125
    size = np.exp2((scale & 127) / 6.0 - 20) * (scale & 127 > 0)
    return (each + each**3 / 160) * np.repeat(np.where(scale > 127, -size, size), 16)[:count]


@SHAPES
def test_fp4_takes_the_nearest_level_and_the_best_of_near_scales(shape):
    x = np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")
    codes, scale = (part.numpy() for part in four_bit.quantize_fp4(paddle.to_tensor(x)))
    assert codes.shape == (-(-x.size // 2),) and scale.shape == (-(-x.size // 16),)
    values = fp4_by_numpy(codes, scale, x.size)
    got = four_bit.dequantize_fp4(paddle.to_tensor(codes), paddle.to_tensor(scale), shape).numpy()
    assert got.shape == x.shape
    np.testing.assert_allclose(got.ravel(), values, rtol=1e-6)
    u = np.arange(16) - 8.125
    sizes = np.exp2(np.arange(1, 127) / 6 - 20)
    levels = np.concatenate([sizes, -sizes])[:, None, None] * (u + u**3 / 160)[:, None]
    full = x.size // 16 * 16
    mine = ((values[:full] - x.ravel()[:full]) ** 2).sum()
    best = sum((np.abs(levels - part).min(1) ** 2).sum(1).min() for part in x.ravel()[:full].reshape(-1, 16))
    assert mine <= 1.02 * best  # of all scales: those far from the largest value are not tried


@KINDS
def test_the_table_for_bfloat16_finds_the_scales_that_arithmetic_finds(kind, monkeypatch):
    """float32 numbers are searched without the table. Largest values from one end of what it is asked for to
    the other, zeros among them, and a ragged end."""
    x = np.resize(weights(kind), [2**15, 16])
    x *= np.geomspace(2.1e-5, 7.9, 2**15)[:, None] / np.abs(x).max(1, keepdims=True)
    x[::50] = 0.0
    flat = paddle.to_tensor(x.ravel()[:-5]).astype("bfloat16")
    want = four_bit.quantize_fp4(flat.astype("float32"))
    monkeypatch.setattr(four_bit, "_searched", None)
    for part, each in zip(four_bit.quantize_fp4(flat), want, strict=True):
        np.testing.assert_array_equal(part.numpy(), each.numpy())


@pytest.mark.parametrize("bad", [1e-6, 9.0, 22.0, 23.0, np.nan, np.inf, -np.inf])
def test_blocks_that_the_table_does_not_know_are_searched_without(bad):
    x = np.resize(weights("gaussian"), [8, 16])
    x[3], x[5, 2] = x[3] * 1e-4, bad
    x[5] = x[5, 2] * x[5] if bad == 1e-6 else x[5]
    flat = paddle.to_tensor(x).astype("bfloat16")
    for part, each in zip(
        four_bit.quantize_fp4(flat), four_bit.quantize_fp4(flat.astype("float32")), strict=True
    ):
        np.testing.assert_array_equal(part.numpy(), each.numpy())


def test_fp4_is_not_finite_where_it_cannot_hold_a_value():
    x = np.ones([6, 16], "float32")
    x[1, 3], x[2, 3], x[3, 3], x[4, 3] = np.nan, np.inf, -30.0, 22.0
    codes, scale = four_bit.quantize_fp4(paddle.to_tensor(x))
    values = four_bit.dequantize_fp4(codes, scale, [6, 16]).numpy()
    assert np.isnan(values[1:4]).all() and np.isfinite(values[[0, 4, 5]]).all()
    assert values[4, 3] == pytest.approx(22.0, rel=0.07)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nf4_is_not_finite_in_the_block_of_a_bad_value(bad):
    x = np.ones([2, 64], "float32")
    x[1, 3] = bad
    codes, absmax = four_bit.quantize_nf4(paddle.to_tensor(x))
    values = four_bit.dequantize_nf4(codes, (absmax,), [2, 64]).numpy()
    assert np.isnan(values[1]).all() and (values[0] == 1).all()


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5, 1e-3, 10.0])
def test_zeros_and_sizes(size):
    x = (np.linspace(-1, 1, 320) * size).astype("float32")
    fp4 = four_bit.dequantize_fp4(*four_bit.quantize_fp4(paddle.to_tensor(x)), [320]).numpy()
    codes, absmax = four_bit.quantize_nf4(paddle.to_tensor(x))
    nf4 = four_bit.dequantize_nf4(codes, (absmax,), [320]).numpy()
    np.testing.assert_allclose(fp4, x, atol=0.1 * size + 2e-6 * (size > 0))
    np.testing.assert_allclose(nf4, x, atol=0.16 * size)


@SHAPES
def test_nf4_in_all_shapes_and_in_chunks(shape, monkeypatch):
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    whole = [part.numpy() for part in four_bit.quantize_nf4(paddle.to_tensor(x))]
    fp4 = [part.numpy() for part in four_bit.quantize_fp4(paddle.to_tensor(x))]
    monkeypatch.setattr(four_bit, "CHUNK", 64)
    for quantised, want in ((four_bit.quantize_nf4, whole), (four_bit.quantize_fp4, fp4)):
        for part, each in zip(quantised(paddle.to_tensor(x)), want, strict=True):
            np.testing.assert_array_equal(part.numpy(), each)
    assert whole[0].shape == (-(-x.size // 2),) and whole[1].shape == (-(-x.size // 64),)
    values = four_bit.dequantize_nf4(*map(paddle.to_tensor, whole[:1]), (paddle.to_tensor(whole[1]),), shape)
    assert values.shape == shape
    if x.size:
        assert relative_rms(values.numpy(), x) < 0.13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_the_references_in_all_sizes(dtype, on_triton):
    """Within a tile, and more than one."""
    kernels = pytest.importorskip("ppcoat.fp8.four_bit_triton", reason="Triton is not installed")
    for shape in ([5, 8], [130, 72], [1, 8]):
        x = paddle.to_tensor(np.random.default_rng(2).standard_normal(shape).astype("float32"))
        fp4, (codes, absmax) = four_bit.quantize_fp4(x), four_bit.quantize_nf4(x)
        want = four_bit.dequantize_fp4.reference(*fp4, shape, dtype)
        got = on_triton(kernels.dequantize_fp4)(*fp4, shape, dtype)
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=1e-6)
        for scale in ((absmax,), four_bit.quantize_absmax(absmax)):
            want = four_bit.dequantize_nf4.reference(codes, scale, shape, dtype)
            got = on_triton(kernels.dequantize_nf4)(codes, scale, shape, dtype)
            limit = 2.0**-8 if dtype == "bfloat16" else 1e-6  # a scale's last bit may round to its neighbour
            np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), rtol=limit)


def test_twins_have_the_references_signatures_and_refuse_in_one_line(on_triton):
    kernels = pytest.importorskip("ppcoat.fp8.four_bit_triton", reason="Triton is not installed")
    for name in ("dequantize_fp4", "dequantize_nf4"):
        twin = inspect.signature(getattr(kernels, name)).parameters.values()
        reference = inspect.signature(backend.OPS[name].reference).parameters.values()
        assert [(p.name, p.default) for p in twin] == [(p.name, p.default) for p in reference]
    codes, scale = paddle.zeros([8], "uint8"), paddle.zeros([1], "uint8")
    run = on_triton(kernels.dequantize_fp4)
    with pytest.raises(Unsuited, match="15 codes of 4 bits; wanted a multiple of 8"):
        run(codes, scale, [15])
    with pytest.raises(Unsuited, match=r"scale \[1\] for \[32\]; wanted 2"):
        run(paddle.zeros([16], "uint8"), scale, [32])
    with pytest.raises(Unsuited, match="dequantize to float64"):
        run(codes, scale, [16], "float64")
