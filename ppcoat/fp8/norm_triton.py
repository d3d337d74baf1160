"""Triton twins of the norms: same names, signatures and rules.

LayerNorm and RMSNorm, with and without modulation, and their gradients, share one kernel: a
program takes one row, as a tile [groups, width of a group], so that FP8 input has one scale for each row of
the tile. RMSNorm with rotation: a program takes some heads, as a tile [heads, head_dim]. All sums are
float32, and each result is rounded once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .constants import NORM_EPSILON
from .formats_triton import (
    DTYPES,
    LARGEST_GROUP,
    Unsuited,
    dtype_name,
    empty,
    group_tile,
    narrowed,
    native_fp8,
    require,
)
from .quantize_triton import FLOATS, load_rows, load_values, readable, store_rows

if TYPE_CHECKING:
    from .formats import Groups
    from .norm import Angles

GROUP = 128  # of a tile where nothing else says
WIDE = 2048  # from so many elements on a program gets 8 warps


def modulated_norm(x: Any, shift: Any, scale: Any, groups: Groups | None = None) -> Any:
    """x [B, tokens, dim], floats or codes -> [B, tokens, dim]. Raises Unsuited for tensors with gaps and for
    more than 8192 channels."""
    return _norm(x, groups, NORM_EPSILON, scale=scale, shift=shift)


def modulated_norm_grad(x: Any, scale: Any, dy: Any, groups: Groups | None = None) -> Any:
    """-> gradient [B, tokens, dim] by x. Raises Unsuited as `modulated_norm`."""
    return _norm(x, groups, NORM_EPSILON, scale=scale, dy=dy)


def rms_norm(
    x: Any, weight: Any, scale: Any = None, epsilon: float = NORM_EPSILON, groups: Groups | None = None
) -> Any:
    """x [..., D], floats or codes -> [..., D]. Raises Unsuited as `modulated_norm`."""
    return _norm(x, groups, epsilon, weight=weight, scale=scale)


def rms_norm_grad(
    x: Any, weight: Any, scale: Any, dy: Any, epsilon: float = NORM_EPSILON, groups: Groups | None = None
) -> Any:
    """-> gradient [..., D] by x. Raises Unsuited as `modulated_norm`."""
    return _norm(x, groups, epsilon, weight=weight, scale=scale, dy=dy)


def rms_norm_rotated(x: Any, weight: Any, angles: Angles, epsilon: float = NORM_EPSILON) -> tuple[Any, Any]:
    """x [B, tokens, heads, head_dim] -> y, 1 / rms float32 [B, tokens, heads, 1]. Raises Unsuited for tensors
    with gaps and an odd head_dim."""
    programs, rest, tile = _heads(x, "x", weight, angles)
    y, rstd = empty(x, list(x.shape), dtype_name(x.dtype)), empty(x, [*x.shape[:-1], 1], "float32")
    rms_norm_rotated_kernel[(programs,)](x, weight, *angles, y, rstd, epsilon, *rest, **tile)
    return y, rstd


def rms_norm_rotated_grad(dy: Any, y: Any, rstd: Any, weight: Any, angles: Angles) -> Any:
    """-> gradient [B, tokens, heads, head_dim] by the input. Raises Unsuited as `rms_norm_rotated`."""
    programs, rest, tile = _heads(dy, "dy", weight, angles)
    require(y, "y", FLOATS)
    require(rstd, "rstd", ("float32",))
    dx = empty(dy, list(dy.shape), dtype_name(dy.dtype))
    rms_norm_rotated_grad_kernel[(programs,)](dy, y, rstd, weight, *angles, dx, *rest, **tile)
    return dx


def _norm(
    x: Any, groups: Groups | None, epsilon: float,
    weight: Any = None, scale: Any = None, shift: Any = None, dy: Any = None,
) -> Any:  # fmt: skip
    """LayerNorm, or with `weight` RMSNorm; with dy its gradient. None for each other part that is absent."""
    x_scale, mantissa, dtype = readable(x, "x", groups)
    *lead, width = x.shape
    rows, sets = math.prod(lead), 1
    for name, part in (("weight", weight), ("scale", scale), ("shift", shift), ("dy", dy)):
        if part is not None:
            require(part, name, FLOATS)
    if weight is not None and list(weight.shape) != [width]:
        raise Unsuited(f"weight {list(weight.shape)} for {list(x.shape)}; wanted [{width}]")
    if scale is not None:
        sets = _sets(x, "scale", scale)
    if shift is not None and _sets(x, "shift", shift) != sets:
        raise Unsuited(f"shift {list(shift.shape)} beside scale {list(scale.shape)}")
    group = min((groups and groups.group_size) or GROUP, width)
    per_row = -(-width // group)
    tile = triton.next_power_of_2(per_row), triton.next_power_of_2(group)
    if math.prod(tile) > LARGEST_GROUP:
        raise Unsuited(f"a norm over {width} channels; a program holds {LARGEST_GROUP}")
    result = empty(x, list(x.shape), dtype)
    if rows:
        norm_kernel[(rows,)](
            x, x_scale, *(x if part is None else part for part in (weight, scale, shift, dy)), result,
            epsilon, max(1, rows // sets), width, group, per_row,
            CENTRED=weight is None, SCALE=scale is not None, SHIFT=shift is not None,
            GRADIENT=dy is not None, MANTISSA=mantissa,
            PER_TENSOR=groups is not None and groups.group_size is None, NATIVE=native_fp8(),
            DTYPE=DTYPES[dtype], GROUPS=tile[0], BLOCK=tile[1],
            num_warps=8 if math.prod(tile) > WIDE else 4,
        )  # fmt: skip
    return result


def _sets(x: Any, name: str, modulation: Any) -> int:
    """Rows of a modulation [B, 1, dim] or [1, 1, dim]."""
    batch, width = x.shape[0], x.shape[-1]
    sets, rest = divmod(math.prod(modulation.shape), width)
    if rest or sets not in (1, batch):
        raise Unsuited(f"{name} {list(modulation.shape)} for {list(x.shape)}; wanted [{batch}, 1, {width}]")
    return sets


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
def norm_kernel(
    p_x, p_x_scale, p_weight, p_scale, p_shift, p_dy, p_result, epsilon, tokens, width, group, per_row,
    CENTRED: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, GRADIENT: tl.constexpr,
    MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of x -> one of the norm, or with GRADIENT of dx. CENTRED: LayerNorm, without a weight; else
    RMSNorm, with one. `tokens` rows of x share a row of scale and shift."""
    i_row, i_group, present, column, inside = row_tile(width, group, per_row, GROUPS, BLOCK)
    offset = i_row * width + column
    x = load_values(
        p_x, p_x_scale, i_row * per_row + i_group, present, offset, inside, MANTISSA, PER_TENSOR, NATIVE
    )
    if CENTRED:
        x = tl.where(inside, x - tile_mean(x, width), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tile_mean(x * x, width) + epsilon))
    xhat = x * rstd

    chosen = i_row // tokens * width + column
    factor = tl.where(inside, 1.0, 0.0)
    if not CENTRED:
        factor *= tl.load(p_weight + column, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        factor *= 1.0 + tl.load(p_scale + chosen, mask=inside, other=0.0).to(tl.float32)
    if GRADIENT:
        g = tl.load(p_dy + offset, mask=inside, other=0.0).to(tl.float32) * factor
        result = g - xhat * tile_mean(g * xhat, width)
        if CENTRED:
            result -= tile_mean(g, width)
        result *= rstd
    else:
        result = xhat * factor
        if SHIFT:
            result += tl.load(p_shift + chosen, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_result + offset, narrowed(result, DTYPE), mask=inside)


@triton.jit
def row_tile(width, group, per_row, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row int64; its groups int64 [GROUPS] and whether there is one; of their elements
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
def tile_mean(x, width):
    """Sum of the tile, zeros outside, over `width`."""
    return tl.sum(tl.sum(x, axis=1), axis=0) / width.to(tl.float32)


@triton.jit
def rms_norm_rotated_kernel(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, epsilon, rows, tokens, heads, dim,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS heads of x."""
    i_row, present, column, offset, inside = head_tile(rows, dim, ROWS, BLOCK)
    x = tl.load(p_x + offset, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + column, mask=column < dim, other=0.0).to(tl.float32)
    mean = tl.sum(x * x, axis=1, keep_dims=True) / dim.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon))
    cos, sin = load_angles(p_cos, p_sin, i_row, present, tokens, heads, dim, BLOCK)
    y = apply_rope(x * rstd * weight, cos, sin)
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
    xhat = tl.div_rn(apply_rope(y, cos, -sin), tl.broadcast_to(weight, y.shape))
    g = apply_rope(dy, cos, -sin) * weight
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
def apply_rope(x, cos, sin):
    """Adjacent pairs of x [R, B] as complex numbers, times cos + i sin [R, B / 2]."""
    HALF: tl.constexpr = x.shape[1] // 2
    even, odd = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
