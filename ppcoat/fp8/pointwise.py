"""What a transformer block does number by number: GELU (tanh form), SiLU and gated residual, with their
gradients; and dropout, whose random numbers are a hash.

All are ops with Triton twins, see backend.py, for blocks that go backward by hand (nn/ops.py). The input of
an activation may be the FP8 codes that were saved for backward.

Sources: GELU arXiv 1606.08415 (section 2, tanh form), SiLU the same; the derivatives are written out. The
hash's mixer: C. Wellons, "Prospecting for Hash Functions" (nullprogram.com, 2018).
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from . import backend
from .formats import GELU_CUBIC, GELU_LINEAR, HASH_FIRST, HASH_HIGH, HASH_SECOND, HASH_SEED, Groups
from .quantize import expand_on_cpu, floats


@backend.op
def gelu(x: paddle.Tensor, groups: Groups | None = None) -> paddle.Tensor:
    """x (1 + tanh(a (x + b x^3))) / 2, a = sqrt(2 / pi), b = 0.044715 -> [..., D] in the dtype of x's values.

    x [..., D]: floats, or codes uint8 that `groups` tells how to read.
    """
    return F.gelu(floats(x, groups), approximate=True)


@backend.op
def gelu_grad(x: paddle.Tensor, dy: paddle.Tensor, groups: Groups | None = None) -> paddle.Tensor:
    """Gradient of `gelu` by x: dy (1 + t + x (1 - t^2) a (1 + 3 b x^2)) / 2, t the tanh.

    x, groups as in `gelu`; dy [..., D] -> [..., D] in the dtype of x's values.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    square = x32 * x32
    t = paddle.tanh(square.scale(GELU_LINEAR * GELU_CUBIC, bias=GELU_LINEAR).multiply_(x32))
    slope = square.scale_(3 * GELU_LINEAR * GELU_CUBIC, bias=GELU_LINEAR).multiply_(x32)
    slope = slope.multiply_((t * t).scale_(-1.0, bias=1.0)).add_(t).scale_(0.5, bias=0.5)
    return slope.multiply_(dy.astype("float32")).astype(x.dtype)


@backend.op
def silu(x: paddle.Tensor, groups: Groups | None = None) -> paddle.Tensor:
    """x sigmoid(x) -> [..., D] in the dtype of x's values. x, groups as in `gelu`."""
    return F.silu(floats(x, groups))


@backend.op
def silu_grad(x: paddle.Tensor, dy: paddle.Tensor, groups: Groups | None = None) -> paddle.Tensor:
    """Gradient of `silu` by x: dy s (1 + x (1 - s)), s = sigmoid(x).

    x, groups as in `gelu`; dy [..., D] -> [..., D] in the dtype of x's values.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    s = F.sigmoid(x32)
    slope = s.scale(-1.0, bias=1.0).multiply_(x32).scale_(1.0, bias=1.0).multiply_(s)
    return slope.multiply_(dy.astype("float32")).astype(x.dtype)


@backend.op
def gated_residual(y: paddle.Tensor, gate: paddle.Tensor, x: paddle.Tensor | None = None) -> paddle.Tensor:
    """y * gate + x, or y * gate without x -> a new tensor [B, tokens, dim] of y's dtype.

    y, x [B, tokens, dim]; gate [B, 1, dim]; all of one floating dtype. Without x it is also the gradient by
    y, when y is the gradient of the sum.
    """
    gated = y * expand_on_cpu(gate, y)
    return gated if x is None else gated.add_(x)


@backend.op
def dropout(x: paddle.Tensor, rate: float, seed: int) -> paddle.Tensor:
    """x [..., D], each number set to 0 with probability `rate` and divided by 1 - rate otherwise.

    x is of any floating dtype, and so is the result; 0 <= rate < 1. Which numbers go follows from `seed`,
    0 <= seed < 2^63, and their place in x alone, so that the same call on the gradient of the result gives
    that of x. NaN and infinities stay visible where they are dropped (times 0 they are NaN).
    """
    bits = random_bits(paddle.arange(x.size, dtype="int32" if x.size <= 2**31 else "int64"), seed)
    factor = (bits >= _constant(min(round(rate * 2**32), 2**32 - 1) - 2**31, bits)).astype("float32")
    factor = factor.scale_(1.0 / (1.0 - rate)).reshape(x.shape)
    return factor.multiply_(x.astype("float32")).astype(x.dtype)


def random_bits(position: paddle.Tensor, seed: int) -> paddle.Tensor:
    """int32 of the same shape, evenly distributed: a hash of each position and the seed.

    position: int64 or int32 of any shape, not negative; seed as in `dropout`. Wellons' mixer of 32 bits (two
    multiplications; its bias is 0.17 of a perfect mixer's noise) of the position, to which the seed's lower
    half is added and whose bits the upper half changes: so no two seeds give shifted copies of each other.
    """
    if position.dtype == paddle.int64:
        position = (position + (position >> 32) * HASH_HIGH).astype("int32")  # cut off, not clipped
    bits = position.scale(1, bias=_wrapped(seed * HASH_SEED))
    bits = bits.bitwise_xor_(_constant((seed >> 32) * HASH_FIRST, bits))
    bits = _folded(bits, 16).scale_(_wrapped(HASH_FIRST))
    return _folded(_folded(bits, 15).scale_(_wrapped(HASH_SECOND)), 16)


def _folded(bits: paddle.Tensor, shift: int) -> paddle.Tensor:
    """bits ^ (bits >> shift), as unsigned numbers, in place."""
    return bits.bitwise_xor_(paddle.bitwise_right_shift(bits, _constant(shift, bits), is_arithmetic=False))


def _constant(value: int, like: paddle.Tensor) -> paddle.Tensor:
    """int32 that broadcasts to `like`, of any shape; see `expand_on_cpu`."""
    return paddle.full(like.shape if like.place.is_cpu_place() else [1], _wrapped(value), "int32")


def _wrapped(value: int) -> int:
    """A whole number -> the int32 of its lower 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
