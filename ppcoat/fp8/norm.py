"""The norms of a FLUX block and their gradients in closed form: modulated LayerNorm; RMSNorm, alone and with
the rotation of queries and keys behind it.

The functions marked `op` are for blocks that go backward by hand (nn/flux_block.py); they have Triton twins,
see backend.py. Models differentiate through the references by autograd (nn/norm.py).

Sources: LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467, adaptive modulation arXiv 2212.09748, rotary
embedding arXiv 2104.09864.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from . import backend
from .broadcast import spread
from .formats import FP8Format
from .operands import Groups
from .quantize import floats, quantize
from .rules import NORM_EPSILON

Angles = tuple[paddle.Tensor, paddle.Tensor]  # cos, sin, both float32 [tokens, head_dim / 2]


@backend.op
def modulated_norm(
    x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, groups: Groups | None = None
) -> paddle.Tensor:
    """LayerNorm without weights, times 1 + scale, plus shift -> [B, tokens, dim].

    x [B, tokens, dim]: floats, or codes uint8 that `groups` tells how to read; shift, scale [B, 1, dim].
    """
    x = floats(x, groups)
    return F.layer_norm(x, x.shape[-1:], epsilon=NORM_EPSILON) * spread(1 + scale, x) + spread(shift, x)


@backend.op
def modulated_norm_quantized(
    x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, fmt: FP8Format, group_size: int
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """`modulated_norm` of floats -> codes uint8 [B, tokens, dim] and scale float32 [B, tokens, groups], as
    `quantize` gives them. Source: COAT (arXiv 2410.19313) section 5, a norm whose output is FP8."""
    return quantize(modulated_norm.reference(x, shift, scale), fmt, group_size)


@backend.op
def modulated_norm_grad(
    x: paddle.Tensor, scale: paddle.Tensor, dy: paddle.Tensor, groups: Groups | None = None
) -> paddle.Tensor:
    """Gradient of `modulated_norm` by x: rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (1 + scale).

    x as in `modulated_norm`; dy and the result [B, tokens, dim]; scale [B, 1, dim]. Statistics are float32.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    centred = x32 - spread(x32.mean(axis=-1, keepdim=True), x32)
    rstd = spread(rms_rstd(centred), x32)
    xhat = centred.multiply_(rstd)
    g = (dy * spread(1 + scale, dy)).astype("float32")
    along = spread((g * xhat).mean(axis=-1, keepdim=True), x32)
    mean = spread(g.mean(axis=-1, keepdim=True), x32)
    return g.subtract_(mean).subtract_(xhat.multiply_(along)).multiply_(rstd).astype(x.dtype)


@backend.op
def rms_norm_rotated(
    x: paddle.Tensor, weight: paddle.Tensor, angles: Angles
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """`rms_norm`, then `turned` -> y of x's shape and dtype, and 1 / rms float32 [B, tokens, heads, 1].

    x [B, tokens, heads, head_dim] float, weight [head_dim].
    """
    x32 = x.astype("float32")
    rstd = rms_rstd(x32)
    y = (x32 * spread(rstd, x32)).astype(x.dtype)
    return turned(y * spread(weight, y), *angles), rstd


@backend.op
def rms_norm_rotated_grad(
    dy: paddle.Tensor, y: paddle.Tensor, rstd: paddle.Tensor, weight: paddle.Tensor, angles: Angles
) -> paddle.Tensor:
    """Gradient of `rms_norm_rotated` by x, from its results: y turned back and divided by the weight is the
    normalised input. dy, y and the result [B, tokens, heads, head_dim].
    """
    cos, sin = angles
    xhat = (turned(y, cos, -sin) / spread(weight, y)).astype("float32")
    return rms_norm_grad(xhat, rstd, weight, turned(dy, cos, -sin))


def rms_norm(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """x / rms(x) * weight over the last axis. Written out: Paddle's fused form has no CPU gradient."""
    x32 = x.astype("float32")
    xhat = (x32 * spread(rms_rstd(x32), x32)).astype(x.dtype)
    return xhat * spread(weight, xhat)


def rms_rstd(x32: paddle.Tensor) -> paddle.Tensor:
    """1 / rms of the last axis: float32 [..., D] -> float32 [..., 1]."""
    return paddle.rsqrt(paddle.square(x32).mean(axis=-1, keepdim=True) + NORM_EPSILON)


def rms_norm_grad(
    xhat: paddle.Tensor, rstd: paddle.Tensor, weight: paddle.Tensor, dy: paddle.Tensor
) -> paddle.Tensor:
    """Gradient of `rms_norm` by x: rstd * (g - xhat * mean(g * xhat)), g = dy * weight, xhat = x * rstd.

    xhat float32 [..., D], rstd float32 [..., 1], weight [D], dy [..., D]; the result has dy's dtype.
    """
    g = (dy * spread(weight, dy)).astype("float32")
    along = spread((g * xhat).mean(axis=-1, keepdim=True), g)
    return g.subtract_(xhat * along).multiply_(spread(rstd, g)).astype(dy.dtype)


def turned(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Each adjacent pair of channels turned by its token's angle, in float32; x [B, tokens, heads, head_dim].

    A pair is a complex number, the turn a product: four times faster on CPU than splitting the pairs.
    """
    pairs = x.astype("float32").reshape([*x.shape[:-1], x.shape[-1] // 2, 2])
    turn = spread(paddle.stack([cos, sin], axis=-1).unsqueeze(1), pairs)
    product = paddle.as_complex(pairs) * paddle.as_complex(turn)
    return paddle.as_real(product).reshape(x.shape).astype(x.dtype)
