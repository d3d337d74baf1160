"""Weights in 4 bits: `nf4`, which is bitsandbytes' NF4 bit for bit, and `fp4`, ours, of less error.

Both work on a weight as one row of numbers, [out, in] flattened: two codes in a byte, the first in the upper
half, and a scale for each block of neighbours.

NF4: the levels are quantiles of a normal distribution, a block has 64 values, its scale is its largest
magnitude. "Double quantisation" stores the scales in 8 bits, in blocks of 256 with a scale each, around
their mean: 4.127 bits a weight. Source: QLoRA (arXiv 2305.14314) section 3, and bitsandbytes'
`functional.quantize_4bit`, whose layout this is.

FP4: a block has 16 values and a scale of one byte: a sign and 126 sizes, six an octave: 4.5 bits a weight,
and nothing beside. A code c stands for u + u^3 / 160, u = c - 8.125: near zero levels lie twice as close as
at the ends, and a device computes them in three instructions, without a table. The levels reach further down
than up; the scale's sign turns them round where that fits a block better. Of the scales around the block's
largest value the one of least squared error is taken; on a CPU the errors of bfloat16 numbers, of which there
are few, come from a table. The error is 0.74 times NF4's for normal weights and less for others;
docs/kernels.md has what else was tried.

The decoders are ops with Triton twins, see backend.py. Quantising is Paddle's operations on every device: it
happens once, when a model is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import paddle

from . import backend
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
    TINY,
)
from .quantize import expand_on_cpu

CHUNK = 2**18  # values quantised at a time, so that what is made on the way stays in a CPU's cache
# Scales that are tried: whether turned round, and steps above the least one whose levels reach amax.
_SEARCHED = [*((False, step) for step in (-1, 0, 1, 2, 3)), *((True, step) for step in (2, 3, 4))]
# u of the nearest level, as a polynomial of u's odd powers; the error is below 0.006.
_NEAREST = (0.989518329, -5.02042735e-3, 4.35684055e-5, -2.30453846e-7, 4.94199103e-10)
_SPAN = FP4_ZERO + FP4_CUBIC * FP4_ZERO**3  # magnitude of the lowest level, the largest of all
_LARGEST_SCALE = 2.0 ** ((FP4_SIZES - FP4_ONE) / FP4_OCTAVE)
_TABLE_AMAX = 2e-5, 8.0  # of blocks for which all scales that are tried exist
_TABLE_OCTAVE = FP4_ONE // FP4_OCTAVE - 1  # of the scales in the table, the highest that it is asked for
_HALF = 2**15  # bfloat16 numbers of one sign


def quantize_fp4(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x float, any shape of N numbers -> codes uint8 [ceil(N / 2)], scale uint8 [ceil(N / 16)].

    Scales are `fp4_scales`. The scale of a block that holds a NaN, an infinity or a magnitude above 22.9 is
    NaN, and so are its values. Values below 1e-5 are rounded to steps of 1e-6 or more.
    """
    parts = [_fp4_chunk(chunk) for chunk in _chunks(x, FP4_BLOCK)]
    return tuple(paddle.concat(list(each)) for each in zip(*parts, strict=True))


@backend.op
def dequantize_fp4(
    codes: paddle.Tensor, scale: paddle.Tensor, shape: list[int], dtype: str | paddle.dtype = "float32"
) -> paddle.Tensor:
    """Inverse of `quantize_fp4`: codes uint8 [ceil(N / 2)], scale uint8 [ceil(N / 16)] -> values in `dtype`,
    N numbers of `shape`."""
    return _decoded(
        lambda codes: _fp4_values(codes - FP4_ZERO), codes, (fp4_scales(scale), FP4_BLOCK), shape, dtype
    )


def fp4_scales(codes: paddle.Tensor) -> paddle.Tensor:
    """Scales of FP4, uint8 of any shape -> float32: 2^(size / 6 - 20), negative where the upper bit is set;
    0 for size 0, NaN for size 127."""
    table = paddle.to_tensor(_fp4_scale_table(), place=codes.place)
    return paddle.gather(table, codes.flatten().astype("int32")).reshape(codes.shape)


