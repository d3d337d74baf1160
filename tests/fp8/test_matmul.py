"""The product of FP8 matrices, reference and kernel: against float64 numpy on what ml_dtypes decodes."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8 import matmul
from ppcoat.fp8.formats import E4M3, BlockMatrix, Epilogue
from ppcoat.fp8.matmul import quantize_blocks
from ppcoat.fp8.quantize import quantize

assert matmul.scaled_matmul.name == "scaled_matmul"


def random(shape, seed):
    """Rows and columns of very different sizes, so that a wrong scale shows."""
    rng = np.random.default_rng(seed)
    sizes = [np.exp(rng.uniform(-3, 3, [side])) for side in shape]
    return (rng.standard_normal(shape) * sizes[0][:, None] * sizes[1]).astype(np.float32)


def decoded(codes, scale, block):
    """codes [R, C], a scale for each block [rows, columns] -> float64."""
    tall = np.repeat(scale.numpy().astype(np.float64), block[0], axis=0)[: codes.shape[0]]
    factors = np.repeat(tall, block[1], axis=1)[:, : codes.shape[1]]
    return codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * factors


def within_rounding(got, terms, bias=0.0):
    """Each sum within the roundings of float32, which grow with the root of the number of terms."""
    want = sum(a @ b for a, b in terms) + bias
    sizes = sum(np.abs(a) @ np.abs(b) for a, b in terms) + np.abs(bias)
    roundings = 4 + 2 * np.sqrt(sum(a.shape[1] for a, _ in terms))
    assert got.shape == list(want.shape)
    assert (np.abs(got.numpy() - want) <= roundings * 2.0**-24 * sizes).all()


@pytest.mark.parametrize(
    ("m", "k", "n"), [(5, 256, 128), (70, 200, 140), (129, 130, 1), (1, 1, 130), (3, 64, 64)]
)
@pytest.mark.parametrize("transpose", [False, True])
def test_both_directions_from_one_stored_weight(m, k, n, transpose, run):
    """transpose False: x [m, k] W [k, n]; True: dy [m, n] W^T, with the same codes and scales of W."""
    weight = quantize_blocks(paddle.to_tensor(random([k, n], 0)))
    x = quantize(paddle.to_tensor(random([m, n if transpose else k], 1)), E4M3, 128)
    w = decoded(*weight, (128, 128))
    got = run("scaled_matmul")(*x, BlockMatrix(*weight), transpose)
    assert got.dtype == paddle.float32
    within_rounding(got, [(decoded(*x, (1, 128)), w.T if transpose else w)])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 70])
def test_bias_and_lora_are_added(transpose, rank, run):
    m, k, n = 9, 130, 140
    weight = quantize_blocks(paddle.to_tensor(random([k, n], 0)))
    x = quantize(paddle.to_tensor(random([m, n if transpose else k], 1)), E4M3, 128)
    wide = k if transpose else n
    bias, down = random([1, wide], 2)[0], random([m, rank], 3)
    up = random([wide, rank] if transpose else [rank, wide], 4)
    epilogue = Epilogue(*(paddle.to_tensor(t) for t in (bias, down, up)))
    got = run("scaled_matmul")(*x, BlockMatrix(*weight), transpose, epilogue)
    w, up = decoded(*weight, (128, 128)), up.astype(np.float64)
    terms = [(decoded(*x, (1, 128)), w.T if transpose else w), (down, up.T if transpose else up)]
    within_rounding(got, terms, bias.astype(np.float64))
    alone = run("scaled_matmul")(*x, BlockMatrix(*weight), transpose, Epilogue(bias=epilogue.bias))
    within_rounding(alone, terms[:1], bias.astype(np.float64))


def test_a_nan_scale_spoils_its_row_or_its_columns_only(run):
    x, w = random([4, 256], 0), random([256, 256], 1)
    x[2, 7], w[3, 200] = np.nan, np.inf
    got = run("scaled_matmul")(
        *quantize(paddle.to_tensor(x), E4M3, 128), BlockMatrix(*quantize_blocks(paddle.to_tensor(w)))
    ).numpy()
    want = np.zeros([4, 256], bool)
    want[2], want[:, 128:] = True, True
    np.testing.assert_array_equal(np.isnan(got), want)


EDGES = np.uint8([0x00, 0x80, 0x01, 0x07, 0x08, 0x7E, 0xFE, 0x7F])  # 0, -0, subnormal, normal, 448, -448, NaN


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [1.0, 2.0**-126])
def test_every_pair_of_edge_codes(size, transpose, run):
    """Row i of x holds the i-th code, column j of W the j-th: all sums are exact, and a NaN spoils its row or
    its column. size: the smallest scale that there is, too."""
    x, w = np.tile(EDGES[:, None], [1, 130]), np.tile(EDGES, [130, 1])
    scales = np.full([len(EDGES), 2], size, np.float32), np.full([1, 2] if transpose else [2, 1], 2.0**20)
    stored = BlockMatrix(
        paddle.to_tensor(w.T.copy() if transpose else w), paddle.to_tensor(scales[1], "float32")
    )
    got = run("scaled_matmul")(paddle.to_tensor(x), paddle.to_tensor(scales[0]), stored, transpose).numpy()
    values = EDGES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    want = 130 * np.outer(values, values) * size * 2.0**20
    flushed = 130 * 448 * 2.0**20 * 2.0**-126 if size < 1 else 0.0  # x below the normal numbers may be 0
    np.testing.assert_allclose(got, want, rtol=0, atol=flushed)
