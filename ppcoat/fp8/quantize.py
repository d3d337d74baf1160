"""FP8 quantisation in plain Paddle: the reference of every faster version.

Two kinds of codec. Activations: `quantize` / `dequantize`, linear, values = codes * scale, one scale per
group of the last axis or per tensor; codes are the bits of FP8 numbers; the same with 4 bits more for each
value for what an exponential follows. Optimizer states: `log_encode` /
`log_decode` (no sign) and `signed_log_encode` / `signed_log_decode`, on rows of a flat buffer; COAT's dynamic
range expansion with codes that are evenly spaced in the logarithm. Codes are uint8, because that is the dtype
that every Paddle op and file format moves.

A non-finite input stays visible: Paddle's casts turn inf and NaN into numbers, so the group's scale (or
amax) becomes NaN and all its values decode to NaN.

The functions marked `op` have Triton twins, see backend.py; the last two functions are `quantize` and
`dequantize` by Paddle's own FP8 kernels.
"""

from __future__ import annotations

import math

import paddle

from . import backend
from .backend import Unsuited
from .formats import (
    K_MAX,
    K_MIN,
    K_STEP,
    LARGE,
    LEVELS,
    NEAR,
    NEAR_ZERO,
    RESIDUAL_STEPS,
    SIGNED_LEVELS,
    SPREAD,
    TINY,
    FP8Format,
    Groups,
    IntegerFormat,
)

PADDLE_GROUP, HALF_DTYPES = 128, (paddle.bfloat16, paddle.float16)  # of Paddle's own FP8 kernels


def floats(x: paddle.Tensor, groups: Groups | None) -> paddle.Tensor:
    """Codes uint8 [..., D] -> their values; x itself where it has floats and `groups` is None."""
    if groups is None:
        return x
    return dequantize(x, groups.scale, groups.fmt, groups.group_size, groups.dtype)


