"""Triton twins of `dequantize_fp4` and `dequantize_nf4`: same names, signatures and rules.

A program reads TILE codes as words of 8, unpacks them in registers, decodes the scale of each block and
writes the values: codes, scales and values go through memory once. Offsets are int64.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from .backend import Unsuited
from .formats import (
    FP4_BLOCK,
    FP4_CUBIC,
    FP4_OCTAVE,
    FP4_ONE,
    FP4_SIZES,
    FP4_ZERO,
    NF4_BLOCK,
    NF4_LEVELS,
    NF4_OUTER,
)
from .formats_triton import DTYPES, dtype_name, empty, narrowed, require

TILE, WORD = 8192, 8  # values of a program, and of an int32 of codes

_NF4_OUTER = tl.constexpr(NF4_OUTER)
# An FP4 level u + FP4_CUBIC * u^3 as a polynomial of u + _OFF, which is a whole number.
_OFF = FP4_ZERO - 8
_LAST, _FIRST = tl.constexpr(-_OFF - FP4_CUBIC * _OFF**3), tl.constexpr(1 + 3 * FP4_CUBIC * _OFF**2)
_SQUARE, _CUBIC = tl.constexpr(-3 * FP4_CUBIC * _OFF), tl.constexpr(FP4_CUBIC)
_OCTAVE, _ONE, _SIZES = tl.constexpr(FP4_OCTAVE), tl.constexpr(FP4_ONE), tl.constexpr(FP4_SIZES)
_SIXTHS = tl.constexpr(tuple(2.0 ** (part / FP4_OCTAVE) for part in range(FP4_OCTAVE)))
_LEVELS = tl.constexpr(NF4_LEVELS)


def dequantize_fp4(codes: Any, scale: Any, shape: list[int], dtype: Any = "float32") -> Any:
    """codes uint8 [ceil(N / 2)], scale uint8 [ceil(N / 16)] -> N values of `shape` in `dtype`. Raises
    Unsuited for tensors with gaps, another number of codes or scales, and where N is no multiple of 8."""
    values, count = _new(codes, {"scale": (scale, "uint8", FP4_BLOCK)}, shape, dtype)
    rows = TILE // FP4_BLOCK
    if count:
        dequantize_fp4_kernel[(-(-count // TILE),)](
            codes, scale, values, count, DTYPE=DTYPES[dtype_name(dtype)], BLOCKS=rows
        )
    return values


def dequantize_nf4(codes: Any, scale: tuple[Any, ...], shape: list[int], dtype: Any = "float32") -> Any:
    """codes uint8 [ceil(N / 2)] -> N values of `shape` in `dtype`. scale: (absmax,) float32 [ceil(N / 64)],
    or the three of `quantize_absmax`. Raises Unsuited as `dequantize_fp4`."""
    parts = {"scale": (scale[0], "uint8" if len(scale) == 3 else "float32", NF4_BLOCK)}
    if len(scale) == 3:
        parts |= {"scale of scales": (scale[1], "float32", NF4_BLOCK * NF4_OUTER)}
        parts |= {"offset": (scale[2], "float32", max(1, math.prod(shape)))}
    values, count = _new(codes, parts, shape, dtype)
    rows = TILE // NF4_BLOCK
    if count:
        dequantize_nf4_kernel[(-(-count // TILE),)](
            codes, scale[0], scale[-2:][0], scale[-1], values, count, DOUBLE=len(scale) == 3,
            DTYPE=DTYPES[dtype_name(dtype)], BLOCKS=rows,
        )  # fmt: skip
    return values


def _new(codes: Any, parts: dict[str, tuple[Any, str, int]], shape: list[int], dtype: Any) -> tuple[Any, int]:
    """Look at codes and parts, (tensor, dtype, values that share a number) by name -> a tensor for the
    values, their number."""
    count, name = math.prod(shape), dtype_name(dtype)
    if count % WORD:
        raise Unsuited(f"{count} codes of 4 bits; wanted a multiple of {WORD}")
    for part, (tensor, wanted, shared) in {"codes": (codes, "uint8", 2), **parts}.items():
        require(tensor, part, (wanted,))
        if math.prod(tensor.shape) != -(-count // shared):
            raise Unsuited(f"{part} {list(tensor.shape)} for {list(shape)}; wanted {-(-count // shared)}")
    if name not in DTYPES:
        raise Unsuited(f"dequantize to {name}; wanted {', '.join(DTYPES)}")
    return empty(codes, list(shape), name), count


@triton.jit
def dequantize_fp4_kernel(p_codes, p_scale, p_values, count, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of two words of codes."""
    i_word, codes = unpacked(p_codes, count, 2 * BLOCKS)
    i_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    scale = fp4_scale(tl.load(p_scale + i_block, mask=i_block * 16 < count, other=0))
    v = (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0  # codes - 8: put behind 2^23
    level = ((v * _CUBIC + _SQUARE) * v + _FIRST) * v + _LAST
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [BLOCKS, 2]), [2 * BLOCKS])
    store_words(p_values, level * scale[:, None], i_word, count, DTYPE)


