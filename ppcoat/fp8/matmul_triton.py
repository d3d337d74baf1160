"""Triton twin of `scaled_matmul`: same name, signature and rule.

A program makes a tile of the result. It multiplies FP8 tiles 128 deep, which is as far as one pair of scales
reaches, and adds each product, scaled, to a float32 sum: so no sum of the tensor cores, which keep fewer
bits, is longer than 128. W and W^T are read from the same memory. Where the device has no FP8 the tiles are
multiplied as float16, which holds every FP8 number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .formats_triton import (
    DTYPES,
    Unsuited,
    capability,
    dtype_name,
    empty,
    from_codes,
    narrowed,
    native_fp8,
    require,
)
from .quantize_triton import FLOATS

if TYPE_CHECKING:
    from .formats import BlockMatrix, Epilogue

BLOCK = 128  # values that share a scale, along both sides of a weight; width and depth of a tile
NEIGHBOURS = 8  # tiles of one column that run next to each other and read the same weights
DEEPEST_RANK = 64  # of a LoRA, at a time
HOPPER, STAGES = 90, 4  # where so many tiles of 16 KiB of x and W fit into shared memory


def scaled_matmul(
    codes: Any, scale: Any, weight: BlockMatrix, transpose: bool = False, epilogue: Epilogue | None = None,
    dtype: str = "float32",
) -> Any:  # fmt: skip
    """codes uint8 [M, K], scale float32 [M, ceil(K / 128)], weight [K, N] or with `transpose` [N, K] ->
    [M, N] in `dtype`. Raises Unsuited for tensors with gaps or of shapes that do not fit."""
    (m, k), stored = codes.shape, list(weight.codes.shape)
    n = stored[0] if transpose else stored[1]
    name = dtype_name(dtype)
    if stored[transpose] != k or name not in DTYPES:
        raise Unsuited(f"a product of {[m, k]} and {stored}, transpose {transpose}, in {name}")
    for what, tensor, kind, shape in (
        ("codes", codes, "uint8", [m, k]),
        ("scale", scale, "float32", [m, -(-k // BLOCK)]),
        ("weight codes", weight.codes, "uint8", stored),
        ("weight scale", weight.scale, "float32", [-(-side // BLOCK) for side in stored]),
    ):
        require(tensor, what, (kind,))
        if list(tensor.shape) != shape:
            raise Unsuited(f"{what} is {list(tensor.shape)}, wanted {shape}")
    y = empty(codes, [m, n], name)
    bias, down, up, rank, precision = _added(epilogue, (m, n), transpose, y)
    tall = 128 if m > 64 else 64
    grid = -(-m // tall) * -(-n // BLOCK)
    if grid:
        scaled_matmul_kernel[(grid,)](
            codes, scale, weight.codes, weight.scale, bias, down, up, y, m, n, k, rank,
            TRANSPOSE=transpose, BIAS=bias is not y, PRECISION=precision,
            RANK=min(DEEPEST_RANK, max(16, triton.next_power_of_2(rank))) if rank else 0,
            EVEN=n % BLOCK == 0 and k % BLOCK == 0, NATIVE=native_fp8(), DTYPE=DTYPES[name],
            TALL=tall, SIDE=BLOCK, NEAR=NEIGHBOURS, num_warps=8,
            num_stages=STAGES if capability() >= HOPPER else 2,
        )  # fmt: skip
    return y


def _added(
    epilogue: Epilogue | None, shape: tuple[int, int], transpose: bool, unused: Any
) -> tuple[Any, Any, Any, int, str]:
    """-> bias, down, up (`unused` for each that is absent), rank (0 without LoRA), precision of its product:
    the tensor cores' 10 bits of mantissa hold what 16-bit floats have, and float32 goes without them."""
    (m, n), bias, down, up, rank = shape, unused, unused, unused, 0
    precision = "tf32"
    if epilogue is not None and epilogue.bias is not None:
        bias = epilogue.bias
        require(bias, "bias", FLOATS)
        if list(bias.shape) != [n]:
            raise Unsuited(f"bias is {list(bias.shape)}, wanted {[n]}")
    if epilogue is not None and epilogue.down is not None:
        down, up = epilogue.down, epilogue.up
        rank = down.shape[-1]
        for name, tensor, wanted in (
            ("down", down, [m, rank]),
            ("up", up, [n, rank] if transpose else [rank, n]),
        ):
            require(tensor, name, FLOATS)
            if list(tensor.shape) != wanted:
                raise Unsuited(f"{name} is {list(tensor.shape)}, wanted {wanted}")
        if "float32" in (dtype_name(down.dtype), dtype_name(up.dtype)):
            precision = "ieee"
    return bias, down, up, rank, precision