def expand_on_cpu(small: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """`small`, which broadcasts to x (any shape), as a whole tensor of x's shape on a CPU; itself elsewhere.

    An elementwise operation on a CPU takes 4 to 18 times as long where it has to broadcast (Paddle 3.3).
    Itself under autograd, too, which would hold the whole tensor for backward.
    """
    if not paddle.in_dynamic_mode() or paddle.is_grad_enabled() or not x.place.is_cpu_place():
        return small
    return small.expand_as(x)


@backend.op
def quantize(
    x: paddle.Tensor, fmt: FP8Format | IntegerFormat, group_size: int | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x [..., D] float -> codes uint8 [..., D] and scale float32 [..., ceil(D / group_size)] ([1] without
    groups).

    scale = amax / fmt.max, so the largest value of a group is exact and no code saturates. The last group
    may be shorter. Groups of zeros have codes 0. INT8 is for weights. Source: COAT (arXiv
    2410.19313) section 5.1, per-group and per-tensor scaling.
    """
    values = x.astype("float32")
    if group_size is not None:
        values = _split_groups(values, group_size)
    amax = _amax(values)
    if group_size is None:
        amax = amax.max()  # in two stages, as COAT's group scaling: rows side by side, then their maxima
    scale = paddle.clip(amax / fmt.max, min=TINY) + amax * 0.0  # clip may drop a NaN, the sum brings it back
    codes = _to_codes(values / expand_on_cpu(scale, values), fmt)
    if group_size is None:
        return codes, scale.reshape([1])
    return _join_groups(codes, x.shape[-1]), scale.squeeze(-1)


@backend.op
def dequantize(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    fmt: FP8Format | IntegerFormat,
    group_size: int | None = None,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize`: codes uint8 [..., D] and their scale -> values [..., D] in `dtype`."""
    values = _from_codes(codes, fmt)
    if group_size is None:
        return (values * expand_on_cpu(scale, values)).astype(dtype)
    grouped = _split_groups(values, group_size)
    grouped = grouped * expand_on_cpu(scale.unsqueeze(-1), grouped)
    return _join_groups(grouped, codes.shape[-1]).astype(dtype)


@backend.op
def quantize_with_residual(
    x: paddle.Tensor, fmt: FP8Format, group_size: int | None = None
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """x [..., D] float, D even -> codes and scale as `quantize`, and residual uint8 [..., D / 2]: 4 bits for
    each value, that of an even place in the lower half of a byte.

    The residual says where between the codes a value lies: round(120 * (x / decoded - 1)) + 8. For E4M3
    |x / decoded - 1| is at most 1/16, so that it lies in 0.5..15.5; where it is more (codes below the normal
    numbers) it is cut to 1..15, and codes of 0 have 8.
    """
    codes, scale = quantize(x, fmt, group_size)
    coarse = dequantize(codes, scale, fmt, group_size)
    usable = (coarse != 0) & (coarse == coarse)
    relative = (x.astype("float32") - coarse) / paddle.where(usable, coarse, paddle.ones_like(coarse))
    steps = paddle.floor(relative * RESIDUAL_STEPS + 8.5).clip_(1.0, 15.0)
    steps = paddle.where(usable, steps, paddle.full_like(steps, 8.0)).reshape([*x.shape[:-1], -1, 2])
    low, high = steps.unbind(-1)
    return codes, scale, (low + 16 * high).astype("uint8")


@backend.op
def dequantize_with_residual(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    residual: paddle.Tensor,
    fmt: FP8Format,
    group_size: int | None = None,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """Inverse of `quantize_with_residual`: codes uint8 [..., D], scale float32, residual uint8 [..., D / 2]
    -> values [..., D] in `dtype`. Error 0.25 % RMS, a tenth of E4M3 alone."""
    coarse, packed = dequantize(codes, scale, fmt, group_size), residual.astype("float32")
    high = paddle.floor(packed / 16)
    steps = paddle.stack([packed - 16 * high, high], axis=-1).reshape(coarse.shape)
    return coarse.multiply_((steps - 8) / RESIDUAL_STEPS + 1).astype(dtype)


@backend.op
def log_encode(
    x: paddle.Tensor, fmt: FP8Format, dither: paddle.Tensor | float = 0.5
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Rows x [G, B] float32, none negative -> codes uint8 [G, B], amax float32 [G, 1], k uint8 [G, 1].

    x = amax * 2^((code - 255) / (k * steps)), steps = 2^mantissa_bits an octave, k stored in 16ths; code 0 is
    0 exactly, and no positive value from 2^-126 on gets it. COAT expands the range by x^k (section 4.1) and
    rounds to an FP8 number with a sign bit that a second moment never uses. Here that bit doubles the codes,
    and the mantissa counts parts of an octave instead of parts of a power of two: equal relative error
    everywhere, half of COAT's. k makes the codes span from a robust minimum (`_lowest`) to amax: one outlier
    must not cost all others their precision. `dither` in [0, 1), [1, B] or a
    number: what is added before cutting off; 0.5 rounds to nearest.
    """
    amax = _amax(x)
    nonzero = paddle.clip(x * LARGE, max=1.0)
    # In place where possible: a fresh buffer costs more time on a CPU than most of these operations.
    log_ratio = (x * _inverse(amax)).clip_(min=TINY).log_()
    octaves = _lowest(log_ratio, nonzero) / -math.log(2.0)
    k = _stored_k((LEVELS - 1) * K_STEP / 2**fmt.mantissa_bits / paddle.clip(octaves, min=1e-6))
    codes = log_ratio.multiply_(k * _codes_per_nat(fmt)) + (LEVELS + dither)
    return codes.clip_(1.0, LEVELS).multiply_(nonzero).astype("uint8"), amax, k.astype("uint8")


@backend.op
def log_decode(codes: paddle.Tensor, amax: paddle.Tensor, k: paddle.Tensor, fmt: FP8Format) -> paddle.Tensor:
    """Inverse of `log_encode` -> float32 [G, B]."""
    numbers = codes.astype("float32")
    nonzero = paddle.clip(numbers, max=1.0)
    ratio = numbers.scale_(1.0, bias=-LEVELS).multiply_(_nats_per_code(k, fmt)).exp_()
    return ratio.multiply_(amax).multiply_(nonzero)


@backend.op
def signed_log_encode(
    x: paddle.Tensor, fmt: FP8Format, dither: paddle.Tensor | float = 0.5
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Rows x [G, B] float32 -> codes uint8 [G, B] (bits of int8), amax float32 [G, 1], k uint8 [G, 1].

    |x| = amax * d * ((1 + 1 / d)^(|code| / 127) - 1): linear below the shift d, logarithmic above it (mu-law
    companding with mu = 1 / d, ITU-T G.711). k stands for d: as in `log_encode` there are k * 2^mantissa_bits
    codes in an octave of (x + d), so log2(1 + 1 / d) = 127 / (k * 2^mantissa_bits). d is the harmonic mean of
    |x| / amax: values of one size get nearly even steps, a row with much smaller values finer ones at zero.
    `dither` as in `log_encode`. Zero stays zero, and no code has the wrong sign.
    """
    magnitude = x.abs()
    amax = _amax(magnitude)
    ratio = magnitude * _inverse(amax)
    nonzero = magnitude.scale_(LARGE).clip_(max=1.0)
    count = paddle.clip(nonzero.sum(-1, keepdim=True), min=1.0)
    shift = count / paddle.clip((nonzero / (ratio + NEAR_ZERO)).sum(-1, keepdim=True), min=1.0)
    k = _stored_k(SIGNED_LEVELS / _codes_per_nat(fmt) / paddle.log(1.0 + 1.0 / shift))
    inverse_shift = paddle.exp(SIGNED_LEVELS * _nats_per_code(k, fmt)) - 1.0
    codes = ratio.multiply_(inverse_shift).scale_(1.0, bias=1.0).log_().multiply_(k * _codes_per_nat(fmt))
    codes = (codes + dither).clip_(max=SIGNED_LEVELS).floor_().multiply_(x.sign())
    return codes.astype("int8").view("uint8"), amax, k.astype("uint8")


@backend.op
def signed_log_decode(
    codes: paddle.Tensor, amax: paddle.Tensor, k: paddle.Tensor, fmt: FP8Format
) -> paddle.Tensor:
    """Inverse of `signed_log_encode` -> float32 [G, B]."""
    numbers = codes.view("int8").astype("float32")
    rate = _nats_per_code(k, fmt)
    size = amax / (paddle.exp(SIGNED_LEVELS * rate) - 1.0)
    magnitude = numbers.abs().multiply_(rate).exp_().scale_(1.0, bias=-1.0)
    return magnitude.multiply_(size).multiply_(numbers.clip_(-1.0, 1.0))


def _lowest(log_ratio: paddle.Tensor, nonzero: paddle.Tensor) -> paddle.Tensor:
    """[G, 1]: the lower end of the range to cover, of log_ratio = ln(x / amax) [G, B] where nonzero is 1.

    COAT takes the smallest value. One outlier of 1e-12 then costs all others most of their precision, so
    here the end is no further down than the robust minimum (see SPREAD). What lies below becomes that end.
    """
    count = paddle.clip(nonzero.sum(-1, keepdim=True), min=1.0)
    logs = log_ratio * nonzero
    mean = logs.sum(-1, keepdim=True) / count
    low = logs.min(-1, keepdim=True)
    variance = logs.square_().sum(-1, keepdim=True) / count - mean * mean
    robust = mean - SPREAD * paddle.sqrt(paddle.clip(variance, min=0.0))
    return paddle.maximum(low, paddle.clip(robust, max=-NEAR * math.log(2.0)))


def _stored_k(k: paddle.Tensor) -> paddle.Tensor:
    """k in 16ths, any float -> whole 16ths that fit a byte, float32."""
    return paddle.clip(paddle.floor(k), min=K_MIN, max=K_MAX)


def _codes_per_nat(fmt: FP8Format) -> float:
    """Codes in a factor of e, for k = 1/16."""
    return 2**fmt.mantissa_bits / (K_STEP * math.log(2.0))


def _nats_per_code(k: paddle.Tensor, fmt: FP8Format) -> paddle.Tensor:
    return 1.0 / (k.astype("float32") * _codes_per_nat(fmt))


def _inverse(amax: paddle.Tensor) -> paddle.Tensor:
    return 1.0 / paddle.clip(amax, min=TINY)


def _amax(x: paddle.Tensor) -> paddle.Tensor:
    """[..., D] -> largest |x| of each row [..., 1]; NaN where a value is NaN or infinite (inf * 0 is NaN)."""
    amax = x.abs().max(axis=-1, keepdim=True)
    return amax + amax * 0.0


def _to_codes(scaled: paddle.Tensor, fmt: FP8Format | IntegerFormat) -> paddle.Tensor:
    """Round to the format, return the bits. `scaled` exceeds fmt.max by a float32 ulp at most, which rounds
    back to it. NaN, whose scale is NaN, may become any number.
    """
    if isinstance(fmt, IntegerFormat):
        scaled = scaled.round()
    return scaled.astype(fmt.dtype).view("uint8")


def _from_codes(codes: paddle.Tensor, fmt: FP8Format | IntegerFormat) -> paddle.Tensor:
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


def quantize_by_paddle(
    x: paddle.Tensor, fmt: FP8Format, group_size: int | None = None
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """`quantize` by the kernel `fp8_quant_blockwise` (Paddle 3.3, GPUs only).

    x [..., D] bfloat16 or float16, D a multiple of 128; E4M3 in groups of 128 -> codes, scale as `quantize`.
    Raises Unsuited for anything else. Whether it follows the rule of `quantize` for zeros and for what is not
    finite is left to the check on first use.
    """
    _require_paddle_kernel(fmt, group_size, x.shape[-1])
    if x.dtype not in HALF_DTYPES or not x.is_contiguous():
        raise Unsuited(f"x is {x.dtype} or has gaps; Paddle's kernel wants contiguous bfloat16 or float16")
    codes, scale = paddle.incubate.nn.functional.fp8_quant_blockwise(
        x.reshape([-1, x.shape[-1]]), output_scale_transpose=False, using_pow2_scale=False
    )
    return codes.view("uint8").reshape(x.shape), scale.reshape([*x.shape[:-1], x.shape[-1] // PADDLE_GROUP])


def dequantize_by_paddle(
    codes: paddle.Tensor,
    scale: paddle.Tensor,
    fmt: FP8Format,
    group_size: int | None = None,
    dtype: str | paddle.dtype = "float32",
) -> paddle.Tensor:
    """`dequantize` by the kernel `fused_act_dequant` (Paddle 3.3, GPUs only) -> values [..., D] in bfloat16.
    Takes what `quantize_by_paddle` gives; raises Unsuited for anything else."""
    _require_paddle_kernel(fmt, group_size, codes.shape[-1])
    if dtype not in ("bfloat16", paddle.bfloat16):
        raise Unsuited(f"dequantize to {dtype}; Paddle's kernel gives bfloat16")
    values = paddle.incubate.nn.functional.fused_act_dequant(
        codes.view(fmt.dtype).reshape([-1, codes.shape[-1]]), scale.reshape([-1, scale.shape[-1]])
    )
    return values.reshape(codes.shape)


def _require_paddle_kernel(fmt: FP8Format, group_size: int | None, width: int) -> None:
    if fmt.name != "e4m3" or group_size != PADDLE_GROUP or width % PADDLE_GROUP:
        raise Unsuited(f"{fmt.name}, groups of {group_size} in {width}; Paddle's kernel has E4M3 in 128")
