"""What all Triton kernels share: FP8 numbers in registers, the quantise helper, and how a launcher looks at
its tensors.

The kernels take Paddle tensors, torch tensors and whatever else has data_ptr, dtype, shape, is_contiguous and
new_empty; nothing here imports Paddle. MANTISSA is the format's number of mantissa bits, 3 for E4M3, 2 for
E5M2 and 7 for INT8: it tells them apart. NATIVE: the device converts to and from FP8 itself (sm_89 and
later); elsewhere, and under Triton's interpreter, the same conversion is written out in integers, bit for
bit.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

import triton
import triton.language as tl

from .backend import Unsuited
from .formats import HASH_FIRST, HASH_HIGH, HASH_SECOND, HASH_SEED, TINY

NATIVE_ARCH = 89  # compute capability from which Triton converts to E4M3
LARGEST_GROUP = 8192  # elements of a group that one program holds in registers
TILE = 2048  # elements that one program works on
DTYPES = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_INTERPRETED = tl.constexpr(interpreted())  # as Triton decides when it defines the kernels below
_TINY = tl.constexpr(TINY)
_HASH_HIGH, _HASH_SEED = tl.constexpr(HASH_HIGH), tl.constexpr(HASH_SEED)
_HASH_FIRST, _HASH_SECOND = tl.constexpr(HASH_FIRST), tl.constexpr(HASH_SECOND)
_INFINITY = tl.constexpr(math.inf)


@triton.jit
def quantize_rows(x, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """x [R, B] float32, zeros where a row has ended -> codes uint8 [R, B], scale float32 [R, 1].

    The rule of quantize.py: scale = amax / largest FP8 number, NaN for a row with a NaN or an infinity.
    """
    scale = scale_of(row_amax(x), MANTISSA)
    return to_codes(x * tl.div_rn(1.0, scale), MANTISSA, NATIVE), scale


@triton.jit
def row_amax(x):
    """[R, B] -> largest magnitude of each row [R, 1]; infinite where a value is NaN or infinite (a maximum
    without `larger` forgets NaN, so it goes as infinity)."""
    if _INTERPRETED:  # where a reduction by a function of ours is a loop over elements
        amax = tl.max(tl.where(x == x, tl.abs(x), _INFINITY), axis=1, keep_dims=True)
    else:
        amax = tl.reduce(tl.abs(x), 1, larger, keep_dims=True)
        amax = tl.where(amax == amax, amax, _INFINITY)
    return amax


@triton.jit
def larger(x, y):
    """The larger of two, NaN where one is NaN: one instruction, where a choice for each value takes three."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(amax, MANTISSA: tl.constexpr):
    """amax, infinite for what is not finite -> scale of its codes; then NaN (inf * 0)."""
    LARGEST: tl.constexpr = 127.0 if MANTISSA == 7 else 448.0 if MANTISSA == 3 else 57344.0
    return tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), _TINY) + amax * 0.0


