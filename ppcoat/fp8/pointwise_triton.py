"""Triton twins of GELU, SiLU, gated residual and dropout: same names, signatures and rules. One kernel serves
both activations and their gradients, from floats or FP8 codes. Arithmetic is float32, each result is rounded
once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .backend import Unsuited
from .formats import GELU_CUBIC, GELU_LINEAR
from .formats_triton import (
    DTYPES,
    TILE,
    dtype_name,
    empty,
    fast_exp2,
    fast_inverse,
    group_tile,
    narrowed,
    native_fp8,
    random_bits,
    require,
    widened,
)
from .quantize_triton import FLOATS, even, group_offsets, load_values, readable

if TYPE_CHECKING:
    from .formats import Groups

GELU, SILU = 0, 1  # which activation
SHORTEST = 128  # channels of a gated residual that a program takes, where not all

_GELU = tl.constexpr(GELU)
_LOG2_E = tl.constexpr(math.log2(math.e))
_GELU_LINEAR, _GELU_CUBIC = tl.constexpr(2.0 * GELU_LINEAR), tl.constexpr(2.0 * GELU_LINEAR * GELU_CUBIC)
# Beyond these the gradients are 0 and dy, to 1e-35; up to them neither p nor 1 - p below is subnormal.
_GELU_FAR, _SILU_FAR = tl.constexpr(10.0), tl.constexpr(87.0)


def gelu(x: Any, groups: Groups | None = None) -> Any:
    """x [..., D], floats or codes -> [..., D]. Raises Unsuited for a tensor with gaps."""
    return _activate(x, None, groups, GELU)


def gelu_grad(x: Any, dy: Any, groups: Groups | None = None) -> Any:
    """-> gradient [..., D] by x. Raises Unsuited for tensors with gaps."""
    return _activate(x, dy, groups, GELU)


def silu(x: Any, groups: Groups | None = None) -> Any:
    """As `gelu`."""
    return _activate(x, None, groups, SILU)


def silu_grad(x: Any, dy: Any, groups: Groups | None = None) -> Any:
    """As `gelu_grad`."""
    return _activate(x, dy, groups, SILU)


def gated_residual(y: Any, gate: Any, x: Any = None) -> Any:
    """y, x [B, tokens, dim], gate [B, 1, dim] -> a new [B, tokens, dim]. Raises Unsuited for tensors with
    gaps."""
    for name, tensor in (("y", y), ("gate", gate), ("x", y if x is None else x)):
        require(tensor, name, FLOATS)
    *lead, width = y.shape
    tokens = math.prod(lead) // lead[0] if lead[0] else 0
    if math.prod(gate.shape) != lead[0] * width:
        raise Unsuited(f"gate {list(gate.shape)} for {list(y.shape)}; wanted [{lead[0]}, 1, {width}]")
    out = empty(y, list(y.shape), dtype_name(y.dtype))
    piece = width & -width  # the largest power of two that divides a row, so that no tile is padded
    if piece < SHORTEST:
        piece = width
    rows, block = group_tile(min(TILE, max(1, piece)))
    per_row = -(-width // block)
    if out.shape[0] * tokens * width:
        gated_residual_kernel[(-(-tokens // rows), per_row, lead[0])](
            y, gate, y if x is None else x, out, tokens, width,
            RESIDUAL=x is not None, DTYPE=DTYPES[dtype_name(y.dtype)], EVEN=width % block == 0, ROWS=rows,
            BLOCK=block,
        )  # fmt: skip
    return out


def dropout(x: Any, rate: float, seed: int) -> Any:
    """x [..., D] -> a new [..., D]. Raises Unsuited for a tensor with gaps."""
    require(x, "x", FLOATS)
    name, total = dtype_name(x.dtype), math.prod(x.shape)
    y = empty(x, list(x.shape), name)
    if total:
        dropped_below = min(round(rate * 2**32), 2**32 - 1) - 2**31
        dropout_kernel[(-(-total // TILE),)](
            x, y, total, seed, dropped_below, 1.0 / (1.0 - rate), DTYPE=DTYPES[name], BLOCK=TILE
        )
    return y


def _activate(x: Any, dy: Any, groups: Groups | None, kind: int) -> Any:
    """dy None: the activation, else its gradient."""
    scale, mantissa, dtype = readable(x, "x", groups)
    if dy is not None:
        require(dy, "dy", FLOATS)
    out = empty(x, list(x.shape), dtype)
    per_tensor = groups is None or groups.group_size is None
    width, group = (math.prod(x.shape), TILE) if per_tensor else (x.shape[-1], groups.group_size)
    rows, block = group_tile(min(group, max(1, width)))
    per_row = -(-width // group)
    count = math.prod(x.shape) // max(1, width) * per_row
    if count:
        activation_kernel[(-(-count // rows),)](
            x, scale, x if dy is None else dy, out, count, width, group, per_row,
            KIND=kind, GRADIENT=dy is not None, MANTISSA=mantissa, PER_TENSOR=per_tensor,
            NATIVE=native_fp8(), DTYPE=DTYPES[dtype], EVEN=even(width, group, block), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return out


@triton.jit
def activation_kernel(
    p_x, p_scale, p_dy, p_y, groups, width, group, per_row,
    KIND: tl.constexpr, GRADIENT: tl.constexpr, MANTISSA: tl.constexpr, PER_TENSOR: tl.constexpr,
    NATIVE: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS groups of x -> y, or with GRADIENT dx."""
    i_group, offset, inside = group_offsets(groups, width, group, per_row, ROWS, BLOCK, EVEN)
    x = load_values(p_x, p_scale, i_group, i_group < groups, offset, inside, MANTISSA, PER_TENSOR, NATIVE)
    # gelu and silu are both x p, p the logistic function of z; slope: of z; small: e^-z
    near = x
    if GRADIENT:
        FAR: tl.constexpr = _GELU_FAR if KIND == _GELU else _SILU_FAR
        near = tl.clamp(x, -FAR, FAR, propagate_nan=tl.PropagateNan.ALL)
    if KIND == _GELU:
        square = near * near
        slope = _GELU_LINEAR + 3.0 * _GELU_CUBIC * square
        small = fast_exp2(near * (-_LOG2_E * _GELU_LINEAR - _LOG2_E * _GELU_CUBIC * square))
    else:
        slope, small = 1.0, fast_exp2(near * -_LOG2_E)
    p = fast_inverse(1.0 + small)
    if GRADIENT:
        dy = widened(tl.load(p_dy + offset, mask=inside, other=0.0))
        y = dy * p * (1.0 + near * (small * p) * slope)  # small p is 1 - p, and keeps its digits
    else:
        y = x * p
    tl.store(p_y + offset, narrowed(y, DTYPE), mask=inside)


@triton.jit
def gated_residual_kernel(
    p_y, p_gate, p_x, p_out, tokens, width,
    RESIDUAL: tl.constexpr, DTYPE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of ROWS tokens of one sample. EVEN: no block reaches over the end of a token."""
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[None, :]
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    sample = tl.program_id(2).to(tl.int64)
    within = tl.full([1, BLOCK], 1, tl.int1) if EVEN else column < width
    offset, inside = (sample * tokens + token) * width + column, (token < tokens) & within
    gate = widened(tl.load(p_gate + sample * width + column, mask=within, other=0.0))
    out = widened(tl.load(p_y + offset, mask=inside, other=0.0)) * gate
    if RESIDUAL:
        out += widened(tl.load(p_x + offset, mask=inside, other=0.0))
    tl.store(p_out + offset, narrowed(out, DTYPE), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def dropout_kernel(p_x, p_y, total, seed, dropped_below, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers of x. dropped_below: random bits from which on a number stays, times `factor`."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(p_x + offset, mask=offset < total, other=0.0).to(tl.float32)
    y = x * tl.where(random_bits(offset, seed.to(tl.int64)) >= dropped_below, factor, 0.0)
    tl.store(p_y + offset, narrowed(y, DTYPE), mask=offset < total)
