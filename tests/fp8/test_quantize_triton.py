"""Triton quantise and dequantise against ml_dtypes and float64; odd shapes, edge values, refusals."""

import inspect

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend
from ppcoat.fp8 import quantize as references
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, E5M2, INT8
from ppcoat.fp8.matmul import dequantize_blocks

kernels = pytest.importorskip("ppcoat.fp8.quantize_triton", reason="Triton is not installed")

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
BOTH = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])


@pytest.fixture(scope="module")
def quantize(on_triton):
    return on_triton(kernels.quantize)


@pytest.fixture(scope="module")
def dequantize(on_triton):
    return on_triton(kernels.dequantize)


def half_steps(exact: np.ndarray, scale: np.ndarray, fmt) -> np.ndarray:
    """Half the distance of two FP8 numbers at exact / scale, times scale; float64."""
    binade = np.floor(np.log2(np.maximum(np.abs(exact) / scale, fmt.min_normal)))
    return 2.0 ** (binade - fmt.mantissa_bits - 1) * scale


@BOTH
def test_codes_are_those_of_a_cast_to_nearest_even(fmt, quantize):
    """A row that holds the largest FP8 number has scale 1: its codes are ml_dtypes' cast. Ties, the limits of
    normal and subnormal numbers, both zeros, and every binade of the format."""
    every = np.arange(128, dtype=np.uint8).view(DTYPES[fmt.name]).astype(np.float64)
    every = every[np.isfinite(every)]
    ties = (every[1:] + every[:-1]) / 2
    near = np.concatenate([ties * (1 - 2.0**-20), ties * (1 + 2.0**-20)])
    random = np.exp2(np.random.default_rng(0).uniform(-20, np.log2(fmt.max), 1000))
    x = np.concatenate([every, ties, near, random])
    x = np.concatenate([x, -x]).astype(np.float32)[None]
    codes, scale = quantize(paddle.to_tensor(x), fmt, x.size)
    assert scale.numpy().item() == 1.0
    np.testing.assert_array_equal(codes.numpy(), x.astype(DTYPES[fmt.name]).view(np.uint8))


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_code_decodes_to_its_number(fmt, dtype, dequantize):
    codes = np.arange(256, dtype=np.uint8)[None]
    want = codes.view(DTYPES[fmt.name]).astype(np.float32) * 0.75
    got = dequantize(paddle.to_tensor(codes), paddle.to_tensor(np.float32([[0.75]])), fmt, 256, dtype)
    assert got.dtype == getattr(paddle, dtype)
    cast = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    np.testing.assert_array_equal(got.astype("float32").numpy(), want.astype(cast).astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "group"),
    [([3, 4, 128], 128), ([7, 300], 128), ([5, 5], 128), ([1], 16), ([2, 1000], 7), ([33, 48], 48),
     ([2, 3000], None), ([3, 5, 7], None), ([1, 1], None)],
)  # fmt: skip
def test_round_trip_is_within_half_a_step(shape, group, quantize, dequantize):
    for fmt, dtype in ((E4M3, "float32"), (E5M2, "bfloat16"), (E4M3, "float16")):
        rng = np.random.default_rng(len(shape))
        x = paddle.to_tensor((rng.standard_normal(shape) * 10).astype("float32")).astype(dtype)
        codes, scale = quantize(x, fmt, group)
        assert codes.dtype == paddle.uint8 and codes.shape == shape and scale.dtype == paddle.float32
        exact = x.astype("float32").numpy().astype(np.float64)
        width = shape[-1] if group else x.size
        rows = exact.reshape(-1, width)
        starts = np.arange(0, width, group or width)
        amax = np.maximum.reduceat(np.abs(rows), starts, axis=-1)
        assert scale.shape == ([*shape[:-1], len(starts)] if group else [1])
        np.testing.assert_allclose(scale.numpy().reshape(amax.shape), amax / fmt.max, rtol=2.0**-23)
        scales = np.repeat(amax / fmt.max, group or width, axis=-1)[:, :width].reshape(exact.shape)
        decoded = dequantize(codes, scale, fmt, group).numpy().astype(np.float64)
        bound = half_steps(exact, scales, fmt) + 2.0**-21 * np.abs(exact)  # and the roundings of float32
        assert (np.abs(decoded - exact) <= bound).all()


def test_two_stages_with_many_tiles_in_a_part(quantize, monkeypatch):
    """Parts that each take several tiles, the last one none: every value is looked at."""
    monkeypatch.setattr(kernels, "PARTS", 3)
    for place in (0, 2047, 2048, 9000, 13 * 1000 - 1):
        x = np.ones(13 * 1000, dtype=np.float32)
        x[place] = -896.0
        codes, scale = quantize(paddle.to_tensor(x.reshape(13, 1000)), E4M3)
        assert scale.numpy().tolist() == [2.0]
        assert codes.numpy().reshape(-1)[place] == 0xFE  # -448


@pytest.mark.parametrize(
    ("shape", "group"), [([3, 256], 128), ([7, 300], 128), ([5, 5], 128), ([2, 96], None)]
)
def test_int8_is_the_references_bit_for_bit(shape, group, quantize, dequantize):
    x = paddle.to_tensor(np.random.default_rng(5).standard_normal(shape).astype(np.float32))
    got, want = quantize(x, INT8, group), references.quantize.reference(x, INT8, group)
    for part, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(part.numpy(), wanted.numpy())
    every = paddle.to_tensor(np.arange(256, dtype=np.uint8)[None])
    values = dequantize(every, paddle.to_tensor(np.float32([[0.5]])), INT8, 256, "bfloat16")
    want = np.arange(256, dtype=np.uint8).view(np.int8) * 0.5
    np.testing.assert_array_equal(values.astype("float32").numpy()[0], want)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [16, None])
