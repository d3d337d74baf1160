"""FP8 quantisation in plain Paddle: the reference that every faster version is compared with.

Two codecs. Activations: `quantize` / `dequantize`, linear, values = codes * scale, one scale per group of
the last axis or per tensor. Optimizer states: `expand_encode` / `expand_decode`, COAT's dynamic range
expansion on rows of a flat buffer. Codes are held as uint8 (the bits of the FP8 number), because that is
the dtype that every Paddle op and file format moves.

A non-finite input stays visible: Paddle's cast turns inf and NaN into 448, so the group's scale (or amax)
becomes NaN and all its values decode to NaN.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import paddle

from .formats import FP8Format

TINY = 2.0**-126  # smallest normal float32: smaller numbers are flushed to zero on many devices
K_STEP = 16  # the exponent k is stored in 16ths, as COAT
K_MIN, K_MAX = (
    4,
    255,
)  # k in [1/4, 15.94]: fits a byte; 1/4 covers 66 octaves, 15.94 a group that is almost constant
SPREAD = 5.0  # the robust minimum lies this many standard deviations of log|x| below its mean


def quantize(
    x: paddle.Tensor, fmt: FP8Format, group_size: int | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x [..., D] float -> codes uint8 [..., D] and scale float32 [..., ceil(D / group_size)] ([1] without
    groups).

    scale = amax / fmt.max, so the largest value of a group is exact and no code saturates. The last group
    may be shorter. Groups of zeros have codes 0. Source: COAT (arXiv 2410.19313) section 5.1, per-group and
    per-tensor scaling.
    """
    values = x.astype("float32")
    if group_size is not None:
        values = _split_groups(values, group_size)
    amax = _amax(values, axis=None if group_size is None else -1)
    scale = paddle.clip(amax / fmt.max, min=TINY) + amax * 0.0  # clip may drop a NaN, the sum brings it back
    codes = _to_codes(values / scale, fmt)
    if group_size is None:
        return codes, scale.reshape([1])
    return _join_groups(codes, x.shape[-1]), scale.squeeze(-1)


