"""What a transformer block does number by number: GELU (tanh form), SiLU, gated residual; and the gradients.

All are ops with Triton twins, see backend.py, for blocks that go backward by hand (nn/ops.py). The input of
an activation may be the FP8 codes that were saved for backward.

Sources: GELU arXiv 1606.08415 (section 2, tanh form), SiLU the same; the derivatives are written out.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from . import backend
from .constants import GELU_CUBIC, GELU_LINEAR
from .formats import Groups
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
