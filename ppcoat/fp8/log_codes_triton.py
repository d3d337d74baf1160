"""Triton twins of the optimizer's codecs: `log_encode`, `log_decode`, `signed_log_encode`,
`signed_log_decode`; same names, signatures and rules as in quantize.py.

The functions on tiles come first: they are what the fused AdamW step is built of. Logarithms are to the base
2 here, so k * 2^MANTISSA / 16 is the number of codes in an octave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .formats import K_MAX, K_MIN, K_STEP, LARGE, LEVELS, NEAR, NEAR_ZERO, SIGNED_LEVELS, SPREAD, TINY
from .formats_triton import (
    byte_number,
    empty,
    fast_exp2,
    fast_inverse,
    fast_log2,
    fast_sqrt,
    floor_byte,
    group_tile,
    require,
    row_amax,
    with_sign,
)
from .quantize_triton import even, group_offsets, load_rows, store_rows

if TYPE_CHECKING:
    from .formats import FP8Format

_TINY, _LARGE = tl.constexpr(TINY), tl.constexpr(LARGE)
_K_STEP, _K_MIN, _K_MAX = tl.constexpr(K_STEP), tl.constexpr(K_MIN), tl.constexpr(K_MAX)
_LEVELS, _SIGNED_LEVELS = tl.constexpr(LEVELS), tl.constexpr(SIGNED_LEVELS)
_SPREAD, _NEAR, _NEAR_ZERO = tl.constexpr(SPREAD), tl.constexpr(NEAR), tl.constexpr(NEAR_ZERO)


@triton.jit
def log_encode_rows(x, dither, MANTISSA: tl.constexpr):
    """x [R, B] float32, none negative, zeros where a row has ended; dither [1, B] -> codes uint8 [R, B], amax
    float32 [R, 1], k float32 [R, 1] in whole 16ths."""
    PER_OCTAVE: tl.constexpr = 2**MANTISSA / _K_STEP
    amax = visible_amax(x)
    nonzero = tl.minimum(x * _LARGE, 1.0)
    octaves = fast_log2(tl.maximum(x * inverse(amax), _TINY))
    k = stored_k(
        (_LEVELS - 1) / PER_OCTAVE * fast_inverse(tl.maximum(-lowest(octaves, nonzero), 1.4427e-6))
    )  # 1e-6 in nats
    codes = octaves * (k * PER_OCTAVE) + (_LEVELS + dither)
    codes = tl.minimum(tl.maximum(codes, 1.0), _LEVELS) * nonzero
    return floor_byte(codes), amax, k


@triton.jit
def log_decode_rows(codes, amax, k, MANTISSA: tl.constexpr):
    """Inverse of `log_encode_rows` -> float32 [R, B]."""
    PER_OCTAVE: tl.constexpr = 2**MANTISSA / _K_STEP
    numbers = byte_number(codes, False)
    # the root of the ratio, because the ratio may be subnormal where its product with amax is not
    root = fast_exp2((numbers - _LEVELS) * (0.5 * fast_inverse(k * PER_OCTAVE)))
    return root * (root * amax) * tl.minimum(numbers, 1.0)


@triton.jit
def signed_log_encode_rows(x, dither, MANTISSA: tl.constexpr):
    """x [R, B] float32, zeros where a row has ended; dither [1, B] -> codes uint8 [R, B] (bits of int8), amax
    float32 [R, 1], k float32 [R, 1] in whole 16ths."""
    PER_OCTAVE: tl.constexpr = 2**MANTISSA / _K_STEP
    magnitude = tl.abs(x)
    amax = visible_amax(x)
    ratio = magnitude * inverse(amax)
    nonzero = tl.minimum(magnitude * _LARGE, 1.0)
    count = tl.maximum(tl.sum(nonzero, axis=1, keep_dims=True), 1.0)
    inverses = tl.sum(nonzero * fast_inverse(ratio + _NEAR_ZERO), axis=1, keep_dims=True)
    inverse_mean = tl.maximum(inverses, 1.0) * fast_inverse(count)  # of the shift
    k = stored_k(_SIGNED_LEVELS / PER_OCTAVE * fast_inverse(fast_log2(1.0 + inverse_mean)))
    per_octave = k * PER_OCTAVE
    inverse_shift = fast_exp2(fast_inverse(per_octave) * _SIGNED_LEVELS) - 1.0
    codes = fast_log2(ratio * inverse_shift + 1.0) * per_octave
    codes = floor_byte(tl.minimum(codes + dither, _SIGNED_LEVELS) * nonzero)
    return tl.where(x < 0, -codes, codes), amax, k


@triton.jit
def signed_log_decode_rows(codes, amax, k, MANTISSA: tl.constexpr):
    """Inverse of `signed_log_encode_rows` -> float32 [R, B]."""
    PER_OCTAVE: tl.constexpr = 2**MANTISSA / _K_STEP
    numbers = byte_number(codes, True)
    rate = fast_inverse(k * PER_OCTAVE)
    size = amax * fast_inverse(fast_exp2(rate * _SIGNED_LEVELS) - 1.0)
    return with_sign((fast_exp2(tl.abs(numbers) * rate) - 1.0) * size, numbers)


@triton.jit
def lowest(octaves, nonzero):
    """[R, 1]: the lower end of the range to cover, as `_lowest` in quantize.py, in octaves below amax."""
    count = tl.maximum(tl.sum(nonzero, axis=1, keep_dims=True), 1.0)
    logs = octaves * nonzero
    each = fast_inverse(count)
    mean = tl.sum(logs, axis=1, keep_dims=True) * each
    low = tl.min(logs, axis=1, keep_dims=True)
    variance = tl.sum(logs * logs, axis=1, keep_dims=True) * each - mean * mean
    robust = mean - _SPREAD * fast_sqrt(tl.maximum(variance, 0.0))
    return tl.maximum(low, tl.minimum(robust, -_NEAR))


@triton.jit
def visible_amax(x):
    """Largest magnitude of each row [R, 1], NaN where a value is NaN or infinite (inf * 0 is NaN)."""
    amax = row_amax(x)
    return amax + amax * 0.0


@triton.jit
def inverse(amax):
    return tl.div_rn(1.0, tl.maximum(amax, _TINY))


@triton.jit
def stored_k(k):
    """k in 16ths, any float -> whole 16ths that fit a byte."""
    return tl.minimum(tl.maximum(tl.floor(k), _K_MIN), _K_MAX)


def log_encode(x: Any, fmt: FP8Format, dither: Any = 0.5) -> tuple[Any, Any, Any]:
    """Rows x [G, B] float32, none negative -> codes uint8 [G, B], amax float32 [G, 1], k uint8 [G, 1]."""
    return _encode(x, fmt, dither, signed=False)


def signed_log_encode(x: Any, fmt: FP8Format, dither: Any = 0.5) -> tuple[Any, Any, Any]:
    """Rows x [G, B] float32 -> codes uint8 [G, B] (bits of int8), amax float32 [G, 1], k uint8 [G, 1]."""
    return _encode(x, fmt, dither, signed=True)


def log_decode(codes: Any, amax: Any, k: Any, fmt: FP8Format) -> Any:
    """Inverse of `log_encode` -> float32 [G, B]."""
    return _decode(codes, amax, k, fmt, signed=False)


def signed_log_decode(codes: Any, amax: Any, k: Any, fmt: FP8Format) -> Any:
    """Inverse of `signed_log_encode` -> float32 [G, B]."""
    return _decode(codes, amax, k, fmt, signed=True)


def _encode(x: Any, fmt: FP8Format, dither: Any, signed: bool) -> tuple[Any, Any, Any]:
    require(x, "x", ("float32",))
    columns = not isinstance(dither, int | float)
    if columns:
        require(dither, "dither", ("float32",))
    groups, size = x.shape
    rows, block = group_tile(size)
    codes, amax, k = (
        empty(x, shape, dtype)
        for shape, dtype in (([groups, size], "uint8"), ([groups, 1], "float32"), ([groups, 1], "uint8"))
    )
    if groups:
        encode_kernel[(-(-groups // rows),)](
            x, dither if columns else x, 0.0 if columns else float(dither), codes, amax, k, groups, size,
            COLUMNS=columns, SIGNED=signed, MANTISSA=fmt.mantissa_bits, EVEN=even(size, size, block),
            ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return codes, amax, k


def _decode(codes: Any, amax: Any, k: Any, fmt: FP8Format, signed: bool) -> Any:
    for tensor, name, dtype in ((codes, "codes", "uint8"), (amax, "amax", "float32"), (k, "k", "uint8")):
        require(tensor, name, (dtype,))
    groups, size = codes.shape
    rows, block = group_tile(size)
    values = empty(codes, [groups, size], "float32")
    if groups:
        decode_kernel[(-(-groups // rows),)](
            codes, amax, k, values, groups, size, SIGNED=signed, MANTISSA=fmt.mantissa_bits,
            EVEN=even(size, size, block), ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return values


@triton.jit
def encode_kernel(
    p_x, p_dither, dither, p_codes, p_amax, p_k, groups, size,
    COLUMNS: tl.constexpr, SIGNED: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_group, offset, inside = group_offsets(groups, size, size, 1, ROWS, BLOCK, EVEN)
    x = tl.load(p_x + offset, mask=inside, other=0.0)
    added = tl.full([1, BLOCK], 0.0, tl.float32) + dither
    if COLUMNS:
        column = tl.arange(0, BLOCK)[None, :]
        added = tl.load(p_dither + column.to(tl.int64), mask=column < size, other=0.0)
    if SIGNED:
        codes, amax, k = signed_log_encode_rows(x, added, MANTISSA)
    else:
        codes, amax, k = log_encode_rows(x, added, MANTISSA)
    tl.store(p_codes + offset, codes, mask=inside)
    store_rows(p_amax, amax, i_group, i_group < groups)
    store_rows(p_k, k.to(tl.int32).to(tl.uint8), i_group, i_group < groups)


@triton.jit
def decode_kernel(
    p_codes, p_amax, p_k, p_values, groups, size,
    SIGNED: tl.constexpr, MANTISSA: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_group, offset, inside = group_offsets(groups, size, size, 1, ROWS, BLOCK, EVEN)
    codes = tl.load(p_codes + offset, mask=inside, other=0)
    amax = load_rows(p_amax, i_group, i_group < groups, 0.0)
    k = load_rows(p_k, i_group, i_group < groups, 1).to(tl.float32)
    if SIGNED:
        values = signed_log_decode_rows(codes, amax, k, MANTISSA)
    else:
        values = log_decode_rows(codes, amax, k, MANTISSA)
    tl.store(p_values + offset, values, mask=inside)