def quantize_nf4(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x float, any shape of N numbers -> codes uint8 [ceil(N / 2)], absmax float32 [ceil(N / 64)].

    A code is the number of midpoints between levels that lie below x / absmax. absmax of a block with a NaN
    or an infinity is NaN. An odd last byte is filled with the code of 0.
    """
    parts = [_nf4_chunk(chunk) for chunk in _chunks(x, NF4_BLOCK)]
    codes, absmax = (paddle.concat(list(each)) for each in zip(*parts, strict=True))
    return codes, absmax


def quantize_absmax(absmax: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Scales of NF4 [N] float32 -> codes uint8 [N], scale float32 [ceil(N / 256)], offset float32 [1]:
    bitsandbytes' double quantisation. The offset is the mean; with one scale that is NaN all become NaN."""
    offset = absmax.mean().reshape([1])
    blocks = _blocks(absmax - offset, NF4_OUTER)
    scale = blocks.abs().max(axis=1, keepdim=True)
    table = nf4_scale_table()
    below = np.sort(np.float32((table[1:] + table[:-1]) / np.float32(2)))
    ratio = blocks * (1.0 / paddle.clip(scale, min=TINY))
    codes = paddle.bucketize(ratio, paddle.to_tensor(below, place=absmax.place), out_int32=True)
    return codes.astype("uint8").flatten()[: absmax.size], scale.flatten() + offset * 0.0, offset


@backend.op
def dequantize_nf4(
    codes: paddle.Tensor,
    scale: tuple[paddle.Tensor, ...],
    shape: list[int],
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize_nf4`: codes uint8 [ceil(N / 2)] -> values in `dtype`, N numbers of `shape`.

    scale: (absmax,) float32 [ceil(N / 64)], or the three that `quantize_absmax` makes of it.
    """
    levels = paddle.to_tensor(np.float32(NF4_LEVELS), place=codes.place)
    absmax = nf4_absmax(*scale)
    return _decoded(
        lambda codes: paddle.gather(levels, codes.astype("int32")), codes, (absmax, NF4_BLOCK), shape, dtype
    )


def nf4_absmax(
    codes: paddle.Tensor, scale: paddle.Tensor | None = None, offset: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Inverse of `quantize_absmax`: codes uint8 [N], scale float32 [ceil(N / 256)], offset float32 [1] ->
    absmax float32 [N]; that alone is itself."""
    if scale is None:
        return codes
    table = paddle.to_tensor(nf4_scale_table(), place=codes.place)
    blocks = _blocks(paddle.gather(table, codes.astype("int32")), NF4_OUTER)
    return (blocks * scale.unsqueeze(1) + offset).flatten()[: codes.size]


def nf4_scale_table() -> np.ndarray:
    """The 256 numbers, float32, ascending, that stand for a scale of NF4: bitsandbytes' "dynamic" map.

    Between 10^(i - 7) and 10^(i - 6) lie 2^i of them, evenly spaced, i from 0 to 6; the same with a minus; 0
    and 1. Rounded as torch's linspace and products of float32 do.
    """
    one, tenth, numbers = np.float32(1), np.float32(0.1), [np.float32([0, 1])]
    for i in range(7):
        step = np.float64((one - tenth) / np.float32(2**i))
        places = np.arange(2**i + 1)
        ends = np.where(2 * places < 2**i + 1, tenth + step * places, 1.0 - step * (2**i - places))
        ends = np.float32(ends)
        numbers += [np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))]
    return np.sort(np.concatenate([*numbers, *(-each for each in numbers[1:])]))


def _fp4_chunk(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """[N] float -> codes, scale."""
    blocks = _blocks(x.astype("float32"), FP4_BLOCK)
    scale = _fp4_best_scale(x, blocks)
    factor = fp4_scales(scale)
    usable = paddle.isfinite(factor) & (factor != 0)
    factor = paddle.where(usable, factor, paddle.ones_like(factor))
    u = _nearest_u(blocks * expand_on_cpu((1.0 / factor).unsqueeze(1), blocks))
    return _packed(u + FP4_ZERO, x.size), scale


def _fp4_best_scale(x: paddle.Tensor, blocks: paddle.Tensor) -> paddle.Tensor:
    """x [N] float, the same as blocks [n, 16] float32 -> the scale of least squared error for each, uint8
    [n]."""
    top, bottom = blocks.max(axis=1), blocks.min(axis=1)
    amax = paddle.maximum(top, -bottom) + (top + bottom) * 0.0
    positive = (top > -bottom).astype("float32")  # 1 where a negative scale puts the lowest level at amax
    middle = (paddle.log2(paddle.clip(amax / _SPAN, min=TINY)) * FP4_OCTAVE + FP4_ONE).round()
    least, most = _TABLE_AMAX
    known = ((amax >= least) & (amax <= most)) | (amax == 0)
    if x.dtype == paddle.bfloat16 and x.place.is_cpu_place() and known.all().item():
        best = _searched_in_table(_blocks(x, FP4_BLOCK).view("int16"), middle, positive)
    else:
        best = _searched(blocks, middle, positive)
    best = best * (amax > 0).astype("float32")
    unfit = paddle.logical_not(amax <= _SPAN * _LARGEST_SCALE)  # true for NaN
    return paddle.where(unfit, paddle.full_like(best, FP4_SIZES + 1), best).astype("uint8")


def _searched(blocks: paddle.Tensor, middle: paddle.Tensor, positive: paddle.Tensor) -> paddle.Tensor:
    """The best of _SEARCHED for each block [n, 16], as float32 [n]."""
    least = paddle.full_like(middle, math.inf)
    best = paddle.zeros_like(middle)
    for turned, step in _SEARCHED:
        negative = 1.0 - positive if turned else positive
        scale = paddle.clip(middle + step, 1.0, FP4_SIZES) + 128.0 * negative
        factor = fp4_scales(scale.astype("uint8"))
        ratio = blocks * expand_on_cpu((1.0 / factor).unsqueeze(1), blocks)
        wrong = _fp4_values(_nearest_u(ratio)).subtract_(ratio).square_().sum(axis=1) * factor.square()
        best = paddle.where(wrong < least, scale, best)
        least = paddle.minimum(wrong, least)
    return best


def _searched_in_table(bits: paddle.Tensor, middle: paddle.Tensor, positive: paddle.Tensor) -> paddle.Tensor:
    """`_searched` of blocks of bfloat16 numbers on a CPU, their bits int16 [n, 16]: eight gathered at once
    take half of the time of computing them.

    A number added to the exponents brings the scale of `middle` into the table's octave; _HALF more turns the
    signs round.
    """
    octave = (middle / FP4_OCTAVE).floor()
    first = (middle - octave * FP4_OCTAVE) * (3 * _HALF) + positive * _HALF + _HALF
    first = (first + (_TABLE_OCTAVE - octave) * 128.0).astype("int32").unsqueeze(1)
    rows = bits.astype("int32")
    rows = rows + expand_on_cpu(first, rows)
    table, wrong = _fp4_table(), None
    for each in rows.unbind(1):
        errors = paddle.gather(table, each)
        wrong = errors if wrong is None else wrong.add_(errors)
    turned, steps = (paddle.to_tensor(each, "float32", bits.place) for each in zip(*_SEARCHED, strict=True))
    best = wrong.argmin(axis=1)
    turned, step = paddle.gather(turned, best), paddle.gather(steps, best)
    return middle + step + 128.0 * (positive - turned).abs()


@functools.cache
def _fp4_table() -> paddle.Tensor:
    """Squared errors of all bfloat16 numbers with each of _SEARCHED, float32 on the CPU: a row for a number,
    in the order of its bits as int16, then the negative ones again; so for each middle scale of an octave."""
    bits = np.arange(-_HALF, _HALF).astype("int16").view("uint16").astype("uint32") << 16
    numbers = paddle.to_tensor(bits.view("float32"), place=paddle.CPUPlace()).unsqueeze(1)
    halves = []
    for middle in range(FP4_OCTAVE):
        size = FP4_OCTAVE * _TABLE_OCTAVE + middle
        scales = np.uint8([size + step + 128 * turned for turned, step in _SEARCHED])
        factor = fp4_scales(paddle.to_tensor(scales, place=numbers.place))
        ratio = numbers * (1.0 / factor)
        wrong = _fp4_values(_nearest_u(ratio)).subtract_(ratio).square_() * factor.square()
        halves += [wrong, wrong[:_HALF]]
    return paddle.concat(halves)


def _nearest_u(ratio: paddle.Tensor) -> paddle.Tensor:
    """Numbers in units of their scale, float32 -> u of the nearest level."""
    square, first, rest = ratio.square(), _NEAREST[-1], _NEAREST[-2::-1]
    place = square.scale(first, bias=rest[0])
    for factor in rest[1:]:
        place = place.multiply_(square).scale_(1.0, bias=factor)
    return place.multiply_(ratio).scale_(1.0, bias=FP4_ZERO).round_().clip_(0.0, 15.0).scale_(1.0, -FP4_ZERO)


def _fp4_values(u: paddle.Tensor) -> paddle.Tensor:
    return u.square().scale_(FP4_CUBIC, bias=1.0).multiply_(u)


@functools.cache
def _fp4_scale_table() -> np.ndarray:
    sizes = np.exp2((np.arange(FP4_SIZES + 1) - FP4_ONE) / FP4_OCTAVE)
    sizes[0] = 0.0
    return np.float32([*sizes, np.nan, *-sizes, np.nan])


def _nf4_chunk(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """[N] float -> codes, absmax."""
    blocks = _blocks(x.astype("float32"), NF4_BLOCK)
    absmax = blocks.abs().max(axis=1)
    absmax = absmax + absmax * 0.0  # an infinity becomes NaN
    inverse = (1.0 / paddle.clip(absmax, min=TINY)).unsqueeze(1)
    ratio = (blocks * expand_on_cpu(inverse, blocks)).clip_(-1.0, 1.0)
    levels = np.float32(NF4_LEVELS)
    codes = paddle.zeros(ratio.shape, "uint8")
    for middle in (levels[1:] + levels[:-1]) / np.float32(2):
        codes.add_((ratio > float(middle)).astype("uint8"))
    return _packed(codes, x.size), absmax


def _chunks(x: paddle.Tensor, block: int) -> Iterator[paddle.Tensor]:
    """x in parts of whole blocks, flat; the last one perhaps shorter."""
    flat, size = x.flatten(), CHUNK // block * block
    for start in range(0, max(1, x.size), size):
        yield flat[start : start + size]


def _blocks(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """[N] -> [ceil(N / size), size], filled with zeros."""
    if x.size % size:
        x = paddle.concat([x, paddle.zeros([-x.size % size], x.dtype)])
    return x.reshape([-1, size])


def _packed(codes: paddle.Tensor, count: int) -> paddle.Tensor:
    """Codes 0 to 15, any shape of an even size -> those of the first `count`, uint8 [ceil(count / 2)]."""
    first, second = codes.reshape([-1, 2]).unbind(1)
    return (first * 16 + second).astype("uint8")[: -(-count // 2)]


def _decoded(
    levels: Callable[[paddle.Tensor], paddle.Tensor],
    codes: paddle.Tensor,
    scaled: tuple[paddle.Tensor, int],
    shape: list[int],
    dtype: str | paddle.dtype,
) -> paddle.Tensor:
    """levels: codes as float32 [n] -> their levels [n]; scaled: the scale of each block, float32, and its
    values. In chunks, as quantising."""
    (scale, block), count, parts = scaled, math.prod(shape), []
    for start in range(0, count, CHUNK):
        packed = codes[start // 2 : (start + CHUNK) // 2].astype("float32")
        first = paddle.floor(packed / 16)
        each = levels(paddle.stack([first, packed - 16 * first], axis=1).flatten())
        each = _blocks(each, block)
        factors = scale[start // block : (start + CHUNK) // block].unsqueeze(1)
        parts.append((each * expand_on_cpu(factors, each)).astype(dtype).flatten())
    return paddle.concat(parts)[:count].reshape(shape) if parts else paddle.zeros(shape, dtype)
