"""Block-scaled FP8 against ml_dtypes' E4M3 and scales by float64 arithmetic."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8.matmul import dequantize_blocks, quantize_blocks


def weights(rows: int, columns: int) -> np.ndarray:
    """Rows of very different size, so that blocks differ."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(-8, 2, [rows, 1]))
    return (rng.standard_normal([rows, columns]) * size).astype("float32")


def emulated(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """-> values after E4M3, scales."""
    values, scales = np.empty_like(x), np.empty([-(-n // block) for n in x.shape])
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
        scale = 2.0 ** np.ceil(np.log2(np.abs(x[part]).max().astype("float64") / 448))
        values[part] = (x[part] / scale).astype(ml_dtypes.float8_e4m3fn).astype("float64") * scale
        scales[i, j] = scale
    return values, scales


@pytest.mark.parametrize(
    ("shape", "block"), [([256, 384], 128), ([200, 130], 128), ([5, 3], 128), ([40, 24], 16)]
)
def test_it_is_e4m3_with_a_power_of_two_for_each_block(shape, block):
    x = weights(*shape)
    codes, scale = quantize_blocks(paddle.to_tensor(x), block=block)
    values, scales = emulated(x, block)
    assert codes.dtype == paddle.uint8 and codes.shape == shape
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(dequantize_blocks(codes, scale, block=block).numpy(), values)
    if x.size > 1000:
        assert 0.02 < np.sqrt(np.mean((values - x) ** 2) / np.mean(x**2)) < 0.03


def test_bfloat16_holds_every_value_exactly():
    codes, scale = quantize_blocks(paddle.to_tensor(weights(256, 130)))
    exact = dequantize_blocks(codes, scale).numpy()
    np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16).astype("float32"), exact)


def test_transposing_the_codes_transposes_the_values():
    x = paddle.to_tensor(weights(200, 130))
    codes, scale = quantize_blocks(x)
    turned = [part.numpy() for part in quantize_blocks(x.t().contiguous())]
    np.testing.assert_array_equal(codes.numpy().T, turned[0])
    np.testing.assert_array_equal(scale.numpy().T, turned[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_visible_in_its_block_alone(bad):
    x = weights(256, 256)
    x[200, 3] = bad
    values = dequantize_blocks(*quantize_blocks(paddle.to_tensor(x))).numpy()
    assert np.isnan(values[128:, :128]).all()
    assert np.isfinite(values[:128]).all() and np.isfinite(values[:, 128:]).all()


def test_zeros_and_exact_numbers_stay():
    x = np.zeros([128, 128], "float32")
    assert not dequantize_blocks(*quantize_blocks(paddle.to_tensor(x))).numpy().any()
    x[0, :8] = [448, -448, 1, 2**-6, 0.875, 240, -3.5, 416]
    np.testing.assert_array_equal(dequantize_blocks(*quantize_blocks(paddle.to_tensor(x))).numpy(), x)
