"""Triton twin of `scaled_matmul`: same name, signature and rule.

A program makes a tile of the result, or two side by side. It multiplies FP8 tiles 128 deep, which is as far
as one pair of scales reaches, and adds each product, scaled, to a float32 sum: so no sum of the tensor cores,
which keep fewer bits, is longer than 128.

Tensor cores read FP8 along the axis that is summed over. dx = dy W^T finds a weight [in, out] that way. For
y = x W a quick kernel (`turn_kernel`) writes the codes of W^T into scratch before each product: 2 bytes moved
for each weight, and scratch of one weight. Keeping both forms would spare that and take the codes of all
Linears a second time, 11.8 GB for FLUX.1-dev, which a card of 24 GB does not have.

On Hopper tiles are fetched by tensor descriptors (TMA) where rows are multiples of 16 bytes, elsewhere by
pointers. Where the device has no FP8 (before sm_89) the tiles are multiplied as float16, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .backend import Unsuited
from .formats_triton import DTYPES, NATIVE_ARCH, capability, dtype_name, empty, interpreted, narrowed, require
from .quantize_triton import FLOATS

if TYPE_CHECKING:
    from .formats import BlockMatrix, Epilogue

BLOCK = 128  # values that share a scale, along both sides of a weight; width and depth of a tile
NEIGHBOURS = 8  # tiles of one column that run next to each other and read the same weights
DEEPEST_RANK = {"16 bits": 64, "tf32": 64, "ieee": 16}  # of a LoRA, at a time; float32 takes registers
STAGES = 4  # tiles of x and W on their way or in use: 96 KiB of shared memory, 192 KiB in pairs
PAIRS_FROM = 512  # more rows than this make two tiles in each program, where descriptors fetch them
DESCRIPTORS = range(90, 120)  # capabilities; on sm_120 they would cost 80 instructions a step and spills
ALIGNED = 16  # bytes: vectors and descriptors start there; no Linear of FLUX or NextDiT has other widths
HALF_SCALE = tl.constexpr(2.0**16)  # of a product of two tiles from `as_half`


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
        if kind == "uint8" and (shape[1] % ALIGNED or tensor.data_ptr() % ALIGNED):
            raise Unsuited(f"{what} {shape}: rows and address must be multiples of {ALIGNED} bytes")
    y = empty(codes, [m, n], name)
    bias, down, up, rank, precision = _added(epilogue, (m, n), transpose, y)
    if not m or not n:
        return y
    w = weight.codes if transpose else turned(weight.codes)
    tall = BLOCK if m > BLOCK // 2 else BLOCK // 2
    arch = capability()
    native, described = arch >= NATIVE_ARCH, arch in DESCRIPTORS and k > 0
    pair = described and m > PAIRS_FROM and n > BLOCK and precision != "ieee"  # else registers run out
    grid = -(-m // tall) * -(-n // (BLOCK << pair))
    scaled_matmul_kernel[(grid,)](
        _described(codes, tall) if described else codes, scale, _described(w, BLOCK) if described else w,
        weight.scale, bias, down, up, y, m, n, k, rank,
        TRANSPOSE=transpose, BIAS=bias is not y, PRECISION=precision,
        RANK=min(DEEPEST_RANK[precision], max(16, triton.next_power_of_2(rank))) if rank else 0,
        EVEN=k % BLOCK == 0, NATIVE=native, DESCRIBED=described, PAIR=pair,
        DTYPE=DTYPES[name], TALL=tall, SIDE=BLOCK, NEAR=NEIGHBOURS,
        num_warps=8 if tall == BLOCK or not native else 4, num_stages=STAGES,
    )  # fmt: skip
    return y


def turned(codes: Any) -> Any:
    """Codes uint8 [K, N], both multiples of 4 -> their transpose [N, K], a new tensor."""
    k, n = codes.shape
    to, side = empty(codes, [n, k], "uint8"), BLOCK // 4
    turn_kernel[(-(-k // BLOCK), -(-n // BLOCK))](codes, to, k // 4, n // 4, SIDE=side, num_warps=8)
    return to


def _described(codes: Any, rows: int) -> TensorDescriptor:
    """Codes [R, C] as FP8 tiles [rows, BLOCK], zeros over the edge. FP8 from the start: a tile recast after
    it was fetched would go through registers."""
    return TensorDescriptor(_FP8View(codes), list(codes.shape), [codes.shape[1], 1], [rows, BLOCK])


class _FP8View(TensorWrapper):
    """Codes as a descriptor wants its base: Triton's `reinterpret`, without what only torch tensors have."""

    def __init__(self, codes: Any) -> None:
        self.base, self.dtype, self.shape = codes, tl.float8e4nv, codes.shape


