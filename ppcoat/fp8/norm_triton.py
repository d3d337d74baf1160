"""Triton twins of the norms: same names, signatures and rules.

LayerNorm and RMSNorm, with and without modulation, and their gradients, share one kernel: a program takes one
row, RMSNorm with rotation all heads of one token. Both hold it as tiles [groups, width of a group], so that
FP8 input has one scale for each row of a tile, and in as many parts as it takes for none to be padded. All
sums are float32, and each result is rounded once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .backend import Unsuited
from .formats import NORM_EPSILON
from .formats_triton import (
    DTYPES,
    LARGEST_GROUP,
    dtype_name,
    empty,
    fast_inverse,
    fast_rsqrt,
    narrowed,
    native_fp8,
    require,
    widened,
)
from .quantize_triton import FLOATS, load_rows, load_values, readable, store_rows

if TYPE_CHECKING:
    from .formats import Groups
    from .norm import Angles

GROUP = 128  # of a tile where nothing else says
VECTOR = 8  # elements that a thread reads at once
MOST_PARTS = 9  # tiles of a row


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
    with gaps, an odd head_dim and more than 8192 channels."""
    programs, rest, tile = _heads(x, "x", weight, angles)
    y, rstd = empty(x, list(x.shape), dtype_name(x.dtype)), empty(x, [*x.shape[:-1], 1], "float32")
    if programs:
        rms_norm_rotated_kernel[(programs,)](x, weight, *angles, y, rstd, epsilon, *rest, **tile)
    return y, rstd


