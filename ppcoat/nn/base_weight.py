"""A frozen weight in one of four formats: what stands in a Linear where a float parameter stood; and products
with any of them or with floats.

| format | bits a weight | stored |
|---|---|---|
| fp8 | 8.002 | E4M3, a power of two for each 128 x 128 values |
| int8 | 8.25 | whole numbers, a float32 scale for each 128 inputs of an output |
| nf4 | 4.127 | bitsandbytes' NF4, doubly quantised |
| fp4 | 4.5 | our levels, a scale of a byte for 16 inputs of an output |

A product makes the weight anew in the compute dtype for each use and keeps nothing. An FP8 weight can, where
`in_fp8` is set, be multiplied as it is: the other factor is rounded to FP8 too and the codes are multiplied
(fp8/matmul.py), which is faster on a GPU that multiplies FP8, and less exact. FP8 lies as [in, out]; the
other formats as [out, in], so that the values of a scale are neighbours, and the product transposes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeAlias

import paddle
import paddle.nn.functional as F
from paddle import nn

from ppcoat.device import dtype_name
from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3, INT8, BlockMatrix, Epilogue
from ppcoat.fp8.four_bit import (
    dequantize_fp4,
    dequantize_nf4,
    fp4_scales,
    quantize_absmax,
    quantize_fp4,
    quantize_nf4,
)
from ppcoat.fp8.matmul import BLOCK, dequantize_blocks, quantize_blocks, scaled_matmul
from ppcoat.fp8.quantize import dequantize, quantize

from .saved_tensors import saver

SQUARED_AT_ONCE = 4 * BLOCK  # rows of a weight


Layout = dict[str, tuple[str, list[int]]]  # part -> its dtype as safetensors names it, and its shape


class BaseWeight(nn.Layer):
    """A weight [in, out] in a format of its own; never trained. Its parts are buffers.

    A format says which parts there are (`layout`), how a float weight becomes them (`of_rows`) and how it is
    made anew (`matrix`).
    """

    stop_gradient = True
    name: ClassVar[str]  # the format's, for users
    about: ClassVar[str]  # the format's, in files: with another text the parts mean something else

    def __init__(self, shape: Sequence[int], **parts: paddle.Tensor) -> None:
        """shape: [in, out]. Raises ConfigError for parts that are not as in `layout`."""
        super().__init__()
        self.shape = list(shape)
        for part, (_, wanted) in self.layout(self.shape).items():
            if parts[part].shape != wanted:
                came = list(parts[part].shape)
                raise ConfigError(f"{part} of an {self.name} weight {self.shape} is {came}, wanted {wanted}")
            self.register_buffer(part, parts[part])

    @classmethod
    def layout(cls, shape: Sequence[int]) -> Layout:
        """The parts of a weight [in, out], in the order in which they are stored."""
        raise NotImplementedError

    @classmethod
    def bytes_of(cls, shape: Sequence[int]) -> int:
        """Bytes that a weight [in, out] takes."""
        parts = cls.layout(shape).values()
        return sum(math.prod(part) * (4 if dtype == "F32" else 1) for dtype, part in parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all it holds."""
        return self.bytes_of(self.shape)

    @classmethod
    def of(cls, weight: paddle.Tensor) -> BaseWeight:
        """A float weight [in, out] -> its quantised form. Raises ConfigError if it holds NaN, infinities or
        what the format cannot hold."""
        return cls.of_rows([weight.detach().t()])

    @classmethod
    def of_rows(cls, bands: Iterable[paddle.Tensor]) -> BaseWeight:
        """`of` for a weight that comes as float [out, in], some rows at a time: a multiple of BLOCK, but the
        last ones. A band is not held after its turn."""
        raise NotImplementedError

    def matrix(self, dtype: str | paddle.dtype) -> tuple[paddle.Tensor, bool]:
        """The weight in `dtype`, a new tensor, and whether it is [out, in]; else it is [in, out]."""
        raise NotImplementedError

    def dequantized(self, dtype: str | paddle.dtype) -> paddle.Tensor:
        """The weight [in, out] in `dtype`: a new tensor."""
        matrix, transposed = self.matrix(dtype)
        return matrix.t().contiguous() if transposed else matrix

    def extra_repr(self) -> str:
        return f"shape={self.shape}, {self.name}"


def _by_band(
    quantized: Callable[[paddle.Tensor], tuple[paddle.Tensor, ...]], bands: Iterable[paddle.Tensor]
) -> tuple[list[int], list[paddle.Tensor]]:
    """The shape [in, out] of a weight, and what `quantized` makes of each band, one after the other."""
    made, rows, columns = [], 0, 0
    for band in bands:
        made.append(quantized(band))
        rows, columns = rows + band.shape[0], band.shape[1]
    return [columns, rows], [paddle.concat(list(each)) for each in zip(*made, strict=True)]


