"""Triton twins of `quantize` and `dequantize`, with and without a residual, and of `dequantize_blocks`: same
names, signatures and rules.

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

from .backend import Unsuited
from .formats import E4M3, RESIDUAL_STEPS
from .formats_triton import (
    DTYPES,
    TILE,
    dtype_name,
    empty,
    fast_inverse,
    floor_bits,
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

_RESIDUAL_STEPS = tl.constexpr(RESIDUAL_STEPS)


def quantize(x: Any, fmt: FP8Format, group_size: int | None = None) -> tuple[Any, Any]:
    """x [..., D] -> codes uint8 [..., D], scale float32 [..., ceil(D / group_size)] or [1].

    Raises Unsuited for a tensor with gaps, and for more than 8192 elements in a group.
    """
    require(x, "x", FLOATS)
    *lead, width = x.shape
    codes = empty(x, list(x.shape), "uint8")
    if group_size is not None:
        per_row = -(-width // group_size)
        scale = empty(x, [*lead, per_row], "float32")
        _quantize_groups(x, codes, scale, scale, (width, group_size, 0), fmt)
        return codes, scale
    scale, (parts, maxima) = empty(x, [1], "float32"), _maxima(x)
    _quantize_groups(x, codes, scale, maxima, (math.prod(x.shape), TILE, parts), fmt)
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


def quantize_with_residual(x: Any, fmt: FP8Format, group_size: int | None = None) -> tuple[Any, Any, Any]:
    """x [..., D] -> codes uint8 [..., D], scale as `quantize`, residual uint8 [..., D / 2].

    Raises Unsuited as `quantize` does, and for groups or rows of an odd number of elements.
    """
    require(x, "x", FLOATS)
    *lead, width = x.shape
    rows, block, layout = _pairs(x, width, group_size)
    codes, residual = empty(x, list(x.shape), "uint8"), empty(x, [*lead, width // 2], "uint8")
    parts, maxima = 0, codes
    if group_size is None:
        scale = empty(x, [1], "float32")
        parts, maxima = _maxima(x)
    else:
        scale = empty(x, [*lead, layout[-1]], "float32")
    if layout[0]:
        quantize_with_residual_kernel[(-(-layout[0] // rows),)](
            x, codes, scale, residual, maxima, parts, *layout,
            PARTS=triton.next_power_of_2(parts) if parts else 0, MANTISSA=fmt.mantissa_bits,
            NATIVE=native_fp8(), EVEN=even(*layout[1:3], block), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return codes, scale, residual


def dequantize_with_residual(
    codes: Any, scale: Any, residual: Any, fmt: FP8Format, group_size: int | None = None,
    dtype: Any = "float32",
) -> Any:  # fmt: skip
    """Inverse of `quantize_with_residual` -> values [..., D] in `dtype`. Raises Unsuited as it does."""
    for name, tensor, kind in (("codes", codes, "uint8"), ("scale", scale, "float32"),
                               ("residual", residual, "uint8")):  # fmt: skip
        require(tensor, name, (kind,))
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise Unsuited(f"dequantize to {name}; wanted {', '.join(DTYPES)}")
    rows, block, layout = _pairs(codes, codes.shape[-1], group_size)
    values = empty(codes, list(codes.shape), name)
    if layout[0]:
        dequantize_with_residual_kernel[(-(-layout[0] // rows),)](
            codes, scale, residual, values, *layout, PER_TENSOR=group_size is None,
            MANTISSA=fmt.mantissa_bits, NATIVE=native_fp8(), DTYPE=DTYPES[name],
            EVEN=even(*layout[1:3], block), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return values


def dequantize_blocks(
    codes: Any, scale: Any, fmt: FP8Format = E4M3, block: int = 128, dtype: Any = "float32"
) -> Any:
    """codes uint8 [R, C], scale float32 [ceil(R / block), ceil(C / block)] -> values [R, C] in `dtype`.
    Raises Unsuited for tensors with gaps and for scales of another shape."""
    require(codes, "codes", ("uint8",))
    require(scale, "scale", ("float32",))
    name, (height, width) = dtype_name(dtype), codes.shape
    across = -(-width // block)
    if name not in DTYPES or list(scale.shape) != [-(-height // block), across]:
        raise Unsuited(
            f"codes {list(codes.shape)} with scales {list(scale.shape)}, blocks of {block}, to {name}"
        )
    values = empty(codes, [height, width], name)
    rows, columns = group_tile(block)
    if height and width:
        dequantize_blocks_kernel[(-(-height // rows) * across,)](
            codes, scale, values, height, width, block, across, MANTISSA=fmt.mantissa_bits,
            NATIVE=native_fp8(), DTYPE=DTYPES[name], ROWS=rows, COLUMNS=columns,
        )  # fmt: skip
    return values


def _pairs(x: Any, width: int, group_size: int | None) -> tuple[int, int, tuple[int, int, int, int]]:
    """How kernels see groups of pairs of neighbours -> groups of a program, width of its tile; and number of
    groups, elements of a row, of a group, groups of a row."""
    total = math.prod(x.shape)
    width, group = (total, TILE) if group_size is None else (width, group_size)
    if width % 2 or group % 2:
        raise Unsuited(f"rows of {width} in groups of {group}: pairs of neighbours want even numbers")
    rows, block = group_tile(min(group, max(2, width)))
    per_row = -(-width // group)
    return rows, block, (total // max(1, width) * per_row, width, group, per_row)


def _maxima(x: Any) -> tuple[int, Any]:
    """First stage of a scale per tensor -> number of maxima, the maxima."""
    total = math.prod(x.shape)
    if total == 0:
        raise Unsuited("an empty tensor has no largest value")
    tiles = -(-total // TILE)
    parts = min(PARTS, tiles)
    maxima = empty(x, [parts], "float32")
    amax_kernel[(parts,)](x, maxima, total, tiles, -(-tiles // parts), TILE=TILE)
    return parts, maxima


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
    codes, _ = quantize_tile(x, p_scale, p_maxima, parts, i_group, groups, PARTS, MANTISSA, NATIVE)
    tl.store(p_codes + offset, codes, mask=inside)


@triton.jit
def quantize_tile(
    x, p_scale, p_maxima, parts, i_group, groups,
    PARTS: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Groups x [ROWS, BLOCK] float32 -> their codes uint8, and the scale [ROWS, 1] or of all, which it
    stores; PARTS as in `quantize_kernel`."""
    if PARTS:
        part = tl.arange(0, PARTS)
        maxima = tl.load(p_maxima + part.to(tl.int64), mask=part < parts, other=0.0)
        scale = scale_of(tl.max(maxima, axis=0), MANTISSA)
        codes = to_codes(x * tl.div_rn(1.0, scale), MANTISSA, NATIVE)
        tl.store(p_scale, scale, mask=tl.program_id(0) == 0)
    else:
        codes, scale = quantize_rows(x, MANTISSA, NATIVE)
        store_rows(p_scale, scale, i_group, i_group < groups)
    return codes, scale


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
def quantize_with_residual_kernel(
    p_x, p_codes, p_scale, p_residual, p_maxima, parts, groups, width, group, per_row,
    PARTS: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS groups of x; PARTS as in `quantize_kernel`. A byte of the residual is of a pair of neighbours."""
    i_group, place, present = group_offsets(groups, width, group, per_row, ROWS, BLOCK, EVEN)
    _, offset, inside = group_offsets(groups, width // 2, group // 2, per_row, ROWS, BLOCK // 2, EVEN)
    x = widened(tl.load(p_x + place, mask=present, other=0.0))
    codes, scale = quantize_tile(x, p_scale, p_maxima, parts, i_group, groups, PARTS, MANTISSA, NATIVE)
    tl.store(p_codes + place, codes, mask=present)
    # in units of the scale, where the codes are the numbers
    coarse, exact = from_codes(codes, MANTISSA, NATIVE), x * tl.div_rn(1.0, scale)
    steps = exact * fast_inverse(coarse) * _RESIDUAL_STEPS + (8.5 - _RESIDUAL_STEPS)
    steps = tl.where(tl.abs(coarse) > 0.0, tl.minimum(tl.maximum(steps, 1.0), 15.5), 8.0)  # 8 for NaN, too
    low, high = tl.split(tl.reshape(floor_bits(steps), [ROWS, BLOCK // 2, 2]))
    tl.store(p_residual + offset, ((low & 15) | (high << 4)).to(tl.uint8), mask=inside)


@triton.jit
def dequantize_with_residual_kernel(
    p_codes, p_scale, p_residual, p_values, groups, width, group, per_row,
    PER_TENSOR: tl.constexpr, MANTISSA: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_group, place, present = group_offsets(groups, width, group, per_row, ROWS, BLOCK, EVEN)
    _, offset, inside = group_offsets(groups, width // 2, group // 2, per_row, ROWS, BLOCK // 2, EVEN)
    coarse = load_values(
        p_codes, p_scale, i_group, i_group < groups, place, present, MANTISSA, PER_TENSOR, NATIVE
    )
    packed = tl.load(p_residual + offset, mask=inside, other=0).to(tl.int32)
    steps = tl.reshape(tl.join(packed & 15, packed >> 4), [ROWS, BLOCK]).to(tl.float32)
    values = coarse * ((steps - 8.0) * (1.0 / _RESIDUAL_STEPS) + 1.0)
    tl.store(p_values + place, narrowed(values, DTYPE), mask=present)


@triton.jit
def dequantize_blocks_kernel(
    p_codes, p_scale, p_values, height, width, block, across,
    MANTISSA: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one column of blocks."""
    i = tl.program_id(0).to(tl.int64)
    i_down = i // across
    i_across = i - i_down * across
    row = i_down * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inner = tl.arange(0, COLUMNS).to(tl.int64)
    column = i_across * block + inner
    inside = (row < height)[:, None] & ((inner < block) & (column < width))[None, :]
    offset = (row * width)[:, None] + column[None, :]
    codes = tl.load(p_codes + offset, mask=inside, other=0)
    scale = load_rows(p_scale, row // block * across + i_across, row < height, 0.0)
    tl.store(p_values + offset, narrowed(from_codes(codes, MANTISSA, NATIVE) * scale, DTYPE), mask=inside)


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
