"""The forms in which a tensor is saved for backward, each with its bytes: as it is, FP8, FP8 with a 4-bit
residual, or not at all but computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import paddle

from ppcoat.fp8.formats import E4M3, FP8Format, Groups
from ppcoat.fp8.quantize import (
    dequantize,
    dequantize_with_residual,
    quantize,
    quantize_with_residual,
)


@dataclass(eq=False)
class PlainSaved:
    """A tensor of any shape, saved as it is. `statistic`: float32 whatever the compute dtype."""

    tensor: paddle.Tensor
    statistic: bool = False

    @property
    def nbytes(self) -> int:
        return _nbytes(self.tensor)

    @property
    def nbytes_bf16(self) -> int:
        """What it would take if the model computed in bfloat16."""
        return self.nbytes if self.statistic else _nbytes_bf16(self.tensor)

    @property
    def nbytes_unpacked(self) -> int:
        return self.nbytes

    def unpack(self) -> paddle.Tensor:
        """The tensor itself."""
        return self.tensor


@dataclass(eq=False)
class FP8Saved:
    """A float tensor [..., D] in FP8: codes uint8 [..., D], scale float32 [..., groups] (or [1]), its
    dtype."""

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
        return numel(self.codes) * (4 if self.dtype == paddle.float32 else 2)

    def reshaped(self, shape: list[int]) -> FP8Saved:
        """The same codes and scale for a view of the tensor with the same last axis."""
        scale = self.scale if self.group_size is None else self.scale.reshape([*shape[:-1], -1])
        return FP8Saved(self.codes.reshape(shape), scale, self.fmt, self.group_size, self.dtype)

    def unpack(self) -> paddle.Tensor:
        """The values again, in the dtype they came in."""
        return dequantize(self.codes, self.scale, self.fmt, self.group_size, self.dtype)


@dataclass(eq=False)
class ResidualSaved:
    """FP8 codes [..., D] and, for each, 4 bits that say where between the neighbouring codes the value lies.

    residual: uint8, two values in a byte. Error 0.25 % RMS, a tenth of E4M3 alone.
    """

    coarse: FP8Saved
    residual: paddle.Tensor

    @property
    def nbytes(self) -> int:
        return self.coarse.nbytes + _nbytes(self.residual)

    @property
    def nbytes_bf16(self) -> int:
        """The same bytes: nothing depends on the compute dtype."""
        return self.nbytes

    @property
    def nbytes_unpacked(self) -> int:
        return self.coarse.nbytes_unpacked

    def unpack(self) -> paddle.Tensor:
        """The values again, in the dtype they came in."""
        c = self.coarse
        return dequantize_with_residual(c.codes, c.scale, self.residual, c.fmt, c.group_size, c.dtype)


@dataclass(eq=False)
class Recomputed:
    """A tensor of any shape and dtype that is not saved: `again` computes it from what others saved."""

    again: Callable[[], paddle.Tensor]
    nbytes = nbytes_bf16 = nbytes_unpacked = 0

    def unpack(self) -> paddle.Tensor:
        """The values again."""
        return self.again()


@dataclass(eq=False)
class SharedSaved:
    """A saved tensor of any shape and dtype that several readers want in one backward pass: unpacked once for
    all of them.

    readers: how many have not had it yet; the values are there until the last one had them. Nobody may change
    them in place.
    """

    saved: FP8Saved | Recomputed
    readers: int = 0
    _values: paddle.Tensor | None = None

    def unpack(self) -> paddle.Tensor:
        """The values again; the last reader takes them away."""
        self.readers -= 1
        values = self.saved.unpack() if self._values is None else self._values
        self._values = values if self.readers > 0 else None
        return values


SavedTensor = PlainSaved | FP8Saved | ResidualSaved | Recomputed | SharedSaved


def save_fp8(x: paddle.Tensor, fmt: FP8Format, group_size: int | None) -> FP8Saved:
    """x [..., D] float -> FP8Saved, one scale per `group_size` values (None: one for all)."""
    with paddle.no_grad():
        codes, scale = quantize(x.detach(), fmt, group_size)
    return FP8Saved(codes, scale, fmt, group_size, x.dtype)


def save_residual(x: paddle.Tensor, group_size: int | None) -> ResidualSaved:
    """x [..., D] float, D even -> ResidualSaved."""
    with paddle.no_grad():
        codes, scale, residual = quantize_with_residual(x.detach(), E4M3, group_size)
        return ResidualSaved(FP8Saved(codes, scale, E4M3, group_size, x.dtype), residual)


def codes_or_floats(saved: SavedTensor) -> tuple[paddle.Tensor, Groups | None]:
    """What an FP8 op reads of a saved tensor [..., D]: its codes and how to read them, or its floats and
    None."""
    if isinstance(saved, FP8Saved):
        return saved.codes, Groups(saved.scale, saved.fmt, saved.group_size, saved.dtype)
    return saved.unpack(), None


def numel(x: paddle.Tensor) -> int:
    """How many numbers there are in x of any shape and dtype. x.size goes through NumPy: 9 microseconds, a
    thousand times a step."""
    return math.prod(x.shape)


def _nbytes(x: paddle.Tensor) -> int:
    return numel(x) * x.element_size()


def _nbytes_bf16(x: paddle.Tensor) -> int:
    return numel(x) * 2 if x.dtype == paddle.float32 else _nbytes(x)
