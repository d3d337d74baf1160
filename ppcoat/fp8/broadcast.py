"""Broadcasting as Paddle on a CPU likes it."""

from __future__ import annotations

import paddle


def spread(small: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """`small`, which broadcasts to x's shape, as a whole tensor of that shape, on a CPU; itself elsewhere.

    An elementwise operation on a CPU takes 4 to 18 times as long where it has to broadcast (Paddle 3.3).
    Itself under autograd, too, which would hold the whole tensor for backward.
    """
    if not paddle.in_dynamic_mode() or paddle.is_grad_enabled() or not x.place.is_cpu_place():
        return small
    return small.expand_as(x)