def rms_norm_rotated_grad(dy: Any, y: Any, rstd: Any, weight: Any, angles: Angles) -> Any:
    """-> gradient [B, tokens, heads, head_dim] by the input. Raises Unsuited as `rms_norm_rotated`."""
    programs, rest, tile = _heads(dy, "dy", weight, angles)
    require(y, "y", FLOATS)
    require(rstd, "rstd", ("float32",))
    dx = empty(dy, list(dy.shape), dtype_name(dy.dtype))
    if programs:
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
    result, group = empty(x, list(x.shape), dtype), (groups and groups.group_size) or GROUP
    tile = _tile(width, min(group, width))
    if rows:
        norm_kernel[(rows,)](
            x, x_scale, *(x if part is None else part for part in (weight, scale, shift, dy)), result,
            epsilon, 1.0 / width, max(1, rows // sets), width, *tile.sizes,
            CENTRED=weight is None, SCALE=scale is not None, SHIFT=shift is not None,
            GRADIENT=dy is not None, MANTISSA=mantissa,
            PER_TENSOR=groups is not None and groups.group_size is None, NATIVE=native_fp8(),
            DTYPE=DTYPES[dtype], **tile.constants,
        )  # fmt: skip
    return result


@dataclass(frozen=True)
class Tile:
    """How a program holds a row, or the heads of a token. sizes: elements of a group, groups of a row;
    constants: the kernel's."""

    sizes: tuple[int, int]
    constants: dict[str, Any]


@functools.cache
def _tile(width: int, group: int) -> Tile:
    """Where whole groups fill a row, it is taken in a few parts whose groups are a power of two, as those of
    a tile must be: FLUX's 24 groups are three parts of 8. Raises Unsuited for a row that does not fit."""
    per_row, block = -(-width // group), triton.next_power_of_2(group)
    part = per_row & -per_row
    if width % group or per_row > part * MOST_PARTS:
        part = triton.next_power_of_2(per_row)
    parts = -(-per_row // part)
    if part * parts * block > LARGEST_GROUP:
        raise Unsuited(f"a norm over {width} channels; a program holds {LARGEST_GROUP}")
    constants = {
        "PARTS": parts,
        "EVEN": group == block and per_row == part * parts and width % group == 0,
        "GROUPS": part,
        "BLOCK": block,
        "num_warps": min(8, max(1, part * block // (32 * VECTOR))),
    }
    return Tile((group, per_row), constants)


def _sets(x: Any, name: str, modulation: Any) -> int:
    """Rows of a modulation [B, 1, dim] or [1, 1, dim]."""
    batch, width = x.shape[0], x.shape[-1]
    sets, rest = divmod(math.prod(modulation.shape), width)
    if rest or sets not in (1, batch):
        raise Unsuited(f"{name} {list(modulation.shape)} for {list(x.shape)}; wanted [{batch}, 1, {width}]")
    return sets


def _heads(x: Any, name: str, weight: Any, angles: Angles) -> tuple[int, tuple[float, ...], dict[str, Any]]:
    """Programs, the kernel's sizes and its constants, for x [B, tokens, heads, head_dim]."""
    require(x, name, FLOATS)
    require(weight, "weight", FLOATS)
    for part, angle in zip(("cos", "sin"), angles, strict=True):
        require(angle, part, ("float32",))
    _, tokens, heads, dim = x.shape
    if dim % 2 or list(angles[0].shape) != [tokens, dim // 2]:
        raise Unsuited(f"angles {list(angles[0].shape)} for {list(x.shape)}; wanted {[tokens, dim / 2]}")
    tile = _tile(heads * dim, dim)
    constants = {"DTYPE": DTYPES[dtype_name(x.dtype)], **tile.constants}
    return math.prod(x.shape[:2]), (1.0 / dim, tokens, heads * dim, *tile.sizes), constants


@triton.jit
def norm_kernel(
    p_x, p_x_scale, p_weight, p_scale, p_shift, p_dy, p_result, epsilon, each, tokens, width, group, per_row,
    CENTRED: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, GRADIENT: tl.constexpr,
    MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr,
    PARTS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of x -> one of the norm, or with GRADIENT of dx. CENTRED: LayerNorm, without a weight; else
    RMSNorm, with one. `tokens` rows of x share a row of scale and shift; `each`: 1 / width."""
    i_group, present, column, inside = row_tile(width, group, per_row, EVEN, GROUPS, BLOCK)
    # Parts are added to the pointers last and as constants: so a thread computes one address for a tensor.
    step = GROUPS * (BLOCK if EVEN else group)
    i_row = tl.program_id(0).to(tl.int64)
    row, chosen = i_row * width, i_row // tokens * width
    p_x, p_dy, p_result = p_x + row + column, p_dy + row + column, p_result + row + column
    p_weight, p_scale, p_shift = p_weight + column, p_scale + chosen + column, p_shift + chosen + column
    if MANTISSA and not PER_TENSOR:
        p_x_scale += i_row * per_row + i_group
    xs, total = (), 0.0
    for part in tl.static_range(PARTS):
        x = load_values(
            p_x, p_x_scale, part * GROUPS, present, part * step, inside, MANTISSA, PER_TENSOR, NATIVE
        )
        xs, total = xs + (x,), x if part == 0 else total + x
    mean = tile_sum(total) * each if CENTRED else 0.0

    centred, squares = (), 0.0
    for part in tl.static_range(PARTS):
        x = tl.where(inside, xs[part] - mean, 0.0) if CENTRED else xs[part]
        centred, squares = centred + (x,), x * x if part == 0 else squares + x * x
    rstd = fast_rsqrt(tile_sum(squares) * each + epsilon)

    gs, along, g_total = (), 0.0, 0.0
    for part in tl.static_range(PARTS):
        factor = tl.full([GROUPS, BLOCK], 1.0, tl.float32)
        if not CENTRED:
            factor = widened(tl.load(p_weight + part * step, mask=inside, other=0.0))
        if SCALE:
            factor *= 1.0 + widened(tl.load(p_scale + part * step, mask=inside, other=0.0))
        if GRADIENT:
            g = widened(tl.load(p_dy + part * step, mask=inside, other=0.0)) * factor
            gs, turned = gs + (g,), g * centred[part]
            along, g_total = (turned, g) if part == 0 else (along + turned, g_total + g)
        else:
            result = centred[part] * rstd * factor
            if SHIFT:
                result += widened(tl.load(p_shift + part * step, mask=inside, other=0.0))
            tl.store(p_result + part * step, narrowed(result, DTYPE), mask=inside)
    if GRADIENT:  # (g - xhat mean(g xhat) - mean(g)) rstd, with xhat = centred rstd
        turn = tile_sum(along) * each * rstd * rstd * rstd
        shift = tile_sum(g_total) * each * rstd if CENTRED else 0.0
        for part in tl.static_range(PARTS):
            result = gs[part] * rstd - (centred[part] * turn + shift)
            tl.store(p_result + part * step, narrowed(result, DTYPE), mask=inside)


@triton.jit
def row_tile(width, group, per_row, EVEN: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the first part of a row: its groups int64 [GROUPS] and whether there is one; of their elements
    [GROUPS, BLOCK] the column int64 and whether there is one. EVEN: there always is, and groups are BLOCK
    wide; else it is as in the other parts, or there are none."""
    i_group = tl.arange(0, GROUPS).to(tl.int64)
    within = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    if EVEN:
        column = i_group[:, None] * BLOCK + within
        present, inside = tl.full([GROUPS], 1, tl.int1), tl.full([GROUPS, BLOCK], 1, tl.int1)
    else:
        column = i_group[:, None] * group + within
        present, inside = i_group < per_row, (within < group) & (column < width)
    return i_group, present, column, inside


@triton.jit
def tile_sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def rms_norm_rotated_kernel(
    p_x, p_weight, p_cos, p_sin, p_y, p_rstd, epsilon, each, tokens, width, dim, heads,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of a token; `each`: 1 / dim."""
    i_head, present, column, inside = row_tile(width, dim, heads, EVEN, GROUPS, BLOCK)
    step = GROUPS * (BLOCK if EVEN else dim)
    i_row = tl.program_id(0).to(tl.int64)
    first = i_row * width + column
    p_x, p_y, p_rstd = p_x + first, p_y + first, p_rstd + i_row * heads
    weight, cos, sin = load_turn(p_weight, p_cos, p_sin, i_row % tokens, dim, 0.0, BLOCK)
    for part in tl.static_range(PARTS):
        x = widened(tl.load(p_x + part * step, mask=inside, other=0.0))
        mean = tl.sum(x * x, axis=1, keep_dims=True) * each
        rstd = fast_rsqrt(mean + epsilon)
        tl.store(p_y + part * step, narrowed(apply_rope(x * rstd * weight, cos, sin), DTYPE), mask=inside)
        store_rows(p_rstd, rstd, i_head + part * GROUPS, present)


@triton.jit
def rms_norm_rotated_grad_kernel(
    p_dy, p_y, p_rstd, p_weight, p_cos, p_sin, p_dx, each, tokens, width, dim, heads,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `rms_norm_rotated_kernel`."""
    i_head, present, column, inside = row_tile(width, dim, heads, EVEN, GROUPS, BLOCK)
    step = GROUPS * (BLOCK if EVEN else dim)
    i_row = tl.program_id(0).to(tl.int64)
    first = i_row * width + column
    p_y, p_dy, p_dx, p_rstd = p_y + first, p_dy + first, p_dx + first, p_rstd + i_row * heads
    weight, cos, sin = load_turn(p_weight, p_cos, p_sin, i_row % tokens, dim, 1.0, BLOCK)
    unweighted = fast_inverse(weight)
    for part in tl.static_range(PARTS):
        rstd = load_rows(p_rstd, i_head + part * GROUPS, present, 0.0)
        y = widened(tl.load(p_y + part * step, mask=inside, other=0.0))
        dy = widened(tl.load(p_dy + part * step, mask=inside, other=0.0))
        xhat = apply_rope(y, cos, -sin) * unweighted
        g = apply_rope(dy, cos, -sin) * weight
        along = tl.sum(g * xhat, axis=1, keep_dims=True) * each
        tl.store(p_dx + part * step, narrowed((g - xhat * along) * rstd, DTYPE), mask=inside)


@triton.jit
def load_turn(p_weight, p_cos, p_sin, token, dim, other, BLOCK: tl.constexpr):
    """weight [1, BLOCK], `other` where there is none; cos, sin of a token [1, BLOCK / 2]; float32."""
    column, half = tl.arange(0, BLOCK).to(tl.int64)[None, :], tl.arange(0, BLOCK // 2).to(tl.int64)[None, :]
    weight = widened(tl.load(p_weight + column, mask=column < dim, other=other))
    p_cos, p_sin, inside = p_cos + token * (dim // 2), p_sin + token * (dim // 2), half < dim // 2
    cos, sin = tl.load(p_cos + half, mask=inside, other=0.0), tl.load(p_sin + half, mask=inside, other=0.0)
    return weight, cos, sin


@triton.jit
def apply_rope(x, cos, sin):
    """Adjacent pairs of x [R, B] as complex numbers, times cos + i sin [R, B / 2]."""
    HALF: tl.constexpr = x.shape[1] // 2
    even, odd = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), x.shape)
