"""What only the FP8 GEMM kernel promises: one rounding to 16 bits, its tiles' order, refusals."""

import inspect
from collections import defaultdict

import numpy as np
import paddle
import pytest

from ppcoat.fp8 import backend
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import BlockMatrix, Epilogue

kernels = pytest.importorskip("ppcoat.fp8.matmul_triton", reason="Triton is not installed")


def operands(m, k, n):
    """Codes of 1 and 2 with scales of powers of two: every product and sum is exact."""
    rng = np.random.default_rng(0)
    x, w = (rng.choice(np.uint8([0x38, 0x40, 0xB8]), shape) for shape in ([m, k], [k, n]))
    scales = [
        np.exp2(rng.integers(-3, 3, shape)).astype(np.float32)
        for shape in ([m, -(-k // 128)], [-(-k // 128), -(-n // 128)])
    ]
    numbers = {0x38: 1.0, 0x40: 2.0, 0xB8: -1.0}
    values = [np.vectorize(numbers.get)(codes) for codes in (x, w)]
    exact = (values[0] * np.repeat(scales[0], 128, 1)[:, :k]) @ (
        values[1] * np.repeat(np.repeat(scales[1], 128, 0)[:k], 128, 1)[:, :n]
    )
    x, w, x_scale, w_scale = (paddle.to_tensor(t) for t in (x, w, *scales))
    return x, x_scale, BlockMatrix(w, w_scale), exact


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_result_is_rounded_once(dtype, on_triton):
    x, scale, weight, exact = operands(3, 128, 128)
    ones = paddle.full([3, 1], 1.0), paddle.full([1, 128], 2.0**-12)
    half = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0}[dtype]
    got = on_triton(kernels.scaled_matmul)(x, scale, weight, False, Epilogue(None, *ones), dtype)
    assert got.dtype == getattr(paddle, dtype)
    want = exact + 2.0**-12
    assert (np.abs(got.astype("float32").numpy() - want) <= half * np.abs(want)).all()


def test_every_tile_is_made_once(on_triton, monkeypatch):
    """Three rows and three columns of tiles, with two neighbours: the last group of tiles is not full."""
    monkeypatch.setattr(kernels, "NEIGHBOURS", 2)
    x, scale, weight, exact = operands(300, 16, 304)
    got = on_triton(kernels.scaled_matmul)(x, scale, weight)
    np.testing.assert_array_equal(got.numpy(), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_lora_of_16_bit_floats(dtype, on_triton):
    x, scale, weight, exact = operands(3, 128, 128)
    down, up = paddle.full([3, 4], 3.0).astype(dtype), paddle.full([4, 128], 0.5).astype(dtype)
    got = on_triton(kernels.scaled_matmul)(x, scale, weight, False, Epilogue(None, down, up))
    np.testing.assert_array_equal(got.numpy(), exact + 6.0)


@pytest.fixture
def hopper(on_triton, monkeypatch):
    """hopper(pairs_from) -> the kernel with what it does on sm_90: FP8 tiles, descriptors, two tiles in a
    program from that many rows on. The interpreter follows descriptors, too."""

    def built(pairs_from):
        monkeypatch.setattr(kernels, "capability", lambda: 90)
        monkeypatch.setattr(kernels, "PAIRS_FROM", pairs_from)
        return on_triton(kernels.scaled_matmul)

    return built


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n", "pairs_from"), [(3, 144, 272, 512), (70, 256, 400, 0), (130, 16, 128, 0)]
)
def test_the_path_of_hopper_is_exact_too(m, k, n, pairs_from, transpose, hopper):
    """Rows, depths and columns that end within a tile; a last pair with one tile; n of one tile makes no
    pair."""
    x, scale, weight, exact = operands(m, k, n)
    bias, down, up = paddle.arange(n).astype("float32"), paddle.full([m, 4], 3.0), paddle.full([4, n], 0.5)
    if transpose:
        weight = BlockMatrix(*(each.T.contiguous() for each in (weight.codes, weight.scale)))
        up = up.T.contiguous()
    run = hopper(pairs_from)
    np.testing.assert_array_equal(run(x, scale, weight, transpose).numpy(), exact)
    added = Epilogue(bias.astype("bfloat16"), down.astype("bfloat16"), up.astype("bfloat16"))
    got = run(x, scale, weight, transpose, added)
    want = exact + 6.0 + added.bias.astype("float32").numpy()
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize(("k", "n"), [(16, 128), (272, 144), (4, 4)])
def test_codes_are_turned_byte_for_byte(k, n, on_triton):
    codes = np.random.default_rng(0).integers(0, 256, [k, n], np.uint8)
    got = on_triton(kernels.turned)(paddle.to_tensor(codes))
    np.testing.assert_array_equal(got.numpy(), codes.T)


def test_the_scratch_is_one_weight_and_dx_needs_none(monkeypatch):
    """What is allocated for a product, the result first."""
    taken, nothing = [], defaultdict(lambda: lambda *_, **__: None)  # kernels by grid
    monkeypatch.setattr(kernels, "empty", lambda like, shape, dtype: taken.append((shape, dtype)) or like)
    monkeypatch.setattr(kernels, "scaled_matmul_kernel", nothing)
    monkeypatch.setattr(kernels, "turn_kernel", nothing)
    x, scale, weight, _ = operands(8, 144, 144)
    kernels.scaled_matmul(x, scale, weight, True)
    assert taken == [([8, 144], "float32")]
    kernels.scaled_matmul(x, scale, weight)
    assert taken[1:] == [([8, 144], "float32"), ([144, 144], "uint8")]


def test_what_the_kernel_does_not_take_is_refused_in_one_line(on_triton):
    run = on_triton(kernels.scaled_matmul)
    x, scale, weight, _ = operands(4, 128, 144)
    with pytest.raises(Unsuited, match=r"codes \[4, 64\] is not contiguous"):
        run(x[:, ::2], scale, BlockMatrix(weight.codes[:64].contiguous(), weight.scale))
    with pytest.raises(Unsuited, match=r"a product of \[4, 128\] and \[128, 144\], transpose True"):
        run(x, scale, weight, True)
    with pytest.raises(Unsuited, match=r"scale is \[4, 2\], wanted \[4, 1\]"):
        run(x, paddle.ones([4, 2]), weight)
    with pytest.raises(Unsuited, match=r"weight scale is \[1, 1\], wanted \[1, 2\]"):
        run(x, scale, BlockMatrix(weight.codes, paddle.ones([1, 1])))
    with pytest.raises(Unsuited, match=r"bias is \[128\], wanted \[144\]"):
        run(x, scale, weight, False, Epilogue(paddle.ones([128])))
    with pytest.raises(Unsuited, match=r"up is \[144, 2\], wanted \[2, 144\]"):
        run(x, scale, weight, False, Epilogue(None, paddle.ones([4, 2]), paddle.ones([144, 2])))
    odd = BlockMatrix(paddle.ones([128, 130], "uint8"), weight.scale)
    with pytest.raises(Unsuited, match=r"weight codes \[128, 130\]: rows and address must be multiples"):
        run(x, scale, odd)
    with pytest.raises(Unsuited, match="in float64"):
        run(x, scale, weight, False, Epilogue(), "float64")


def test_the_signature_is_the_references():
    twin = inspect.signature(kernels.scaled_matmul).parameters
    assert list(twin) == list(inspect.signature(backend.OPS["scaled_matmul"].reference).parameters)
