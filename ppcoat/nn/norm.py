"""The norms of a FLUX block and their gradients in closed form: modulated LayerNorm, RMSNorm.

The forward functions are ordinary Paddle under autograd. The `_grad` functions are for blocks that keep their
inputs in another form and go backward by hand (flux_block.py): they give the gradient of the input only.

Sources: LayerNorm arXiv 1607.06450, RMSNorm arXiv 1910.07467, adaptive modulation arXiv 2212.09748.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

NORM_EPSILON = 1e-6  # FLUX's, for all of its norms


def modulated_norm(x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor) -> paddle.Tensor:
    """LayerNorm without weights, times 1 + scale, plus shift. x [B, tokens, dim]; the others [B, 1, dim]."""
    return F.layer_norm(x, x.shape[-1:], epsilon=NORM_EPSILON) * (1 + scale) + shift


def modulated_norm_grad(x: paddle.Tensor, scale: paddle.Tensor, dy: paddle.Tensor) -> paddle.Tensor:
    """Gradient of `modulated_norm` by x: rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (1 + scale).

    x, dy and the result [B, tokens, dim] of one dtype; scale [B, 1, dim]. Statistics are float32.
    """
    x32 = x.astype("float32")
    centred = x32 - x32.mean(axis=-1, keepdim=True)
    rstd = paddle.rsqrt(paddle.square(centred).mean(axis=-1, keepdim=True) + NORM_EPSILON)
    xhat = centred.multiply_(rstd)
    g = (dy * (1 + scale)).astype("float32")
    along = (g * xhat).mean(axis=-1, keepdim=True)
    mean = g.mean(axis=-1, keepdim=True)
    return g.subtract_(mean).subtract_(xhat.multiply_(along)).multiply_(rstd).astype(x.dtype)


def rms_norm(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """x / rms(x) * weight over the last axis. Written out: Paddle's fused form has no CPU gradient."""
    x32 = x.astype("float32")
    return (x32 * rms_rstd(x32)).astype(x.dtype) * weight


def rms_rstd(x32: paddle.Tensor) -> paddle.Tensor:
    """1 / rms of the last axis: float32 [..., D] -> float32 [..., 1]."""
    return paddle.rsqrt(paddle.square(x32).mean(axis=-1, keepdim=True) + NORM_EPSILON)


def rms_norm_grad(
    xhat: paddle.Tensor, rstd: paddle.Tensor, weight: paddle.Tensor, dy: paddle.Tensor
) -> paddle.Tensor:
    """Gradient of `rms_norm` by x: rstd * (g - xhat * mean(g * xhat)), g = dy * weight, xhat = x * rstd.

    xhat float32 [..., D], rstd float32 [..., 1], weight [D], dy [..., D]; the result has dy's dtype.
    """
    g = (dy * weight).astype("float32")
    along = (g * xhat).mean(axis=-1, keepdim=True)
    return g.subtract_(xhat * along).multiply_(rstd).astype(dy.dtype)
