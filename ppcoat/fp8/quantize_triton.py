"""Triton twins of `quantize` and `dequantize`: same names, signatures and rule.

A program takes some groups of the last axis as a tile [groups, width]. Per tensor, a first kernel reduces to
at most PARTS maxima, and each program of the second reads them all again: two launches, nothing on the host.
Offsets are int64. Where groups fill rows and tiles (FLUX's do) they follow each other without gaps, and
nothing is divided to find them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .formats_triton import (
    DTYPES,
    TILE,
    Unsuited,
    dtype_name,
    empty,
    from_codes,
    group_tile,
    larger,
    narrowed,
    native_fp8,
    quantize_rows,
    require,
    row_amax,
    scale_of,
    to_codes,
    widened,
)

if TYPE_CHECKING:
    from .formats import FP8Format, Groups

PARTS = 1024  # maxima of the first stage
FLOATS = tuple(DTYPES)


def quantize(x: Any, fmt: FP8Format, group_size: int | None = None) -> tuple[Any, Any]:
    """x [..., D] -> codes uint8 [..., D], scale float32 [..., ceil(D / group_size)] or [1].

    Raises Unsuited for a tensor with gaps, and for more than 8192 elements in a group.
    """
    require(x, "x", FLOATS)
    *lead, width = x.shape
    total = math.prod(x.shape)
    codes = empty(x, list(x.shape), "uint8")
    if group_size is not None:
        per_row = -(-width // group_size)
        scale = empty(x, [*lead, per_row], "float32")
        _quantize_groups(x, codes, scale, scale, (width, group_size, 0), fmt)
        return codes, scale
    scale = empty(x, [1], "float32")
    if total == 0:
        raise Unsuited("an empty tensor has no largest value")
    tiles = -(-total // TILE)
    parts = min(PARTS, tiles)
    maxima = empty(x, [parts], "float32")
    amax_kernel[(parts,)](x, maxima, total, tiles, -(-tiles // parts), TILE=TILE)
    _quantize_groups(x, codes, scale, maxima, (total, TILE, parts), fmt)
    return codes, scale


def dequantize(
    codes: Any, scale: Any, fmt: FP8Format, group_size: int | None = None, dtype: Any = "float32"
) -> Any:
    """Inverse of `quantize` -> values [..., D] in `dtype` (float32, bfloat16 or float16). Raises Unsuited for
    another one."""
    require(codes, "codes", ("uint8",))
    require(scale, "scale", ("float32",))
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise Unsuited(f"dequantize to {name}; wanted {', '.join(DTYPES)}")
    values = empty(codes, list(codes.shape), name)
    total = math.prod(codes.shape)
    width, group = (total, TILE) if group_size is None else (codes.shape[-1], group_size)
    rows, block = group_tile(min(group, max(1, width)))
    groups = total // max(1, width) * -(-width // group)
    if groups:
        dequantize_kernel[(-(-groups // rows),)](
            codes, scale, values, groups, width, group, -(-width // group),
            PER_TENSOR=group_size is None, MANTISSA=fmt.mantissa_bits, NATIVE=native_fp8(),
            DTYPE=DTYPES[name], EVEN=even(width, group, block), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return values


def readable(x: Any, name: str, groups: Groups | None) -> tuple[Any, int, str]:
    """x floats, or codes that `groups` tells how to read -> scale (x itself for floats), mantissa bits (0 for
    floats), dtype of the values. Raises Unsuited for what `load_values` does not read."""
    if groups is None:
        require(x, name, FLOATS)
        return x, 0, dtype_name(x.dtype)
    require(x, name, ("uint8",))
    require(groups.scale, f"scale of {name}", ("float32",))
    return groups.scale, groups.fmt.mantissa_bits, dtype_name(groups.dtype)


def even(width: int, group: int, block: int) -> bool:
    """Whether groups fill rows of `width` elements and tiles of `block` columns."""
    return group == block and width % group == 0


def _quantize_groups(
    x: Any, codes: Any, scale: Any, maxima: Any, layout: tuple[int, int, int], fmt: FP8Format
) -> None:
    """layout: width of a row, elements of a group, number of maxima (0: each group has its own scale)."""
    width, group, parts = layout
    rows, block = group_tile(min(group, max(1, width)))
    per_row = -(-width // group)
    groups = math.prod(x.shape) // max(1, width) * per_row
    if groups:
        quantize_kernel[(-(-groups // rows),)](
            x, codes, scale, maxima, parts, groups, width, group, per_row,
            PARTS=triton.next_power_of_2(parts) if parts else 0, MANTISSA=fmt.mantissa_bits,
            NATIVE=native_fp8(), EVEN=even(width, group, block), ROWS=rows, BLOCK=block,
        )  # fmt: skip


@triton.jit
def quantize_kernel(
    p_x, p_codes, p_scale, p_maxima, parts, groups, width, group, per_row,
    PARTS: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS groups of x. PARTS 0: a scale for each group, else one for all from `parts` maxima."""
    i_group, offset, inside = group_offsets(groups, width, group, per_row, ROWS, BLOCK, EVEN)
    x = widened(tl.load(p_x + offset, mask=inside, other=0.0))
    if PARTS:
        part = tl.arange(0, PARTS)
        maxima = tl.load(p_maxima + part.to(tl.int64), mask=part < parts, other=0.0)
        scale = scale_of(tl.max(maxima, axis=0), MANTISSA)
        codes = to_codes(x * tl.div_rn(1.0, scale), MANTISSA, NATIVE)
        tl.store(p_scale, scale, mask=tl.program_id(0) == 0)
    else:
        codes, scale = quantize_rows(x, MANTISSA, NATIVE)
        store_rows(p_scale, scale, i_group, i_group < groups)
    tl.store(p_codes + offset, codes, mask=inside)


