"""A frozen weight in FP8: what stands in a Linear where a float parameter stood."""

from __future__ import annotations

import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.fp8.blocks import BLOCK, dequantize_blocks, quantize_blocks


def fp8_bytes(rows: int, columns: int) -> int:
    """Of an FP8Weight [rows, columns]: codes, and one float32 scale for each block."""
    return rows * columns + 4 * -(-rows // BLOCK) * -(-columns // BLOCK)


class FP8Weight(nn.Layer):
    """A weight [in, out] as E4M3 codes and a scale for each 128 x 128 block; never trained.

    codes uint8 [in, out], scale float32 [ceil(in / 128), ceil(out / 128)], both buffers: 1.0002 bytes for
    each number. `dequantized` makes the values anew for each use and keeps nothing.
    """

    stop_gradient = True

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

    def extra_repr(self) -> str:
        return f"shape={self.shape}, E4M3 in blocks of {BLOCK} x {BLOCK}"


Weight = paddle.Tensor | FP8Weight


def dense(weight: Weight, dtype: paddle.dtype) -> paddle.Tensor:
    """A weight to multiply with: itself, or for FP8 a transient in `dtype`."""
    return weight.dequantized(dtype) if isinstance(weight, FP8Weight) else weight