@triton.jit
def dequantize_nf4_kernel(
    p_codes, p_scale, p_outer, p_offset, p_values, count,
    DOUBLE: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of eight words of codes; DOUBLE: their scales are codes of 8 bits."""
    i_word, codes = unpacked(p_codes, count, 8 * BLOCKS)
    i_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    scale = tl.load(p_scale + i_block, mask=i_block * 64 < count, other=0)
    if DOUBLE:
        outer = tl.load(p_outer + i_block // _NF4_OUTER, mask=i_block * 64 < count, other=0.0)
        scale = nf4_scale(scale) * outer + tl.load(p_offset)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [BLOCKS, 8]), [8 * BLOCKS])
    store_words(p_values, nf4_level(codes) * scale[:, None], i_word, count, DTYPE)


@triton.jit
def unpacked(p_codes, count, WORDS: tl.constexpr):
    """This program's words of 8 codes, int64 [WORDS], and the codes, int32 [WORDS, 8]."""
    i_word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS).to(tl.int64)
    words = tl.load(p_codes.to(tl.pointer_type(tl.int32)) + i_word, mask=i_word * 8 < count, other=0)
    shift = (tl.arange(0, 8) * 4) ^ 4  # the first of a byte is its upper half
    return i_word, (words[:, None] >> shift[None, :]) & 15


@triton.jit
def store_words(p_values, values, i_word, count, DTYPE: tl.constexpr):
    """Values [WORDS, 8] float32 of words i_word."""
    place = (i_word * 8)[:, None] + tl.arange(0, 8).to(tl.int64)[None, :]
    tl.store(p_values + place, narrowed(values, DTYPE), mask=place < count)


@triton.jit
def fp4_scale(codes):
    """`fp4_scales`: a power of two by its exponent, times one of six numbers."""
    size = (codes & 127).to(tl.int32)
    octave = (size * 43) >> 8  # size // 6
    part, scale = size - octave * _OCTAVE, tl.full(size.shape, 1.0, tl.float32)
    for i in tl.static_range(1, _OCTAVE):
        scale = tl.where(part == i, _SIXTHS[i], scale)
    scale *= ((octave + (127 - _ONE // _OCTAVE)) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(size > _SIZES, float("nan"), tl.where(size == 0, 0.0, scale))
    return tl.where(codes > 127, -scale, scale)


@triton.jit
def nf4_scale(codes):
    """`nf4_scale_table` at codes uint8: of |code - 127| the exponent is the power of ten, and the mantissa
    the place above it."""
    number = codes.to(tl.float32) - 127.0
    bits = tl.abs(number).to(tl.int32, bitcast=True)
    octave = (bits >> 23) - 127
    ten = tl.full(number.shape, 1e-6, tl.float32)
    for i in tl.static_range(1, 7):
        ten = tl.where(octave == i, 10.0 ** (i - 6), ten)
    mantissa = ((bits & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
    half = ((126 - octave) << 23).to(tl.float32, bitcast=True)  # of a step, where the octave has length 1
    value = ten * (0.1 + 0.9 * (mantissa - 1.0 + half))
    value = tl.where(number == 0.0, 0.0, tl.where(number == 128.0, 1.0, value))
    return tl.where(number < 0.0, -value, value)


@triton.jit
def nf4_level(codes):
    """Codes int32 -> their levels, float32. Each of 4 bits halves the choice: 15 instructions, which a card's
    memory leaves time for; a table in shared memory takes less, but no count can see its conflicts."""
    high = tl.where((codes & 4) != 0, one_of_four(codes, 12), one_of_four(codes, 8))
    return tl.where(
        (codes & 8) != 0, high, tl.where((codes & 4) != 0, one_of_four(codes, 4), one_of_four(codes, 0))
    )


@triton.jit
def one_of_four(codes, FIRST: tl.constexpr):
    """The level FIRST + (codes & 3)."""
    high = tl.where((codes & 1) != 0, _LEVELS[FIRST + 3], _LEVELS[FIRST + 2])
    return tl.where((codes & 2) != 0, high, tl.where((codes & 1) != 0, _LEVELS[FIRST + 1], _LEVELS[FIRST]))