def dequantize(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    fmt: FP8Format,
    group_size: int | None = None,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize`: codes uint8 [..., D] and their scale -> values [..., D] in `dtype`."""
    values = _from_codes(codes, fmt)
    if group_size is None:
        return (values * scale).astype(dtype)
    grouped = _split_groups(values, group_size) * scale.unsqueeze(-1)
    return _join_groups(grouped, codes.shape[-1]).astype(dtype)


def expand_encode(
    x: paddle.Tensor, fmt: FP8Format, keep_nonzero: bool = False
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Rows x [G, B] float32 -> codes uint8 [G, B], amax float32 [G, 1], k uint8 [G, 1] (16ths).

    f(x) = sign(x) |x|^k (COAT section 4.1) in the form code = fmt.max * sign(x) * (|x| / amax)^k: the
    centre that the published kernel divides by cancels, so amax and k say everything and no scale can
    overflow or be zero. k makes the row fill the format's range from a robust minimum of its non-zero
    values (see `_row_exponent`) to amax. `keep_nonzero`: a positive value never becomes code 0. The second
    moment needs it: m / (sqrt(0) + eps) would be a spike.
    """
    magnitude = x.abs()
    amax = magnitude.max(axis=-1, keepdim=True)
    amax = amax + amax * 0.0  # inf becomes NaN
    # Not `x != 0`: Paddle compares floats with a tolerance of 1e-8.
    nonzero = (magnitude > 0).astype("float32")
    # In place from here on: a fresh buffer costs more time on CPU than most of these operations.
    log_ratio = magnitude.divide_(paddle.clip(amax, min=TINY)).clip_(min=TINY).log_()
    k = _row_exponent(log_ratio, nonzero, fmt)
    scaled = log_ratio.multiply_(k / K_STEP).exp_().scale_(fmt.max)
    if keep_nonzero:
        scaled = scaled.clip_(min=fmt.min_subnormal).multiply_(nonzero)
    return _to_codes(scaled.multiply_(x.sign()), fmt), amax, k.astype("uint8")


def expand_decode(
    codes: paddle.Tensor, amax: paddle.Tensor, k: paddle.Tensor, fmt: FP8Format
) -> paddle.Tensor:
    """Inverse of `expand_encode` -> float32 [G, B]: amax * sign(code) * (|code| / fmt.max)^(1/k)."""
    book = _codebook(fmt, paddle.get_device())
    index = codes.astype("int32").add_(k.astype("int32") * 256)
    return paddle.gather(book, index.reshape([-1])).reshape(codes.shape).multiply_(amax)


@functools.lru_cache(maxsize=8)
def _codebook(fmt: FP8Format, device: str) -> paddle.Tensor:
    """float32 [256 * 256]: what code c means under exponent k (16ths) for amax 1, at k * 256 + c."""
    with np.errstate(divide="ignore"):
        inverse_k = K_STEP / np.arange(256, dtype=np.float64)[:, None]
    inverse_k[0] = 1.0  # k = 0 does not occur
    codes = paddle.arange(256, dtype="int32").astype("uint8")
    values = _from_codes(codes, fmt).numpy().astype(np.float64)
    with np.errstate(invalid="ignore"):  # the codes of NaN
        book = (np.sign(values) * np.abs(values / fmt.max) ** inverse_k).astype(np.float32)
    return paddle.to_tensor(book.reshape(-1))


def _row_exponent(log_ratio: paddle.Tensor, nonzero: paddle.Tensor, fmt: FP8Format) -> paddle.Tensor:
    """k [G, 1] in whole 16ths, float32. log_ratio = ln(|x| / amax) [G, B]; nonzero is 1.0 where x counts.

    COAT takes the smallest value as the lower end; one outlier of 1e-12 then costs all others most of their
    precision. Here the lower end is no further down than SPREAD standard deviations below the mean of the
    logarithms.
    """
    count = paddle.clip(nonzero.sum(-1, keepdim=True), min=1.0)
    logs = log_ratio * nonzero
    mean = logs.sum(-1, keepdim=True) / count
    low = logs.min(-1, keepdim=True)
    variance = logs.square_().sum(-1, keepdim=True) / count - mean * mean
    spread = paddle.sqrt(paddle.clip(variance, min=0.0))
    low = paddle.maximum(low, mean - SPREAD * spread)
    # A row of one value, of equal values or of zeros has low = 0: the division gives a huge k, which the
    # clip bounds.
    k = K_STEP * math.log(fmt.expansion_range) / paddle.clip(-low, min=1e-6)
    return paddle.clip(paddle.floor(k), min=K_MIN, max=K_MAX)


def _amax(x: paddle.Tensor, axis: int | None) -> paddle.Tensor:
    """Largest |x| with the reduced axis kept; NaN where a value is NaN or infinite (inf * 0 is NaN)."""
    amax = x.abs().max(axis=axis, keepdim=axis is not None)
    return amax + amax * 0.0


def _to_codes(scaled: paddle.Tensor, fmt: FP8Format) -> paddle.Tensor:
    """Round to FP8, return the bits. `scaled` exceeds fmt.max by a float32 ulp at most, which rounds back to
    it.
    """
    return scaled.astype(fmt.dtype).view("uint8")


def _from_codes(codes: paddle.Tensor, fmt: FP8Format) -> paddle.Tensor:
    return codes.view(fmt.dtype).astype("float32")


def _split_groups(x: paddle.Tensor, group_size: int) -> paddle.Tensor:
    """[..., D] -> [..., ceil(D / group_size), group_size], the ragged tail filled with zeros."""
    *lead, width = x.shape
    missing = -width % group_size
    if missing:
        x = paddle.concat([x, paddle.zeros([*lead, missing], dtype=x.dtype)], axis=-1)
    return x.reshape([*lead, (width + missing) // group_size, group_size])


def _join_groups(x: paddle.Tensor, width: int) -> paddle.Tensor:
    """Inverse of `_split_groups`: [..., n, group_size] -> [..., width]."""
    joined = x.reshape([*x.shape[:-2], x.shape[-2] * x.shape[-1]])
    return joined if joined.shape[-1] == width else joined[..., :width].contiguous()
