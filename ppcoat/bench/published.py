"""How others store Adam's moments, emulated in numpy for comparison with our codec.

Every codec maps rows float32 [G, B] to the values float32 [G, B] that decoding returns after they were stored
once. A codec has no state.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

Codec = Callable[[np.ndarray], np.ndarray]

WARP = 32  # threads whose values the published kernel reduces together
GUARD = np.float32(1e-30)  # added to minimum and maximum by the published kernel
RANGE = np.float32(448.0 * 448.0 / 2)  # ratio max / min onto which it expands a group


def plain_e4m3(rows: np.ndarray) -> np.ndarray:
    """E4M3 scaled by the group's largest magnitude / 448. Source: arXiv 2209.05433, table 1."""
    return _scaled_float8(rows, ml_dtypes.float8_e4m3fn)


def plain_e5m2(rows: np.ndarray) -> np.ndarray:
    """E5M2 scaled by the group's largest magnitude / 57344. Source: arXiv 2209.05433, table 1."""
    return _scaled_float8(rows, ml_dtypes.float8_e5m2)


def published_coat(rows: np.ndarray) -> np.ndarray:
    """COAT's dynamic range expansion as its kernel computes it, in float32, faults included.

    With M = max + 1e-30 and m0 = min + 1e-30 of |x|: k = floor(16 log2(448^2 / 2) / log2(M / m0)) / 16,
    centre c = sqrt(M) sqrt(m0), code = E4M3(sign(x) (|x| / c)^k / s) with s = (M / c)^k / 448. The minimum
    skips some zeros only (`kernel_minimum`); a group of equal values has k = inf.
    Source: arXiv 2410.19313 section 4; NVlabs/COAT, fp8_adamw_expand_cuda_kernel.cu (expand_min = 16).
    """
    x = rows.astype(np.float32)
    magnitude = np.abs(x)
    with np.errstate(all="ignore"):
        high = magnitude.max(-1, keepdims=True) + GUARD
        low = kernel_minimum(magnitude) + GUARD
        centre = np.sqrt(high) * np.sqrt(low)
        k = np.floor(np.log2(RANGE) / np.log2(high / low) * 16) / 16
        sign = np.where(np.signbit(x), np.float32(-1), np.float32(1))
        scale = (high / centre) ** k / np.float32(448)
        codes = _float8(sign * (magnitude / centre) ** k / scale, ml_dtypes.float8_e4m3fn)
        decoded = codes * scale
        # where k is inf, pow(NaN, 0) = 1 decodes a NaN code to the centre; CUDA's NaN code has no sign
        negative = np.signbit(decoded) & ~np.isnan(decoded)
        sign = np.where(negative, np.float32(-1), np.float32(1))
        return sign * np.abs(decoded) ** (1 / k) * centre


def kernel_minimum(magnitude: np.ndarray) -> np.ndarray:
    """Magnitudes [G, B] -> [G, 1]: the minimum that COAT's warp shuffles find.

    A shuffle ignores a neighbour's zero, but a thread's own zero stays, and hides the values that are reduced
    into it later. As in the kernel, rows are padded with the largest float to a multiple of 32.
    """
    short = -magnitude.shape[-1] % WARP
    padded = np.pad(magnitude, ((0, 0), (0, short)), constant_values=np.finfo(np.float32).max)
    warps = _shuffle_minimum(padded.reshape(len(padded), -1, WARP))
    idle = np.full([len(padded), WARP - warps.shape[-1]], 1e9, dtype=np.float32)
    return _shuffle_minimum(np.concatenate([warps, idle], axis=-1))[:, None]


def dynamic_exponent_signed(rows: np.ndarray) -> np.ndarray:
    """8-bit dynamic tree code with a sign bit, scaled by the group's largest magnitude.

    127 magnitudes a sign: decade 10^-i (i = 0 .. 6) below 1 holds 2^(6 - i) values, the midpoints of equal
    parts of [0.1, 1]; besides, 0 and 1. Source: Dettmers et al., arXiv 2110.02861 section 1.3; bitsandbytes,
    functional.create_dynamic_map.
    """
    return _nearest(rows, _dynamic_book(signed=True))


def dynamic_exponent_unsigned(rows: np.ndarray) -> np.ndarray:
    """As `dynamic_exponent_signed` for values without a sign: twice as many values in each decade."""
    return _nearest(rows, _dynamic_book(signed=False))


# name -> (codec of the first moment, codec of the second)
PUBLISHED: dict[str, tuple[Codec, Codec]] = {
    "E4M3": (plain_e4m3, plain_e4m3),
    "E5M2": (plain_e5m2, plain_e5m2),
    "COAT": (published_coat, published_coat),
    "dynamic": (dynamic_exponent_signed, dynamic_exponent_unsigned),
}


def _float8(values: np.ndarray, dtype: type) -> np.ndarray:
    """Round to float8 as CUDA's conversion does: too large becomes the largest finite value, NaN stays."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(dtype).astype(np.float32)


def _scaled_float8(rows: np.ndarray, dtype: type) -> np.ndarray:
    x = rows.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(ml_dtypes.finfo(dtype).max)
    return _float8(x / np.where(scale > 0, scale, np.float32(1)), dtype) * scale


def _shuffle_minimum(lanes: np.ndarray) -> np.ndarray:
    """[..., 32] -> [...]: the value of lane 0 after shuffles by 16, 8, 4, 2, 1."""
    while lanes.shape[-1] > 1:
        own, other = np.split(lanes, 2, axis=-1)
        lanes = np.where(other > 0, np.minimum(own, other), own)
    return lanes[..., 0]


def _dynamic_book(signed: bool) -> np.ndarray:
    """float32 [256], ascending."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (6 - decade + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0**-decade
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.float32(values))


def _nearest(rows: np.ndarray, book: np.ndarray) -> np.ndarray:
    amax = np.abs(rows).max(-1, keepdims=True)
    ratio = rows / np.where(amax > 0, amax, np.float32(1))
    return book[np.searchsorted((book[1:] + book[:-1]) / 2, ratio)] * amax
