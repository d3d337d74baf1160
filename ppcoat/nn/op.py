"""What every op of ops.py is: a formula, and a backward by hand that asks the active Saver what to save.

A graph goes backward once: Paddle's PyLayer ends the process at a second backward (retain_graph), and refuses
paddle.grad for some of its inputs only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import paddle
from paddle.autograd import PyLayer

from .recompute import carries_gradient
from .saved_tensors import Saver, saver

Tensors = tuple[paddle.Tensor, ...]


@paddle.jit.not_to_static  # a static graph has no backward, and the formulas are operators of Paddle
def run_op(kind: type[OpCall], *inputs: paddle.Tensor | None, **settings: object) -> paddle.Tensor | Tensors:
    """One call of an op on tensors of any shape that it takes, None for those that are left out; dtypes are
    those of ops.py. settings: its arguments that never want a gradient, by name."""
    if not (paddle.is_grad_enabled() and any(map(carries_gradient, inputs))):
        return kind.compute(*_without_gaps(inputs), **settings)
    active = saver()
    if not active.policy.by_hand:
        return kind.differentiable(*inputs, **settings)
    op = kind(active, inputs, settings)
    result = _ByHand.apply(op, *inputs)
    op.tell(result)
    return result


class OpCall:
    """One call of an op. `compute` is the formula, by the fastest version that there is. `forward` computes
    the result and saves what `backward` needs, which turns the result's gradient into those of the inputs (of
    those that want one). `again`, in ops whose result is offered, computes the result once more from what was
    saved. Tensors have any shape and dtype that the function in ops.py takes."""

    compute: ClassVar[Callable[..., paddle.Tensor | Tensors]]

    def __init__(self, active: Saver, inputs: Sequence[paddle.Tensor | None], settings: dict) -> None:
        self.saver, self.settings = active, settings
        self.wants = [carries_gradient(x) for x in inputs]

    @classmethod
    def differentiable(cls, *inputs: paddle.Tensor | None, **settings: object) -> paddle.Tensor | Tensors:
        """The formula in operators of Paddle that autograd differentiates: of an FP8 op, its reference."""
        return getattr(cls.compute, "reference", cls.compute)(*inputs, **settings)

    def tell(self, result: paddle.Tensor) -> None:
        """Tell the Saver of the result: here, how to compute it again."""
        if self.saver.policy.recompute:
            self.saver.offer(result, self.again)


class _ByHand(PyLayer):
    """Paddle's view of an op."""

    @staticmethod
    def forward(ctx, op: OpCall, *inputs: paddle.Tensor | None) -> paddle.Tensor | Tensors:
        ctx.op, ctx.are_tensors = op, [x is not None for x in inputs]
        return op.forward(*_without_gaps(inputs))

    @staticmethod
    def backward(ctx, *grads: paddle.Tensor) -> Tensors:
        op, ctx.op = ctx.op, None  # what it saved goes as soon as it was used
        found = zip(op.backward(*grads), op.wants, ctx.are_tensors, strict=True)
        return tuple(gradient if wanted else None for gradient, wanted, is_tensor in found if is_tensor)


def _without_gaps(inputs: Sequence[paddle.Tensor | None]) -> list[paddle.Tensor | None]:
    """Kernels want their tensors contiguous; a slice of several samples is not. In a static graph all are."""
    if not paddle.in_dynamic_mode():
        return list(inputs)
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in inputs]