@triton.jit
def to_codes(x, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """float32 no larger than the format's largest number by more than its rounding -> its bits, uint8; to
    nearest, ties to even."""
    if MANTISSA == 7:  # added to 1.5 * 2^23, a float32 holds the whole number in its last bits
        return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    if NATIVE:
        FP8: tl.constexpr = tl.float8e4nv if MANTISSA == 3 else tl.float8e5
        return x.to(FP8).to(tl.uint8, bitcast=True)
    # With the exponent's bias put right, an FP8 number is the upper part of a float32; below the smallest
    # normal number, adding a power of two leaves the multiples of the smallest subnormal in the lowest bits.
    CUT: tl.constexpr = 23 - MANTISSA
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    LARGEST: tl.constexpr = 0x7E if MANTISSA == 3 else 0x7B
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    magnitude = size.to(tl.float32, bitcast=True)
    even = (size + ((1 << (CUT - 1)) - 1) + ((size >> CUT) & 1)) >> CUT
    small = (magnitude + MAGIC).to(tl.int32, bitcast=True) & ((1 << MANTISSA + 1) - 1)
    code = tl.where(size < ((128 - BIAS) << 23), small, even - ((127 - BIAS) << MANTISSA))
    return (tl.minimum(code, LARGEST) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_codes(codes, MANTISSA: tl.constexpr, NATIVE: tl.constexpr):
    """Bits of a number of the format, uint8 -> float32, exactly."""
    if MANTISSA == 7:
        return byte_number(codes, True)
    if MANTISSA == 2:  # the upper half of a float16
        return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    size = (codes & 0x7F).to(tl.int32)
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # 2^-9, the smallest subnormal
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(codes >= 0x80, -value, value)


@triton.jit
def widened(x):
    """Floats of 32 or 16 bits -> float32."""
    if not _INTERPRETED and x.dtype == tl.bfloat16:  # two at a time, where Triton takes three instructions
        y = tl.inline_asm_elementwise(
            """{
            .reg .b32 half;
            shl.b32 half, $2, 16;
            mov.b32 $0, half;
            and.b32 half, $2, 0xffff0000;
            mov.b32 $1, half;
            }""",
            "=f,=f,r", [x], tl.float32, True, 2,
        )  # fmt: skip
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """float32 -> DTYPE, to nearest, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter's cast cuts the bits off
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, even.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    return x.to(DTYPE)


# The special function units' approximations, each of one instruction, where the exact functions take 6 to 30.
# Subnormal numbers are 0. The relative errors are those of the PTX instruction set's description; a test runs
# every kernel that uses them with such errors against its float64 truth.


@triton.jit
def fast_exp2(x):
    """2^x, float32; relative error 2^-22."""
    if _INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def fast_log2(x):
    """Logarithm of x > 0 to the base 2, float32; error 2^-22, relative where x is outside 0.5 to 2."""
    if _INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def fast_inverse(x):
    """1 / x, float32; relative error 2^-23."""
    if _INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def fast_sqrt(x):
    """Root of x, float32; relative error 2^-23."""
    if _INTERPRETED:
        y = tl.sqrt(x)
    else:
        y = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def random_bits(position, seed):
    """int32 for each position, int64: `random_bits` in pointwise.py says how. seed: int64, not negative."""
    mixed = (position + (position >> 32) * _HASH_HIGH + seed * _HASH_SEED).to(tl.uint32)
    mixed ^= ((seed >> 32) * _HASH_FIRST).to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * _HASH_FIRST
    mixed = (mixed ^ (mixed >> 15)) * _HASH_SECOND
    return (mixed ^ (mixed >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def fast_rsqrt(x):
    """1 / root of x, float32; relative error 2^-22.9."""
    if _INTERPRETED:
        y = 1.0 / tl.sqrt(x)
    else:
        y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def floor_bits(x):
    """int32 whose lowest 22 bits are those of the floor of x, of magnitude below 2^21: added to 1.5 * 2^23
    and rounded down a float32 holds the whole number in its last bits, in one instruction, no conversion."""
    if _INTERPRETED:
        y = tl.floor(x).to(tl.int32)
    else:
        y = tl.inline_asm_elementwise("add.rm.f32 $0, $1, 0f4B400000;", "=r,f", [x], tl.int32, True, 1)
    return y


@triton.jit
def floor_byte(x):
    """The lowest 8 bits of the floor of x, of magnitude below 2^21, as uint8."""
    return floor_bits(x).to(tl.uint8)


@triton.jit
def byte_number(codes, SIGNED: tl.constexpr):
    """uint8, with SIGNED bits of int8, -> the number, float32. The byte is put behind 2^23, which is taken
    off again: conversions of bytes run at a fraction of an addition's rate."""
    bits = ((codes ^ 0x80) if SIGNED else codes).to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + 128.0 if SIGNED else 8388608.0)


@triton.jit
def with_sign(magnitude, x):
    """magnitude, not negative, with the sign of x; float32."""
    bits = magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


def native_fp8() -> bool:
    """Whether the present device converts to FP8 itself."""
    return capability() >= NATIVE_ARCH


def capability() -> int:
    """Compute capability of the present device, 90 for sm_90, 0 under the interpreter."""
    if interpreted():
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def require(x: Any, name: str, dtypes: tuple[str, ...]) -> None:
    """Raises Unsuited for a tensor with gaps or of a dtype that the kernel does not read."""
    if not x.is_contiguous():
        raise Unsuited(f"{name} {list(x.shape)} is not contiguous: call .contiguous() on it first")
    if dtype_name(x.dtype) not in dtypes:
        raise Unsuited(f"{name} is {dtype_name(x.dtype)}, wanted {' or '.join(dtypes)}")


def empty(like: Any, shape: list[int], dtype: str) -> Any:
    """A new tensor of the same library on the same device, its values undefined."""
    library = sys.modules[type(like.dtype).__module__.partition(".")[0]]
    return like.new_empty(shape, dtype=getattr(library, dtype))


def dtype_name(dtype: Any) -> str:
    """`paddle.float32`, `torch.float32` or "float32" -> "float32"."""
    return str(dtype).rpartition(".")[-1]


def group_tile(group_size: int) -> tuple[int, int]:
    """Elements of a group -> (groups of one program, width of its tile), both powers of two. Raises Unsuited
    for a group that does not fit a program."""
    if not 1 <= group_size <= LARGEST_GROUP:
        raise Unsuited(f"a group of {group_size} elements; wanted 1 to {LARGEST_GROUP}")
    width = triton.next_power_of_2(group_size)
    return max(1, TILE // width), width
