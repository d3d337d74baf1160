"""The norms of a transformer block and their gradients in closed form: modulated LayerNorm (FLUX), RMSNorm
with or without modulation (NextDiT), and RMSNorm with the rotation of queries and keys behind it (both).

The functions marked `op` are for blocks that go backward by hand (nn/ops.py); they have Triton twins, see
backend.py. A kernel has no gradient that autograd knows of, so code that differentiates through a norm by
autograd takes its reference (`differentiable` in nn/ops.py).

Statistics are float32 whatever the dtype of x. Where x is FP8 codes (`groups` tells how to read them), values
and results have `groups.dtype`. A NaN or an infinity makes its own row NaN and no other.

Sources: LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467, adaptive modulation arXiv 2212.09748, rotary
embedding arXiv 2104.09864. The gradients are the chain rule.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from . import backend
from .formats import NORM_EPSILON, Groups
from .quantize import expand_on_cpu, floats

Angles = tuple[paddle.Tensor, paddle.Tensor]  # cos, sin, both float32 [tokens, head_dim / 2]


@backend.op
def modulated_norm(
    x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, groups: Groups | None = None
) -> paddle.Tensor:
    """LayerNorm without weights, times 1 + scale, plus shift -> [B, tokens, dim].

    x [B, tokens, dim]: floats, or codes uint8 that `groups` tells how to read; shift, scale [B, 1, dim] of
    x's floating dtype.
    """
    x = floats(x, groups)
    normalised = F.layer_norm(x, x.shape[-1:], epsilon=NORM_EPSILON)
    return normalised * expand_on_cpu(1 + scale, x) + expand_on_cpu(shift, x)


@backend.op
def modulated_norm_grad(
    x: paddle.Tensor, scale: paddle.Tensor, dy: paddle.Tensor, groups: Groups | None = None
) -> paddle.Tensor:
    """Gradient of `modulated_norm` by x: rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (1 + scale).

    x as in `modulated_norm`; dy [B, tokens, dim]; scale [B, 1, dim] -> [B, tokens, dim] in the dtype of x's
    values.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    centred = x32 - expand_on_cpu(x32.mean(axis=-1, keepdim=True), x32)
    rstd = expand_on_cpu(rms_rstd(centred), x32)
    xhat = centred.multiply_(rstd)
    g = (dy * expand_on_cpu(1 + scale, dy)).astype("float32")
    along = expand_on_cpu((g * xhat).mean(axis=-1, keepdim=True), x32)
    mean = expand_on_cpu(g.mean(axis=-1, keepdim=True), x32)
    return g.subtract_(mean).subtract_(xhat.multiply_(along)).multiply_(rstd).astype(x.dtype)


@backend.op
def rms_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    scale: paddle.Tensor | None = None,
    epsilon: float = NORM_EPSILON,
    groups: Groups | None = None,
) -> paddle.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, times 1 + scale if there is one.

    x [..., D]: floats, or codes uint8 that `groups` tells how to read; weight [D]; scale [B, 1, D] for x
    [B, tokens, D] -> [..., D] in the dtype of x's values. Written out: Paddle's fused form has no gradient on
    a CPU.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    xhat = (x32 * expand_on_cpu(rms_rstd(x32, epsilon), x32)).astype(x.dtype)
    y = xhat * expand_on_cpu(weight, xhat)
    return y if scale is None else y * expand_on_cpu(1 + scale, y)


@backend.op
def rms_norm_grad(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    scale: paddle.Tensor | None,
    dy: paddle.Tensor,
    epsilon: float = NORM_EPSILON,
    groups: Groups | None = None,
) -> paddle.Tensor:
    """Gradient of `rms_norm` by x: rstd * (g - xhat * mean(g * xhat)), g = dy * weight * (1 + scale).

    x, weight, scale, epsilon, groups as in `rms_norm`; dy [..., D] -> [..., D] in the dtype of x's values.
    """
    x = floats(x, groups)
    x32 = x.astype("float32")
    rstd = rms_rstd(x32, epsilon)
    dy = dy if scale is None else dy * expand_on_cpu(1 + scale, dy)
    return rms_norm_grad_from_xhat(x32 * expand_on_cpu(rstd, x32), rstd, weight, dy).astype(x.dtype)


@backend.op
def rms_norm_rotated(
    x: paddle.Tensor, weight: paddle.Tensor, angles: Angles, epsilon: float = NORM_EPSILON
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """`rms_norm`, then `apply_rope` -> y of x's shape and dtype, and 1 / rms float32 [B, tokens, heads, 1].

    x [B, tokens, heads, head_dim] float, weight [head_dim]; angles: cos and sin float32
    [tokens, head_dim / 2], the same for all samples.
    """
    x32 = x.astype("float32")
    rstd = rms_rstd(x32, epsilon)
    y = (x32 * expand_on_cpu(rstd, x32)).astype(x.dtype)
    return apply_rope(y * expand_on_cpu(weight, y), *angles), rstd


@backend.op
def rms_norm_rotated_grad(
    dy: paddle.Tensor, y: paddle.Tensor, rstd: paddle.Tensor, weight: paddle.Tensor, angles: Angles
) -> paddle.Tensor:
    """Gradient of `rms_norm_rotated` by x, from its results: y rotated back and divided by the weight is the
    normalised x, so x need not be saved.

    dy, y [B, tokens, heads, head_dim]; rstd float32 [B, tokens, heads, 1]; weight [head_dim], no element 0;
    angles as in `rms_norm_rotated` -> [B, tokens, heads, head_dim] in dy's dtype.
    """
    cos, sin = angles
    xhat = (apply_rope(y, cos, -sin) / expand_on_cpu(weight, y)).astype("float32")
    return rms_norm_grad_from_xhat(xhat, rstd, weight, apply_rope(dy, cos, -sin))


def rms_rstd(x32: paddle.Tensor, epsilon: float = NORM_EPSILON) -> paddle.Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis: float32 [..., D] -> float32 [..., 1]."""
    return paddle.rsqrt(paddle.square(x32).mean(axis=-1, keepdim=True) + epsilon)


def rms_norm_grad_from_xhat(
    xhat: paddle.Tensor, rstd: paddle.Tensor, weight: paddle.Tensor, dy: paddle.Tensor
) -> paddle.Tensor:
    """`rms_norm_grad` where xhat = x * rstd is known: rstd * (g - xhat * mean(g * xhat)), g = dy * weight.

    xhat float32 [..., D], rstd float32 [..., 1], weight [D], dy [..., D] -> [..., D] in dy's dtype.
    """
    g = (dy * expand_on_cpu(weight, dy)).astype("float32")
    along = expand_on_cpu((g * xhat).mean(axis=-1, keepdim=True), g)
    return g.subtract_(xhat * along).multiply_(expand_on_cpu(rstd, g)).astype(dy.dtype)


def apply_rope(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Rotate each adjacent pair of channels (x[2i], x[2i+1]) by its token's angle i, computed in float32.

    x [B, tokens, heads, head_dim]; cos, sin float32 [tokens, head_dim / 2] -> x's shape and dtype. With -sin
    it rotates back. A pair is a complex number and the rotation a product: four times faster on a CPU than
    splitting the pairs.
    """
    pairs = x.astype("float32").reshape([*x.shape[:-1], x.shape[-1] // 2, 2])
    turn = expand_on_cpu(paddle.stack([cos, sin], axis=-1).unsqueeze(1), pairs)
    product = paddle.as_complex(pairs) * paddle.as_complex(turn)
    return paddle.as_real(product).reshape(x.shape).astype(x.dtype)