@triton.jit
def scaled_matmul_kernel(
    p_x, p_x_scale, p_w, p_w_scale, p_bias, p_down, p_up, p_y, m, n, k, rank,
    TRANSPOSE: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, NATIVE: tl.constexpr, DTYPE: tl.constexpr, TALL: tl.constexpr, SIDE: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """A tile [TALL, SIDE] of y. EVEN: no tile of the weight reaches over its edge."""
    i_down, i_across = tile_of(tl.cdiv(m, TALL).to(tl.int64), tl.cdiv(n, SIDE).to(tl.int64), NEAR)
    row = i_down * TALL + tl.arange(0, TALL).to(tl.int64)
    column = i_across * SIDE + tl.arange(0, SIDE).to(tl.int64)
    read_row = tl.where(row < m, row, 0)  # what it gives there is never stored
    inner = tl.arange(0, SIDE).to(tl.int64)
    steps, across = tl.cdiv(k, SIDE), tl.cdiv(n, SIDE)
    p_x += read_row[:, None] * k + inner[None, :]
    p_x_scale += read_row * steps
    if TRANSPOSE:  # [N, K] in memory
        p_w += column[None, :] * k + inner[:, None]
        p_w_scale += i_across * steps
    else:
        p_w += inner[:, None] * n + column[None, :]
        p_w_scale += i_across

    one, side = tl.full([], 1, tl.int64), tl.full([], SIDE, tl.int64)
    total = tl.zeros([TALL, SIDE], dtype=tl.float32)
    for i in range(0, steps):
        if EVEN:
            x, w = tl.load(p_x), tl.load(p_w)
        else:
            deep = inner + i * SIDE < k
            x = tl.load(p_x, mask=deep[None, :], other=0)
            w = tl.load(p_w, mask=deep[:, None] & (column < n)[None, :], other=0)
        scale = tl.load(p_x_scale)[:, None] * tl.load(p_w_scale)
        total += tl.dot(multipliable(x, NATIVE), multipliable(w, NATIVE)) * scale
        p_x += side
        p_x_scale += one
        if TRANSPOSE:
            p_w += side
            p_w_scale += one
        else:
            p_w += side * n
            p_w_scale += one * across

    if RANK:
        total += low_rank(p_down, p_up, read_row, column, n, rank, TRANSPOSE, RANK, PRECISION)
    if BIAS:
        total += tl.load(p_bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(p_y + row[:, None] * n + column[None, :], narrowed(total, DTYPE), mask=inside)


@triton.jit
def tile_of(down, across, NEAR: tl.constexpr):
    """This program's tile: NEAR tiles of a column, then the next column, so that what they read stays in the
    cache."""
    i = tl.program_id(0).to(tl.int64)
    first = i // (NEAR * across) * NEAR
    height = tl.minimum(down - first, NEAR)
    within = i % (NEAR * across)
    return first + within % height, within // height


@triton.jit
def multipliable(codes, NATIVE: tl.constexpr):
    """E4M3 codes uint8 -> what `tl.dot` takes, exactly."""
    if NATIVE:  # noqa: SIM108 (a choice at compile time)
        operand = codes.to(tl.float8e4nv, bitcast=True)
    else:
        operand = from_codes(codes, 3, False).to(tl.float16)
    return operand


@triton.jit
def low_rank(
    p_down, p_up, row, column, n, rank, TRANSPOSE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr
):
    """down [M, rank] times up [rank, N] (with TRANSPOSE [N, rank] in memory) -> this tile of it, float32."""
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for start in range(0, rank, RANK):
        r = start + tl.arange(0, RANK).to(tl.int64)
        down = tl.load(p_down + row[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
        inside = (r < rank)[:, None] & (column < n)[None, :]
        if TRANSPOSE:
            up = tl.load(p_up + column[None, :] * rank + r[:, None], mask=inside, other=0.0)
        else:
            up = tl.load(p_up + r[:, None] * n + column[None, :], mask=inside, other=0.0)
        total += tl.dot(down.to(tl.float32), up.to(tl.float32), input_precision=PRECISION)
    return total
