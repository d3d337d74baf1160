"""The product of FP8 matrices, reference and kernel: against float64 numpy on what ml_dtypes decodes."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend, matmul, truth
from ppcoat.fp8.backend import Unsuited
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
    ("m", "k", "n"), [(5, 256, 128), (70, 208, 144), (129, 144, 16), (1, 16, 272), (3, 64, 64)]
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
    m, k, n = 9, 144, 272
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


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # how a tile becomes NaN
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [1.0, 2.0**-126])
def test_every_pair_of_edge_codes(size, transpose, run):
    """Row i of x holds the i-th code, columns j and j + 8 of W the j-th: all sums are exact, and a NaN spoils
    its row or its columns. size: the smallest scale that there is, too."""
    x, w = np.tile(EDGES[:, None], [1, 144]), np.tile(EDGES, [144, 2])
    scales = np.full([len(EDGES), 2], size, np.float32), np.full([1, 2] if transpose else [2, 1], 2.0**20)
    stored = BlockMatrix(
        paddle.to_tensor(w.T.copy() if transpose else w), paddle.to_tensor(scales[1], "float32")
    )
    got = run("scaled_matmul")(paddle.to_tensor(x), paddle.to_tensor(scales[0]), stored, transpose).numpy()
    values = EDGES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    want = 144 * np.outer(values, np.tile(values, 2)) * size * 2.0**20
    flushed = 144 * 448 * 2.0**20 * 2.0**-126 if size < 1 else 0.0  # x below the normal numbers may be 0
    np.testing.assert_allclose(got, want, rtol=0, atol=flushed)


@pytest.mark.parametrize(("m", "k", "n"), [(129, 130, 1), (1, 1, 130), (70, 200, 140)])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_reference_takes_sides_that_kernels_do_not(m, k, n, transpose):
    weight = quantize_blocks(paddle.to_tensor(random([k, n], 0)))
    x = quantize(paddle.to_tensor(random([m, n if transpose else k], 1)), E4M3, 128)
    w = decoded(*weight, (128, 128))
    got = matmul.scaled_matmul.reference(*x, BlockMatrix(*weight), transpose)
    within_rounding(got, [(decoded(*x, (1, 128)), w.T if transpose else w)])


def cublaslt(a, a_scale, b, b_scale, dtype, is_a_1d_scaled, is_b_1d_scaled):
    """What Paddle's fp8_gemm_blockwise computes, on a CPU: a [M, K], a_scale [K / 128, M], b [N, K], b_scale
    [N / 128, K / 128] -> a b^T."""
    assert (is_a_1d_scaled, is_b_1d_scaled) == (True, False)
    assert a.dtype == b.dtype == paddle.float8_e4m3fn and a_scale.is_contiguous() and b_scale.is_contiguous()
    (m, k), n = a.shape, b.shape[0]
    assert a_scale.shape == [k // 128, m] and b_scale.shape == [n // 128, k // 128]
    x = a.astype("float32") * a_scale.T.repeat_interleave(128, axis=1)
    w = b.astype("float32") * b_scale.repeat_interleave(128, axis=0).repeat_interleave(128, axis=1)
    return paddle.matmul(x, w, transpose_y=True).astype(dtype)


def test_the_version_of_paddle_passes_the_check_where_it_takes_the_case(monkeypatch):
    """Its layouts, against the truth, with a stand-in for cuBLASLt; without it every call is refused."""
    op = backend.OPS["scaled_matmul"]
    monkeypatch.setattr(paddle.incubate.nn.functional, "fp8_gemm_blockwise", cublaslt)
    found = truth.errors("scaled_matmul", op.version("paddle"))
    assert set(found) == {f"{name}, bias and LoRA in bfloat16" for name in ("y = x W", "dx = dy W^T")}
    assert max(found.values()) <= 1.0
    monkeypatch.delattr(paddle.incubate.nn.functional, "fp8_gemm_blockwise")
    assert np.isnan(op.check(op.version("paddle")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_version_of_paddle_without_an_epilogue(dtype, monkeypatch):
    monkeypatch.setattr(paddle.incubate.nn.functional, "fp8_gemm_blockwise", cublaslt)
    weight = BlockMatrix(*quantize_blocks(paddle.to_tensor(random([512, 128], 0))))
    x = quantize(paddle.to_tensor(random([4, 512], 1)), E4M3, 128)
    got = matmul.scaled_matmul_by_paddle(*x, weight, dtype=dtype)
    want = matmul.scaled_matmul.reference(*x, weight)
    half = 2.0**-8 if dtype == "bfloat16" else 2.0**-16
    assert got.dtype == getattr(paddle, dtype)
    np.testing.assert_allclose(
        got.astype("float32").numpy(), want.numpy(), rtol=half, atol=float(want.abs().max()) * 2.0**-20
    )
    with pytest.raises(Unsuited, match=r"a product of \[3, 512\] and \[512, 128\] by cuBLASLt"):
        matmul.scaled_matmul_by_paddle(x[0][:3], x[1][:3], weight)
