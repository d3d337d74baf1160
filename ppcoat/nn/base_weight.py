"""A frozen weight in FP8: what stands in a Linear where a float parameter stood; and products with either.

A product with an FP8 weight turns it into the compute dtype first or, where `in_fp8` is set, rounds the other
factor to FP8 too and multiplies the codes (fp8/matmul.py): faster on a GPU that multiplies FP8, less exact.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3, BlockMatrix, Epilogue
from ppcoat.fp8.matmul import BLOCK, dequantize_blocks, quantize_blocks, scaled_matmul

from .saved_tensors import saver

SQUARED_AT_ONCE = 4 * BLOCK  # rows of a weight


def fp8_bytes(rows: int, columns: int) -> int:
    """Of an FP8Weight [rows, columns]: codes, and one float32 scale for each block."""
    return rows * columns + 4 * -(-rows // BLOCK) * -(-columns // BLOCK)


class FP8Weight(nn.Layer):
    """A weight [in, out] as E4M3 codes and a scale for each 128 x 128 block; never trained.

    codes uint8 [in, out], scale float32 [ceil(in / 128), ceil(out / 128)], both buffers: 1.0002 bytes for
    each number. `dequantized` makes the values anew for each use and stores nothing. in_fp8: see above.
    """

    stop_gradient = True
    in_fp8 = False

    def __init__(self, codes: paddle.Tensor, scale: paddle.Tensor) -> None:
        super().__init__()
        wanted = [-(-side // BLOCK) for side in codes.shape]
        if scale.shape != wanted:
            raise ConfigError(f"an FP8 weight {codes.shape} has scales {scale.shape}, wanted {wanted}")
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    @paddle.no_grad()
    def of(cls, weight: paddle.Tensor) -> FP8Weight:
        """A float weight [in, out] -> its FP8 form. Raises ConfigError if it holds NaN or infinities."""
        codes, scale = quantize_blocks(weight.detach())
        if not paddle.isfinite(scale).all().item():
            raise ConfigError("a weight with NaN or infinities cannot be quantised: fetch the model again")
        return cls(codes, scale)

    @property
    def shape(self) -> list[int]:
        """[in, out]."""
        return list(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return fp8_bytes(*self.shape)

    @paddle.no_grad()
    def dequantized(self, dtype: str | paddle.dtype) -> paddle.Tensor:
        """The weight [in, out] in `dtype`: a new tensor, exact in float32 and bfloat16."""
        return dequantize_blocks(self.codes, self.scale, dtype=dtype)

    @paddle.no_grad()
    def rows(self, own: slice) -> paddle.Tensor:
        """Some rows, from the first of a block to the last of one, float32 [rows, out]."""
        blocks = slice(own.start // BLOCK, -(-own.stop // BLOCK))
        return dequantize_blocks(self.codes[own].contiguous(), self.scale[blocks].contiguous())

    def extra_repr(self) -> str:
        return f"shape={self.shape}, E4M3 in blocks of {BLOCK} x {BLOCK}"


Weight = paddle.Tensor | FP8Weight
LowRank = tuple[paddle.Tensor, paddle.Tensor]  # two factors whose product is added


def times(
    x: paddle.Tensor, weight: Weight, bias: paddle.Tensor | None = None, update: LowRank | None = None
) -> paddle.Tensor:
    """x [..., in], weight [in, out], bias [out], update (down [..., rank], up [rank, out]) ->
    x W + bias + down up [..., out] in x's dtype. Builds no graph."""
    if isinstance(weight, FP8Weight) and weight.in_fp8:
        return _in_fp8(x, weight, False, bias, update)
    y = F.linear(x, _dense(weight, x.dtype), bias)
    return y if update is None else y.add_(paddle.matmul(*update))


def times_transposed(dy: paddle.Tensor, weight: Weight, update: LowRank | None = None) -> paddle.Tensor:
    """dy [..., out], weight [in, out], update (down [..., rank], up [in, rank]) -> dy W^T + down up^T
    [..., in] in dy's dtype. Builds no graph."""
    if isinstance(weight, FP8Weight) and weight.in_fp8:
        return _in_fp8(dy, weight, True, None, update)
    dx = paddle.matmul(dy, _dense(weight, dy.dtype), transpose_y=True)
    return dx if update is None else dx.add_(paddle.matmul(*update, transpose_y=True))


def on_device(weight: Weight) -> Weight:
    """A weight [in, out], for a product outside of its block's turn: of one that waits in page-locked main
    memory a copy, any other itself."""
    if not isinstance(weight, FP8Weight):
        return weight.cuda() if weight.place.is_cuda_pinned_place() else weight
    if not weight.codes.place.is_cuda_pinned_place():
        return weight
    copy = FP8Weight(weight.codes.cuda(), weight.scale.cuda())
    copy.in_fp8 = weight.in_fp8
    return copy


@paddle.no_grad()
def column_squares(weight: Weight) -> paddle.Tensor:
    """Sum of squares of each column of a weight [in, out], float32 [out]; beside it there are SQUARED_AT_ONCE
    rows in float32 at a time."""
    weight = on_device(weight)
    squares = paddle.zeros([weight.shape[1]])
    for start in range(0, weight.shape[0], SQUARED_AT_ONCE):
        own = slice(start, start + SQUARED_AT_ONCE)
        rows = weight.rows(own) if isinstance(weight, FP8Weight) else weight[own]
        squares.add_(rows.astype("float32").square().sum(0))
    return squares


@paddle.no_grad()
def _in_fp8(
    x: paddle.Tensor, weight: FP8Weight, transpose: bool, bias: paddle.Tensor | None, update: LowRank | None
) -> paddle.Tensor:
    x, width = x if x.is_contiguous() else x.contiguous(), x.shape[-1]
    rows = saver().fp8_form(x, E4M3, BLOCK).reshaped([x.size // width, width])  # one for all that read x
    down, up = (None, None) if update is None else (update[0].reshape([-1, update[0].shape[-1]]), update[1])
    dtype = str(x.dtype).rpartition(".")[2]
    y = scaled_matmul(rows.codes, rows.scale, BlockMatrix(weight.codes, weight.scale), transpose,
                      Epilogue(bias, down, up), dtype)  # fmt: skip
    return y.reshape([*x.shape[:-1], y.shape[-1]])


def _dense(weight: Weight, dtype: paddle.dtype) -> paddle.Tensor:
    """A weight to multiply with: itself, or for FP8 a transient in `dtype`."""
    return weight.dequantized(dtype) if isinstance(weight, FP8Weight) else weight
