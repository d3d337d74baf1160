"""The forms in which a tensor is held for backward, each with its bytes: as it is, FP8, FP8 and a half, or
not at all, but computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paddle

from ppcoat.fp8.formats import E4M3, FP8Format
from ppcoat.fp8.quantize import dequantize, quantize

FINE_STEPS = 120.0  # steps of a half byte per unit of relative distance: 7.5 / (1/16)


@dataclass(eq=False)
class PackedTensor:
    """A float tensor held as FP8: codes uint8 of its shape, scale float32 per group (or one), its dtype."""

    codes: paddle.Tensor
    scale: paddle.Tensor
    fmt: FP8Format
    group_size: int | None
    dtype: paddle.dtype

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes) + _nbytes(self.scale)

    @property
    def nbytes_bf16(self) -> int:
        """The same bytes: codes and scales do not depend on the compute dtype."""
        return self.nbytes

    @property
    def nbytes_unpacked(self) -> int:
        return self.codes.size * paddle.empty([0], self.dtype).element_size()

    def unpack(self) -> paddle.Tensor:
        """The values again, in the dtype they came in."""
        return dequantize(self.codes, self.scale, self.fmt, self.group_size, self.dtype)


@dataclass(eq=False)
class PlainTensor:
    """A tensor held as it is. `statistic`: float32 whatever the compute dtype."""

    tensor: paddle.Tensor
    statistic: bool = False

    @property
    def nbytes(self) -> int:
        return _nbytes(self.tensor)

    @property
    def nbytes_bf16(self) -> int:
        """What it would hold if the model computed in bfloat16."""
        return self.nbytes if self.statistic else _nbytes_bf16(self.tensor)

    @property
    def nbytes_unpacked(self) -> int:
        return self.nbytes

    def unpack(self) -> paddle.Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(eq=False)
class FinelyPackedTensor:
    """FP8 codes and, for each, 4 bits that say where between the neighbouring codes the value lies.

    fine: uint8, two values in a byte. Error 0.25 % RMS, a tenth of E4M3 alone.
    """

    coarse: PackedTensor
    fine: paddle.Tensor

    @property
    def nbytes(self) -> int:
        return self.coarse.nbytes + _nbytes(self.fine)

    @property
    def nbytes_bf16(self) -> int:
        """The same bytes: nothing depends on the compute dtype."""
        return self.nbytes

    @property
    def nbytes_unpacked(self) -> int:
        return self.coarse.nbytes_unpacked

    def unpack(self) -> paddle.Tensor:
        """The values again, in the dtype they came in."""
        coarse, fine = self.coarse.unpack(), self.fine.astype("float32")
        high = paddle.floor(fine / 16)
        steps = paddle.stack([fine - 16 * high, high], axis=-1).reshape(coarse.shape)
        return (coarse.astype("float32") * (1 + (steps - 8) / FINE_STEPS)).astype(coarse.dtype)


@dataclass(eq=False)
class RebuiltTensor:
    """A tensor that is not held: `again` computes it from what others hold."""

    again: Callable[[], paddle.Tensor]
    nbytes = nbytes_bf16 = nbytes_unpacked = 0

    def unpack(self) -> paddle.Tensor:
        """The values again."""
        return self.again()


HeldTensor = PackedTensor | FinelyPackedTensor | PlainTensor | RebuiltTensor


def pack_tensor(x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> PackedTensor:
    """x [..., D] float -> PackedTensor, one scale per `group_size` values (None: one for all)."""
    with paddle.no_grad():
        return PackedTensor(*quantize(x.detach(), fmt, group_size), fmt, group_size, x.dtype)


def finely_pack(x: paddle.Tensor, group_size: int | None) -> FinelyPackedTensor:
    """x [..., D] float, D even -> FinelyPackedTensor. The half byte is round(120 * (x / coarse - 1)) + 8: for
    E4M3 |x / coarse - 1| is at most 1/16, so that it lies in 0.5..15.5.
    """
    with paddle.no_grad():
        coarse = pack_tensor(x, E4M3, group_size)
        base = coarse.unpack().astype("float32")
        safe = paddle.where(base.abs() > 0, base, paddle.ones_like(base))
        steps = paddle.round((x.astype("float32") - base) / safe * FINE_STEPS).clip_(-7, 7) + 8.0
        low, high = steps.reshape([*x.shape[:-1], -1, 2]).unbind(-1)
        return FinelyPackedTensor(coarse, (low + 16 * high).astype("uint8"))


def _nbytes(x: paddle.Tensor) -> int:
    return x.size * x.element_size()


def _nbytes_bf16(x: paddle.Tensor) -> int:
    return x.size * 2 if x.dtype == paddle.float32 else _nbytes(x)