def test_non_finite_input_stays_visible_in_its_group_only(fmt, bad, group, quantize, dequantize):
    x = np.ones([2, 40], dtype="float32")
    x[1, 20] = bad
    decoded = dequantize(*quantize(paddle.to_tensor(x), fmt, group), fmt, group).numpy()
    expected = np.full([2, 40], group is None)
    expected[1, 16:32] = True
    np.testing.assert_array_equal(np.isnan(decoded), expected)


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-37, 1e-12, 1e30])
def test_zeros_and_extreme_sizes(size, quantize, dequantize):
    x = (np.linspace(-1, 1, 65) * size).astype("float32").reshape(1, 65)
    for group in (65, None):
        codes, scale = quantize(paddle.to_tensor(x), E4M3, group)
        decoded = dequantize(codes, scale, E4M3, group).numpy()
        assert np.isfinite(decoded).all() and np.isfinite(scale.numpy()).all() and (scale.numpy() > 0).all()
        np.testing.assert_allclose(decoded, x, rtol=0.0626, atol=max(size / 448 / 1024, 2.0**-126))
    if size == 0:
        assert not (codes.numpy() & 0x7F).any()


def test_no_elements_no_codes(quantize, dequantize):
    codes, scale = quantize(paddle.zeros([0, 64]), E4M3, 32)
    assert codes.shape == [0, 64] and scale.shape == [0, 2]
    assert dequantize(codes, scale, E4M3, 32).shape == [0, 64]


def test_what_a_kernel_does_not_take_is_refused_in_one_line(quantize, dequantize):
    x = paddle.ones([8, 16])
    with pytest.raises(Unsuited, match=r"x \[16, 8\] is not contiguous: call .contiguous\(\)"):
        quantize(x.t(), E4M3, 8)
    with pytest.raises(Unsuited, match="x is int32, wanted float32 or bfloat16 or float16"):
        quantize(x.astype("int32"), E4M3, 8)
    with pytest.raises(Unsuited, match="a group of 10000 elements; wanted 1 to 8192"):
        quantize(paddle.ones([1, 10000]), E4M3, 10000)
    codes, scale = quantize(x, E4M3, 8)
    with pytest.raises(Unsuited, match="codes .* is not contiguous"):
        dequantize(codes.t(), scale, E4M3, 8)
    with pytest.raises(Unsuited, match="dequantize to float64"):
        dequantize(codes, scale, E4M3, 8, "float64")


def test_signatures_are_the_references():
    names = [name for name, module in backend.MODULES["triton"].items() if module == "quantize_triton"]
    assert len(names) == 5
    for op in (backend.OPS[name] for name in names):
        twin = inspect.signature(getattr(kernels, op.name)).parameters.values()
        reference = inspect.signature(op.reference).parameters.values()
        assert [(p.name, p.default) for p in twin] == [(p.name, p.default) for p in reference]


@pytest.mark.parametrize(
    ("shape", "group"), [([3, 300], 128), ([2, 5, 200], 100), ([5, 1000], None), ([4, 2], 2)]
)
def test_residuals_in_all_layouts_are_the_references(shape, group, on_triton):
    """Ragged and odd-sized groups, several tiles per tensor: bit for bit but where rounding is a tie."""
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal(shape).astype(np.float32))
    want = references.quantize_with_residual.reference(x, E4M3, group)
    got = on_triton(kernels.quantize_with_residual)(x, E4M3, group)
    for part, wanted in zip(got, want, strict=True):
        assert part.shape == wanted.shape and part.dtype == wanted.dtype
    np.testing.assert_array_equal(got[0].numpy(), want[0].numpy())
    assert (got[2].numpy() != want[2].numpy()).mean() < 1e-3
    back = references.dequantize_with_residual.reference(*want, E4M3, group)
    found = on_triton(kernels.dequantize_with_residual)(*want, E4M3, group)
    np.testing.assert_allclose(found.numpy(), back.numpy(), rtol=2.0**-22)
    assert np.sqrt(np.mean((back.numpy() - x.numpy()) ** 2) / np.mean(x.numpy() ** 2)) < 0.003


@pytest.mark.parametrize(("shape", "block"), [([140, 130], 128), ([7, 9], 4), ([100, 50], 48)])
def test_blocks_in_all_layouts_are_the_references(shape, block, on_triton):
    rng = np.random.default_rng(4)
    codes = paddle.to_tensor(rng.integers(0, 126, shape, dtype=np.uint8))
    scale = np.exp2(rng.integers(-9, 9, [-(-side // block) for side in shape])).astype(np.float32)
    arguments = codes, paddle.to_tensor(scale), E4M3, block, "bfloat16"
    got = on_triton(kernels.dequantize_blocks)(*arguments).astype("float32").numpy()
    np.testing.assert_array_equal(got, dequantize_blocks.reference(*arguments).astype("float32").numpy())


def test_what_residuals_and_blocks_do_not_take_is_refused_in_one_line(on_triton):
    for shape, group in (([2, 3], 128), ([2, 6], 3)):
        with pytest.raises(Unsuited, match="pairs of neighbours want even numbers"):
            on_triton(kernels.quantize_with_residual)(paddle.ones(shape), E4M3, group)
    with pytest.raises(Unsuited, match=r"codes \[4, 4\] with scales \[1, 1\], blocks of 2, to float32"):
        on_triton(kernels.dequantize_blocks)(paddle.zeros([4, 4], "uint8"), paddle.ones([1, 1]), E4M3, 2)
