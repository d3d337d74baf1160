"""Triton twins of the norms: same names, signatures and rules.

Modulated LayerNorm: a program takes one token, as a tile [groups, width of a group], so that FP8 input has
one scale for each row of the tile and so has FP8 output. RMSNorm with rotation: a program takes some heads,
as a tile [heads, head_dim]. All sums are float32, and each result is rounded once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .formats_triton import (
    DTYPES,
    LARGEST_GROUP,
    Unsuited,
    dtype_name,
    empty,
    group_tile,
    narrowed,
    native_fp8,
    quantize_rows,
    require,
)
from .quantize_triton import FLOATS, load_rows, load_values, readable, store_rows
from .rules import NORM_EPSILON

if TYPE_CHECKING:
    from .formats import FP8Format
    from .norm import Angles
    from .operands import Groups

GROUP = 128  # of a tile where nothing else says
WIDE = 2048  # from so many elements on a program gets 8 warps

_EPSILON = tl.constexpr(NORM_EPSILON)


def modulated_norm(x: Any, shift: Any, scale: Any, groups: Groups | None = None) -> Any:
    """x [B, tokens, dim], floats or codes -> [B, tokens, dim]. Raises Unsuited for tensors with gaps and for
    more than 8192 channels."""
    y = empty(x, list(x.shape), _value_dtype(x, groups))
    _modulated(x, (shift, scale), (y, y), groups)
    return y


def modulated_norm_quantized(
    x: Any, shift: Any, scale: Any, fmt: FP8Format, group_size: int
) -> tuple[Any, Any]:
    """x [B, tokens, dim] floats -> codes uint8, scale float32 [B, tokens, ceil(dim / group_size)]. Raises
    Unsuited as `modulated_norm`."""
    *lead, width = x.shape
    codes = empty(x, [*lead, width], "uint8")
    code_scale = empty(x, [*lead, -(-width // group_size)], "float32")
    _modulated(x, (shift, scale), (codes, code_scale), None, (fmt.mantissa_bits, group_size))
    return codes, code_scale


def modulated_norm_grad(x: Any, scale: Any, dy: Any, groups: Groups | None = None) -> Any:
    """-> gradient [B, tokens, dim] by x. Raises Unsuited as `modulated_norm`."""
    x_scale, mantissa, dtype = readable(x, "x", groups)
    require(dy, "dy", FLOATS)
    width, group, per_row, tile = _layout(x, groups and groups.group_size)
    rows, tokens = _rows(x, "scale", scale)
    dx = empty(x, list(x.shape), dtype)
    modulated_norm_grad_kernel[(rows,)](
        x, x_scale, scale, dy, dx, tokens, width, group, per_row,
        MANTISSA=mantissa, PER_TENSOR=_per_tensor(groups), NATIVE=native_fp8(), DTYPE=DTYPES[dtype], **tile,
    )  # fmt: skip
    return dx


def rms_norm_rotated(x: Any, weight: Any, angles: Angles) -> tuple[Any, Any]:
    """x [B, tokens, heads, head_dim] -> y, 1 / rms float32 [B, tokens, heads, 1]. Raises Unsuited for tensors
    with gaps and an odd head_dim."""
    programs, rest, tile = _heads(x, "x", weight, angles)
    y, rstd = empty(x, list(x.shape), dtype_name(x.dtype)), empty(x, [*x.shape[:-1], 1], "float32")
    rms_norm_rotated_kernel[(programs,)](x, weight, *angles, y, rstd, *rest, **tile)
    return y, rstd


def rms_norm_rotated_grad(dy: Any, y: Any, rstd: Any, weight: Any, angles: Angles) -> Any:
    """-> gradient [B, tokens, heads, head_dim] by the input. Raises Unsuited as `rms_norm_rotated`."""
    programs, rest, tile = _heads(dy, "dy", weight, angles)
    require(y, "y", FLOATS)
    require(rstd, "rstd", ("float32",))
    dx = empty(dy, list(dy.shape), dtype_name(dy.dtype))
    rms_norm_rotated_grad_kernel[(programs,)](dy, y, rstd, weight, *angles, dx, *rest, **tile)
    return dx


def _modulated(
    x: Any, modulation: tuple[Any, Any], out: tuple[Any, Any], groups: Groups | None,
    quantised: tuple[int, int | None] = (0, None),
) -> None:  # fmt: skip
    """quantised: mantissa bits and group size of an FP8 output; then `out` is codes and their scale."""
    x_scale, mantissa, dtype = readable(x, "x", groups)
    out_mantissa, group_size = quantised
    width, group, per_row, tile = _layout(x, groups.group_size if groups else group_size)
    rows, tokens = _rows(x, "shift", modulation[0])
    _rows(x, "scale", modulation[1])
    modulated_norm_kernel[(rows,)](
        x, x_scale, *modulation, *out, tokens, width, group, per_row,
        MANTISSA=mantissa, PER_TENSOR=_per_tensor(groups), OUT_MANTISSA=out_mantissa, NATIVE=native_fp8(),
        DTYPE=DTYPES[dtype], **tile,
    )  # fmt: skip


def _value_dtype(x: Any, groups: Groups | None) -> str:
    return dtype_name(x.dtype if groups is None else groups.dtype)


def _per_tensor(groups: Groups | None) -> bool:
    return groups is not None and groups.group_size is None


def _layout(x: Any, group_size: int | None) -> tuple[int, int, int, dict[str, int]]:
    """Width of a row, of a group, groups in a row; the tile [GROUPS, BLOCK] of a program."""
    width = x.shape[-1]
    group = min(group_size or GROUP, width)
    per_row = -(-width // group)
    groups, block = triton.next_power_of_2(per_row), triton.next_power_of_2(group)
    if groups * block > LARGEST_GROUP:
        raise Unsuited(f"a norm over {width} channels; a program holds {LARGEST_GROUP}")
    return width, group, per_row, {"GROUPS": groups, "BLOCK": block, "num_warps": _warps(groups * block)}


def _warps(elements: int) -> int:
    return 8 if elements > WIDE else 4


def _rows(x: Any, name: str, modulation: Any) -> tuple[int, int]:
    """Tokens in all, and tokens that share one row of the modulation [B, 1, dim] or [1, 1, dim]."""
    require(modulation, name, FLOATS)
    *lead, width = x.shape
    rows, sets = math.prod(lead), math.prod(modulation.shape) // width
    if sets * width != math.prod(modulation.shape) or sets not in (1, lead[0]):
        raise Unsuited(f"{name} {list(modulation.shape)} for {list(x.shape)}; wanted [{lead[0]}, 1, {width}]")
    return rows, max(1, rows // sets)


def _heads(x: Any, name: str, weight: Any, angles: Angles) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Programs, the kernel's sizes and its constants, for x [B, tokens, heads, head_dim]."""
    require(x, name, FLOATS)
    require(weight, "weight", FLOATS)
    for part, angle in zip(("cos", "sin"), angles, strict=True):
        require(angle, part, ("float32",))
    _, tokens, heads, dim = x.shape
    if dim % 2 or list(angles[0].shape) != [tokens, dim // 2]:
        raise Unsuited(f"angles {list(angles[0].shape)} for {list(x.shape)}; wanted {[tokens, dim / 2]}")
    rows, block = group_tile(dim)
    count = math.prod(x.shape[:-1])
    constants = {"DTYPE": DTYPES[dtype_name(x.dtype)], "ROWS": rows, "BLOCK": block}
    return -(-count // rows), (count, tokens, heads, dim), constants


@triton.jit
def modulated_norm_kernel(
    p_x, p_x_scale, p_shift, p_scale, p_y, p_y_scale, tokens, width, group, per_row,
    MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr, OUT_MANTISSA: tl.constexpr, NATIVE: tl.constexpr,
    DTYPE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. OUT_MANTISSA 0: floats, else codes and a scale for each group."""
    i_row, i_group, present, column, inside = token_tile(width, group, per_row, GROUPS, BLOCK)
    offset = i_row * width + column
    x = load_values(
        p_x, p_x_scale, i_row * per_row + i_group, present, offset, inside, MANTISSA, PER_TENSOR, NATIVE
    )
    xhat, _ = normalised(x, inside, width)
    chosen = i_row // tokens * width + column
    scale = tl.load(p_scale + chosen, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(p_shift + chosen, mask=inside, other=0.0).to(tl.float32)
    y = xhat * (1.0 + scale) + shift
    if OUT_MANTISSA == 0:
        tl.store(p_y + offset, narrowed(y, DTYPE), mask=inside)
    else:
        codes, y_scale = quantize_rows(y, OUT_MANTISSA, NATIVE)
        tl.store(p_y + offset, codes, mask=inside)
        store_rows(p_y_scale, y_scale, i_row * per_row + i_group, present)


@triton.jit
def modulated_norm_grad_kernel(
    p_x, p_x_scale, p_scale, p_dy, p_dx, tokens, width, group, per_row,
    MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_group, present, column, inside = token_tile(width, group, per_row, GROUPS, BLOCK)
    offset = i_row * width + column
    x = load_values(
        p_x, p_x_scale, i_row * per_row + i_group, present, offset, inside, MANTISSA, PER_TENSOR, NATIVE
    )
    xhat, rstd = normalised(x, inside, width)
    scale = tl.load(p_scale + i_row // tokens * width + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(p_dy + offset, mask=inside, other=0.0).to(tl.float32) * (1.0 + scale)
    dx = (g - tile_mean(g, width) - xhat * tile_mean(g * xhat, width)) * rstd
    tl.store(p_dx + offset, narrowed(dx, DTYPE), mask=inside)


@triton.jit
def token_tile(width, group, per_row, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's token int64; its groups int64 [GROUPS] and whether there is one; of their elements
    [GROUPS, BLOCK] the column int64 and whether there is one."""
    i_group = tl.arange(0, GROUPS).to(tl.int64)
    within = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    column = i_group[:, None] * group + within
    return (
        tl.program_id(0).to(tl.int64),
        i_group,
        i_group < per_row,
        column,
        (within < group) & (column < width),
    )


@triton.jit
def normalised(x, inside, width):
    """A row without mean and of variance 1, zeros outside, and its 1 / deviation."""
    centred = tl.where(inside, x - tile_mean(x, width), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tile_mean(centred * centred, width) + _EPSILON))
    return centred * rstd, rstd


@triton.jit
def tile_mean(x, width):
    """Sum of the tile, zeros outside, over `width`."""
    return tl.sum(tl.sum(x, axis=1), axis=0) / width.to(tl.float32)


@triton.jit
def rms_norm_rotated_kernel(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, rows, tokens, heads, dim,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS heads of x."""
    i_row, present, column, offset, inside = head_tile(rows, dim, ROWS, BLOCK)
    x = tl.load(p_x + offset, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + column, mask=column < dim, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1, keep_dims=True) / dim.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + _EPSILON))
    cos, sin = load_angles(p_cos, p_sin, i_row, present, tokens, heads, dim, BLOCK)
    y = turned(x * rstd * weight, cos, sin)
    tl.store(p_y + offset, narrowed(y, DTYPE), mask=inside)
    store_rows(p_rstd, rstd, i_row, present)


@triton.jit
def rms_norm_rotated_grad_kernel(
    p_dy, p_y, p_rstd, p_weight, p_cos, p_sin, p_dx, rows, tokens, heads, dim,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, present, column, offset, inside = head_tile(rows, dim, ROWS, BLOCK)
    cos, sin = load_angles(p_cos, p_sin, i_row, present, tokens, heads, dim, BLOCK)
    weight = tl.load(p_weight + column, mask=column < dim, other=1.0).to(tl.float32)
    rstd = load_rows(p_rstd, i_row, present, 0.0)
    y = tl.load(p_y + offset, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + offset, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.div_rn(turned(y, cos, -sin), tl.broadcast_to(weight, y.shape))
    g = turned(dy, cos, -sin) * weight
    along = tl.sum(g * xhat, axis=1, keep_dims=True) / dim.to(tl.float32)
    tl.store(p_dx + offset, narrowed((g - xhat * along) * rstd, DTYPE), mask=inside)


@triton.jit
def head_tile(rows, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows int64 [ROWS] and whether there is one; columns int64 [1, BLOCK]; of the elements
    [ROWS, BLOCK] the offset int64 and whether there is one."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    present = i_row < rows
    return i_row, present, column, i_row[:, None] * dim + column, present[:, None] & (column < dim)


@triton.jit
def load_angles(p_cos, p_sin, i_row, present, tokens, heads, dim, BLOCK: tl.constexpr):
    """cos, sin of the rows' tokens, each [ROWS, BLOCK / 2]."""
    half = tl.arange(0, BLOCK // 2).to(tl.int64)[None, :]
    offset = (i_row // heads % tokens * (dim // 2))[:, None] + half
    inside = present[:, None] & (half < dim // 2)
    return tl.load(p_cos + offset, mask=inside, other=0.0), tl.load(p_sin + offset, mask=inside, other=0.0)


@triton.jit
def turned(x, cos, sin):
    """Adjacent pairs of x [R, B] as complex numbers, times cos + i sin [R, B / 2]."""
    HALF: tl.constexpr = x.shape[1] // 2
    even, odd = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