def _added(
    epilogue: Epilogue | None, shape: tuple[int, int], transpose: bool, unused: Any
) -> tuple[Any, Any, Any, int, str]:
    """-> bias, down, up (`unused` for each that is absent), rank (0 without LoRA), precision of its product:
    factors of the same 16-bit dtype go to the tensor cores as they are, of different ones as tf32, which
    holds both; float32 goes without them. The interpreter has no arithmetic in bfloat16."""
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
        elif down.dtype == up.dtype and not interpreted():
            precision = "16 bits"
    return bias, down, up, rank, precision


@triton.jit
def scaled_matmul_kernel(
    x, p_x_scale, w, p_w_scale, p_bias, p_down, p_up, p_y, m, n, k, rank,
    TRANSPOSE: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, NATIVE: tl.constexpr, DESCRIBED: tl.constexpr, PAIR: tl.constexpr,
    DTYPE: tl.constexpr, TALL: tl.constexpr, SIDE: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """A tile [TALL, SIDE] of y, with PAIR also its right neighbour. x [M, K] and w [N, K]: descriptors, or
    pointers to codes. EVEN: K is a multiple of SIDE."""
    WIDE: tl.constexpr = 2 * SIDE if PAIR else SIDE
    i_down, i_across = tile_of(tl.cdiv(m, TALL).to(tl.int64), tl.cdiv(n, WIDE).to(tl.int64), NEAR)
    row, column = i_down * TALL, i_across * WIDE
    rows = row + tl.arange(0, TALL).to(tl.int64)
    rows = tl.where(rows < m, rows, 0)  # what they give there is never stored
    steps, blocks = tl.cdiv(k, SIDE).to(tl.int64), tl.cdiv(n, SIDE).to(tl.int64)
    p_x_scale += rows * steps
    one = tl.full([], 1, tl.int64)
    down, across = (one, steps) if TRANSPOSE else (blocks, one)  # between the scales of W
    p_w_scale += column // SIDE * across
    second = tl.where(column + SIDE < n, across, 0)  # from the scale of a tile to its neighbour's, if any
    inner = tl.arange(0, SIDE).to(tl.int64)
    if not DESCRIBED:
        if NATIVE:  # recast before the loop, so that a tile goes from memory to the tensor cores as it is
            x = x.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            w = w.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        columns = column + inner
        x += rows[:, None] * k + inner[None, :]
        w += tl.where(columns < n, columns, 0)[None, :] * k + inner[:, None]

    depth, side = tl.full([], 0, tl.int32), tl.full([], SIDE, tl.int64)
    total = tl.zeros([TALL, SIDE], dtype=tl.float32)
    right = tl.zeros([TALL, SIDE], dtype=tl.float32)
    for _ in range(0, steps):
        x_scale = tl.load(p_x_scale)
        if DESCRIBED:
            x_tile = x.load([row.to(tl.int32), depth])
            w_tile = w.load([column.to(tl.int32), depth]).T
        elif EVEN:
            x_tile, w_tile = tl.load(x), tl.load(w)
        else:
            deep = inner + depth < k
            x_tile = tl.load(x, mask=deep[None, :], other=0.0)
            w_tile = tl.load(w, mask=deep[:, None], other=0.0)
        total += scaled_product(x_tile, w_tile, x_scale * tl.load(p_w_scale), NATIVE)
        if PAIR:
            w_tile = w.load([(column + SIDE).to(tl.int32), depth]).T
            right += scaled_product(x_tile, w_tile, x_scale * tl.load(p_w_scale + second), NATIVE)
        depth += SIDE
        p_x_scale += one
        p_w_scale += down
        if not DESCRIBED:
            x += side
            w += side

    finish(total, row, column, p_bias, p_down, p_up, p_y, m, n, rank, TRANSPOSE, BIAS, RANK, PRECISION, DTYPE)
    if PAIR:
        column += SIDE
        finish(right, row, column, p_bias, p_down, p_up, p_y, m, n, rank, TRANSPOSE, BIAS, RANK, PRECISION,
               DTYPE)  # fmt: skip


@triton.jit
def scaled_product(x, w, scale, NATIVE: tl.constexpr):
    """Tiles x [R, K] and w [K, C], scale [R] -> their product, scaled, float32."""
    if NATIVE:
        product = tl.dot(x, w) * scale[:, None]
    else:
        product = tl.dot(as_half(x), as_half(w)) * (scale * HALF_SCALE)[:, None]
    return product


@triton.jit
def as_half(codes):
    """E4M3 codes uint8 -> their numbers times 2^-8, float16, exactly. The bits of a code are those of a
    float16 but for the exponent's bias; two more instructions make NaN of what would be 480 * 2^-8: they lead
    from there, and from no smaller number, to infinity."""
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385  # one bit of the sign goes
    half = bits.to(tl.float16, bitcast=True)
    return half + (tl.abs(half) * 32768.0 + 4096.0) * 0.0


@triton.jit
def finish(
    total, row, column, p_bias, p_down, p_up, p_y, m, n, rank,
    TRANSPOSE: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds LoRA and bias to the sums of the tile at (row, column), rounds and stores it."""
    rows = row + tl.arange(0, total.shape[0]).to(tl.int64)
    columns = column + tl.arange(0, total.shape[1]).to(tl.int64)
    if RANK:
        read_rows = tl.where(rows < m, rows, 0)
        total += low_rank(p_down, p_up, read_rows, columns, n, rank, TRANSPOSE, RANK, PRECISION)
    if BIAS:
        total += tl.load(p_bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(p_y + rows[:, None] * n + columns[None, :], narrowed(total, DTYPE), mask=inside)


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
def low_rank(
    p_down, p_up, row, column, n, rank, TRANSPOSE: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr
):
    """down [M, rank] times up [rank, N] (with TRANSPOSE [N, rank] in memory) -> this tile of it, float32."""
    total = tl.zeros([row.shape[0], column.shape[0]], dtype=tl.float32)
    for start in tl.range(0, rank, RANK, num_stages=1):  # its tiles need not fit beside others
        r = start + tl.arange(0, RANK).to(tl.int64)
        down = tl.load(p_down + row[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
        inside = (r < rank)[:, None] & (column < n)[None, :]
        if TRANSPOSE:
            up = tl.load(p_up + column[None, :] * rank + r[:, None], mask=inside, other=0.0)
        else:
            up = tl.load(p_up + r[:, None] * n + column[None, :], mask=inside, other=0.0)
        if PRECISION == "16 bits":
            total += tl.dot(down, up)
        else:
            total += tl.dot(down.to(tl.float32), up.to(tl.float32), input_precision=PRECISION)
    return total


@triton.jit
def turn_kernel(p_from, p_to, down, across, SIDE: tl.constexpr):
    """Codes -> their transpose, in words of 4 x 4 codes: `down` and `across` count them, and a program has
    SIDE x SIDE. A word is turned in registers, so that shared memory sees 32 bits at a time."""
    zero = tl.full([], 0, tl.int64)
    down, across = zero + down, zero + across
    i = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE).to(tl.int64)
    read, written = (i < down)[:, None] & (j < across)[None, :], (j < across)[:, None] & (i < down)[None, :]
    p_from = p_from.to(tl.pointer_type(tl.uint32), bitcast=True) + i[:, None] * 4 * across + j[None, :]
    p_to = p_to.to(tl.pointer_type(tl.uint32), bitcast=True) + j[:, None] * 4 * down + i[None, :]
    a, b = tl.load(p_from, mask=read, other=0), tl.load(p_from + across, mask=read, other=0)
    p_from += 2 * across
    c, d = tl.load(p_from, mask=read, other=0), tl.load(p_from + across, mask=read, other=0)
    # Bytes 0 and 2 (1 and 3) of two neighbouring rows; then halves of two such words.
    ab_even, ab_odd = weave(a, b), weave(a >> 8, b >> 8)
    cd_even, cd_odd = weave(c, d), weave(c >> 8, d >> 8)
    tl.store(p_to, tl.trans((ab_even & 0xFFFF) | (cd_even << 16)), mask=written)
    tl.store(p_to + down, tl.trans((ab_odd & 0xFFFF) | (cd_odd << 16)), mask=written)
    p_to += 2 * down
    tl.store(p_to, tl.trans((ab_even >> 16) | (cd_even & 0xFFFF0000)), mask=written)
    tl.store(p_to + down, tl.trans((ab_odd >> 16) | (cd_odd & 0xFFFF0000)), mask=written)


@triton.jit
def weave(a, b):
    """Words a3 a2 a1 a0 and b3 b2 b1 b0, in bytes -> b2 a2 b0 a0."""
    return (a & 0x00FF00FF) | ((b & 0x00FF00FF) << 8)