@triton.jit
def dequantize_kernel(
    p_codes, p_scale, p_values, groups, width, group, per_row,
    PER_TENSOR: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_group, offset, inside = group_offsets(groups, width, group, per_row, ROWS, BLOCK, EVEN)
    values = load_values(
        p_codes, p_scale, i_group, i_group < groups, offset, inside, MANTISSA, PER_TENSOR, NATIVE
    )
    tl.store(p_values + offset, narrowed(values, DTYPE), mask=inside)


@triton.jit
def amax_kernel(p_x, p_maxima, total, tiles, tiles_each, TILE: tl.constexpr):
    """First stage: the largest magnitude in `tiles_each` neighbouring tiles; infinite as in `row_amax`."""
    i_part = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([1, TILE], dtype=tl.float32)
    for i in range(0, tiles_each):
        offset = (i_part * tiles_each + i) * TILE + tl.arange(0, TILE).to(tl.int64)[None, :]
        x = widened(tl.load(p_x + offset, mask=offset < total, other=0.0))
        largest = larger(largest, tl.abs(x))
    tl.store(p_maxima + i_part + tl.zeros([1, 1], tl.int64), row_amax(largest))


@triton.jit
def group_offsets(
    groups, width, group, per_row, ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr = False
):
    """This program's groups int64 [ROWS], and of their elements [ROWS, BLOCK] the int64 offset and whether
    there is one. A row of `width` elements has `per_row` groups, the last one perhaps shorter. EVEN: none is
    shorter and all are BLOCK wide (`even`), so that neither division nor a look at columns is needed."""
    i_group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    inside = (i_group < groups)[:, None]
    if EVEN:
        offset = i_group[:, None] * BLOCK + column
    else:
        i_row = i_group // per_row
        start = (i_group - i_row * per_row) * group
        inside = inside & (column < group) & (start[:, None] + column < width)
        offset = (i_row * width + start)[:, None] + column
    return i_group, offset, inside


@triton.jit
def load_values(
    p_x, p_scale, i_group, present, offset, inside,
    MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `readable` describes -> float32, zeros where there is nothing. The scale of a row of the tile is
    that of group i_group, or one for all."""
    if MANTISSA == 0:
        values = widened(tl.load(p_x + offset, mask=inside, other=0.0))
    else:
        values = from_codes(tl.load(p_x + offset, mask=inside, other=0), MANTISSA, NATIVE)
        if PER_TENSOR:
            values *= tl.load(p_scale)
        else:
            values *= load_rows(p_scale, i_group, present, 0.0)
    return values


@triton.jit
def load_rows(p, i_group, present, other):
    """One value for each group -> [ROWS, 1]. Read as a vector: read as a column, each thread of a row would
    read it again and again."""
    return tl.load(p + i_group, mask=present, other=other)[:, None]


@triton.jit
def store_rows(p, values, i_group, present):
    """Inverse of `load_rows`."""
    tl.store(p + i_group, tl.reshape(values, i_group.shape), mask=present)