def _require_finite(scale: paddle.Tensor) -> None:
    if not paddle.isfinite(scale).all().item():
        raise ConfigError("a weight with NaN or infinities cannot be quantised: fetch the model again")


class FP8Weight(BaseWeight):
    """A weight [in, out] as E4M3 codes and a scale for each 128 x 128 block.

    codes uint8 [in, out], scale float32 [ceil(in / 128), ceil(out / 128)]: 1.0002 bytes for each number.
    Exact in float32 and bfloat16. in_fp8: see above.
    """

    name, about = "FP8", f"E4M3, blocks of {BLOCK} x {BLOCK}, scales powers of two"
    in_fp8 = False

    @classmethod
    def layout(cls, shape: Sequence[int]) -> Layout:
        return {"codes": ("U8", list(shape)), "scale": ("F32", [-(-side // BLOCK) for side in shape])}

    @classmethod
    @paddle.no_grad()
    def of(cls, weight: paddle.Tensor) -> FP8Weight:
        codes, scale = quantize_blocks(weight.detach())
        _require_finite(scale)
        return cls(weight.shape, codes=codes, scale=scale)

    @classmethod
    @paddle.no_grad()
    def of_rows(cls, bands: Iterable[paddle.Tensor]) -> FP8Weight:
        shape, (codes, scale) = _by_band(quantize_blocks, bands)
        _require_finite(scale)
        return cls(shape, codes=codes.t().contiguous(), scale=scale.t().contiguous())

    @paddle.no_grad()
    def matrix(self, dtype: str | paddle.dtype) -> tuple[paddle.Tensor, bool]:
        return dequantize_blocks(self.codes, self.scale, dtype=dtype), False

    @paddle.no_grad()
    def rows(self, own: slice) -> paddle.Tensor:
        """Some rows, from the first of a block to the last of one, float32 [rows, out]."""
        blocks = slice(own.start // BLOCK, -(-own.stop // BLOCK))
        return dequantize_blocks(self.codes[own].contiguous(), self.scale[blocks].contiguous())


class Int8Weight(BaseWeight):
    """A weight [in, out] as whole numbers of 8 bits.

    codes uint8 [out, in], the bits of int8; scale float32 [out, ceil(in / 128)]: 1.03 bytes for each number.
    """

    name, about = "INT8", f"INT8, groups of {BLOCK} inputs"

    @classmethod
    def layout(cls, shape: Sequence[int]) -> Layout:
        columns, rows = shape
        return {"codes": ("U8", [rows, columns]), "scale": ("F32", [rows, -(-columns // BLOCK)])}

    @classmethod
    @paddle.no_grad()
    def of_rows(cls, bands: Iterable[paddle.Tensor]) -> Int8Weight:
        shape, (codes, scale) = _by_band(lambda band: quantize(band.contiguous(), INT8, BLOCK), bands)
        _require_finite(scale)
        return cls(shape, codes=codes, scale=scale)

    @paddle.no_grad()
    def matrix(self, dtype: str | paddle.dtype) -> tuple[paddle.Tensor, bool]:
        return dequantize(self.codes, self.scale, INT8, BLOCK, dtype), True


class FP4Weight(BaseWeight):
    """A weight [in, out] as `quantize_fp4` of fp8/four_bit.py makes it of [out, in].

    codes uint8 [ceil(N / 2)], scale uint8 [ceil(N / 16)], N = in * out: 0.5625 bytes for each number.
    """

    name, about = "FP4", "FP4 of ppcoat, 16 values a scale"

    @classmethod
    def layout(cls, shape: Sequence[int]) -> Layout:
        count = math.prod(shape)
        return {"codes": ("U8", [-(-count // 2)]), "scale": ("U8", [-(-count // 16)])}

    @classmethod
    @paddle.no_grad()
    def of_rows(cls, bands: Iterable[paddle.Tensor]) -> FP4Weight:
        shape, (codes, scale) = _by_band(quantize_fp4, bands)
        if not paddle.isfinite(fp4_scales(scale)).all().item():
            raise ConfigError(
                "a weight with NaN, infinities or a number above 22.9 cannot be stored in FP4: fetch the "
                "model again, or take int8"
            )
        return cls(shape, codes=codes, scale=scale)

    @paddle.no_grad()
    def matrix(self, dtype: str | paddle.dtype) -> tuple[paddle.Tensor, bool]:
        return dequantize_fp4(self.codes, self.scale, self.shape[::-1], dtype), True


class NF4Weight(BaseWeight):
    """A weight [in, out] as bitsandbytes stores [out, in] in NF4 with double quantisation.

    codes uint8 [ceil(N / 2)], absmax uint8 [n], n = ceil(N / 64), absmax_scale float32 [ceil(n / 256)],
    absmax_offset float32 [1], N = in * out: 0.516 bytes for each number.
    """

    name, about = "NF4", "NF4 of bitsandbytes, doubly quantised"

    @classmethod
    def layout(cls, shape: Sequence[int]) -> Layout:
        count = math.prod(shape)
        scales = -(-count // 64)
        return {
            "codes": ("U8", [-(-count // 2)]),
            "absmax": ("U8", [scales]),
            "absmax_scale": ("F32", [-(-scales // 256)]),
            "absmax_offset": ("F32", [1]),
        }

    @classmethod
    @paddle.no_grad()
    def of_rows(cls, bands: Iterable[paddle.Tensor]) -> NF4Weight:
        shape, (codes, absmax) = _by_band(quantize_nf4, bands)
        _require_finite(absmax)
        absmax, scale, offset = quantize_absmax(absmax)
        return cls(shape, codes=codes, absmax=absmax, absmax_scale=scale, absmax_offset=offset)

    @paddle.no_grad()
    def matrix(self, dtype: str | paddle.dtype) -> tuple[paddle.Tensor, bool]:
        scale = self.absmax, self.absmax_scale, self.absmax_offset
        return dequantize_nf4(self.codes, scale, self.shape[::-1], dtype), True


BASES = {"fp8": FP8Weight, "int8": Int8Weight, "nf4": NF4Weight, "fp4": FP4Weight}
Weight: TypeAlias = paddle.Tensor | BaseWeight
LowRank = tuple[paddle.Tensor, paddle.Tensor]  # two factors whose product is added


def times(
    x: paddle.Tensor, weight: Weight, bias: paddle.Tensor | None = None, update: LowRank | None = None
) -> paddle.Tensor:
    """x [..., in], weight [in, out], bias [out], update (down [..., rank], up [rank, out]) ->
    x W + bias + down up [..., out] in x's dtype. Builds no graph."""
    if isinstance(weight, FP8Weight) and weight.in_fp8:
        return _in_fp8(x, weight, False, bias, update)
    matrix, transposed = _matrix(weight, x.dtype)
    if transposed:
        y = paddle.matmul(x, matrix, transpose_y=True)
        y = y if bias is None else y.add_(bias)
    else:
        y = F.linear(x, matrix, bias)
    return y if update is None else y.add_(paddle.matmul(*update))


def times_transposed(dy: paddle.Tensor, weight: Weight, update: LowRank | None = None) -> paddle.Tensor:
    """dy [..., out], weight [in, out], update (down [..., rank], up [in, rank]) -> dy W^T + down up^T
    [..., in] in dy's dtype. Builds no graph."""
    if isinstance(weight, FP8Weight) and weight.in_fp8:
        return _in_fp8(dy, weight, True, None, update)
    matrix, transposed = _matrix(weight, dy.dtype)
    dx = paddle.matmul(dy, matrix, transpose_y=not transposed)
    return dx if update is None else dx.add_(paddle.matmul(*update, transpose_y=True))


def on_device(weight: Weight) -> Weight:
    """A weight [in, out], for a product outside of its block's turn: of one that waits in page-locked main
    memory a copy, any other itself."""
    if not isinstance(weight, BaseWeight):
        return weight.cuda() if weight.place.is_cuda_pinned_place() else weight
    if not any(buffer.place.is_cuda_pinned_place() for buffer in weight.buffers()):
        return weight
    moved = copy.copy(weight)
    moved.__dict__["_buffers"] = {name: buffer.cuda() for name, buffer in weight.named_buffers()}
    return moved


@paddle.no_grad()
def column_squares(weight: Weight) -> paddle.Tensor:
    """Sum of squares of each column of a weight [in, out], float32 [out]; beside it there are SQUARED_AT_ONCE
    rows in float32 at a time, or all of them of a format that is not made anew in rows."""
    weight = on_device(weight)
    if isinstance(weight, BaseWeight) and not isinstance(weight, FP8Weight):
        weight = weight.dequantized("float32")
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
    y = scaled_matmul(rows.codes, rows.scale, BlockMatrix(weight.codes, weight.scale), transpose,
                      Epilogue(bias, down, up), dtype_name(x.dtype))  # fmt: skip
    return y.reshape([*x.shape[:-1], y.shape[-1]])


def _matrix(weight: Weight, dtype: paddle.dtype) -> tuple[paddle.Tensor, bool]:
    """A weight to multiply with, itself or a transient in `dtype`, and whether it is [out, in]."""
    return weight.matrix(dtype) if isinstance(weight, BaseWeight) else (weight, False)
