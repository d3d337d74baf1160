"""Weights in FP8 with one scale for each square block, and products of FP8 matrices.

`quantize_blocks` stores a frozen weight: values = codes * scale, codes the bits of E4M3 numbers, one scale
for each 128 x 128 values (fewer at the right and lower edge). Scales are powers of two, so bfloat16 holds
every value exactly: a weight is the same number in each compute dtype, and its only error is that of the
codes. (A scale of amax / 448 would be no more exact, because E4M3 is itself a floating format.)

`scaled_matmul` multiplies activations, with a scale for each 1 x 128 values, by such a weight: y = x W and
dx = dy W^T come from the same stored weight. Products are summed in float32; a bias and the update of a LoRA
are added before the only rounding. It and `dequantize_blocks` have Triton twins, and it has one that calls
cuBLASLt, see backend.py.

Source: DeepSeek-V3 (arXiv 2412.19437) section 3.3 for the scales and where sums are kept in float32.
"""

from __future__ import annotations

import paddle

from . import backend
from .backend import Unsuited
from .formats import E4M3, TINY, BlockMatrix, Epilogue, FP8Format
from .quantize import dequantize, expand_on_cpu

BLOCK = 128
_MANTISSA_ONES, _EXPONENT_BITS = 0x007FFFFF, 0x7F800000  # of a float32


@backend.op
def scaled_matmul(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    weight: BlockMatrix,
    transpose: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen, and holds nothing)
    dtype: str = "float32",
) -> paddle.Tensor:
    """x W, or x W^T with `transpose`, plus the epilogue -> [M, N] in `dtype`.

    codes uint8 [M, K], scale float32 [M, ceil(K / 128)]: x, E4M3 in groups of 128; weight [K, N], with
    `transpose` [N, K]. Forward is transpose False with K = in, N = out; the gradient by the input is
    transpose True with K = out, N = in.
    """
    x = dequantize(codes, scale, E4M3, BLOCK)
    y = paddle.matmul(x, dequantize_blocks(weight.codes, weight.scale), transpose_y=transpose)
    return _finished(y, transpose, epilogue, dtype)


def scaled_matmul_by_paddle(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    weight: BlockMatrix,
    transpose: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen, and holds nothing)
    dtype: str = "float32",
) -> paddle.Tensor:
    """`scaled_matmul` by Paddle's `fp8_gemm_blockwise`, which is cuBLASLt's x W^T.

    codes uint8 [M, K], scale float32 [M, K / 128], weight [K, N], with `transpose` [N, K] -> [M, N] in
    `dtype`. A weight [K, N] is turned first. With an epilogue, and for other dtypes than bfloat16, the
    product is made in float32.

    Raises Unsuited where Paddle has no such function, and for sides that cuBLASLt's layouts of scales do not
    fit: M must be a multiple of 4, N of 128 and K of 512.
    """
    multiply = getattr(paddle.incubate.nn.functional, "fp8_gemm_blockwise", None)
    w, w_scale = weight.codes, weight.scale
    if not transpose:
        w, w_scale = (each.transpose([1, 0]).contiguous() for each in (w, w_scale))
    (m, k), (n, deep) = codes.shape, w.shape
    if multiply is None:
        raise Unsuited("this Paddle has no fp8_gemm_blockwise")
    if not m or m % 4 or n % BLOCK or k % (4 * BLOCK) or deep != k:
        raise Unsuited(f"a product of {[m, k]} and {[k, n]} by cuBLASLt")
    alone = epilogue.bias is None and epilogue.down is None and dtype == "bfloat16"
    y = multiply(
        codes.view(E4M3.dtype), scale.transpose([1, 0]).contiguous(), w.view(E4M3.dtype), w_scale,
        paddle.bfloat16 if alone else paddle.float32, is_a_1d_scaled=True, is_b_1d_scaled=False,
    )  # fmt: skip
    return _finished(y, transpose, epilogue, dtype)


def quantize_blocks(
    x: paddle.Tensor, fmt: FP8Format = E4M3, block: int = BLOCK
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x [R, C] float -> codes uint8 [R, C], scale float32 [ceil(R / block), ceil(C / block)].

    scale is the least power of two of at least amax / fmt.max, so no code saturates. The scale of a block
    with a NaN or an infinity is NaN, and so are all its values.
    """
    rows, columns = x.shape
    tiles = _tiles(x.astype("float32"), block)
    amax = tiles.abs().max(axis=3).max(axis=1)
    scale = _power_of_two_from(amax / fmt.max) + amax * 0.0  # inf * 0 is NaN
    codes = (tiles / expand_on_cpu(_over_tiles(scale), tiles)).astype(fmt.dtype).view("uint8")
    return _matrix(codes, rows, columns), scale


@backend.op
def dequantize_blocks(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    fmt: FP8Format = E4M3,
    block: int = BLOCK,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize_blocks`: codes uint8 [R, C] and their scale -> values [R, C] in `dtype`."""
    rows, columns = codes.shape
    values = codes.view(fmt.dtype).astype(dtype)
    if rows % block or columns % block:
        tall = scale.repeat_interleave(block, axis=0)[:rows]
        return values.multiply_(tall.repeat_interleave(block, axis=1)[:, :columns].astype(dtype))
    tiles = _tiles(values, block)
    return _matrix(tiles.multiply_(expand_on_cpu(_over_tiles(scale).astype(dtype), tiles)), rows, columns)


def _finished(y: paddle.Tensor, transpose: bool, epilogue: Epilogue, dtype: str) -> paddle.Tensor:
    """A product with the epilogue, rounded."""
    if epilogue.bias is not None:
        y = y + epilogue.bias.astype("float32")
    if epilogue.down is not None:
        down, up = epilogue.down.astype("float32"), epilogue.up.astype("float32")
        y = y + paddle.matmul(down, up, transpose_y=transpose)
    return y.astype(dtype)


def _power_of_two_from(x: paddle.Tensor) -> paddle.Tensor:
    """Round float32 up to a power of two, in the bits: exact on every device."""
    bits = paddle.clip(x, min=TINY).view("int32") + _MANTISSA_ONES
    return paddle.bitwise_and(bits, paddle.full([1], _EXPONENT_BITS, "int32")).view("float32")


def _tiles(x: paddle.Tensor, block: int) -> paddle.Tensor:
    """[R, C] -> [R / block, block, C / block, block]; a ragged edge is filled with zeros."""
    rows, columns = x.shape
    if columns % block:
        x = paddle.concat([x, paddle.zeros([rows, -columns % block], x.dtype)], axis=1)
    if rows % block:
        x = paddle.concat([x, paddle.zeros([-rows % block, x.shape[1]], x.dtype)], axis=0)
    return x.reshape([x.shape[0] // block, block, x.shape[1] // block, block])


def _matrix(tiles: paddle.Tensor, rows: int, columns: int) -> paddle.Tensor:
    """Inverse of `_tiles`, for codes or values."""
    down, block, across, _ = tiles.shape
    x = tiles.reshape([down * block, across * block])
    return x if x.shape == [rows, columns] else x[:rows, :columns].contiguous()


def _over_tiles(scale: paddle.Tensor) -> paddle.Tensor:
    return scale.unsqueeze(1).unsqueeze(3)
