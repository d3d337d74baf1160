"""What every op of ops.py is: a formula, and a backward by hand that asks the active Saver what to save."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle.autograd import PyLayer

from .recompute import carries_gradient
from .saved_tensors import Saver, saver

Tensors = tuple[paddle.Tensor, ...]


@paddle.jit.not_to_static  # a static graph has no backward, and the formulas are operators of Paddle
def run_op(kind: type[OpCall], *inputs: paddle.Tensor | None, **settings: object) -> paddle.Tensor | Tensors:
    """One call of an op on tensors of any shape that it takes, None for those that are left out. settings:
    its arguments that never want a gradient, by name."""
    if not (paddle.is_grad_enabled() and any(map(carries_gradient, inputs))):
        return kind.compute(*inputs, **settings)
    active = saver()
    if not active.policy.by_hand:
        return kind.differentiable(*inputs, **settings)
    op = kind(active, inputs, settings)
    result = _ByHand.apply(op, *inputs)
    op.tell(result)
    return result


class OpCall:
    """One call of an op. `forward` computes the result and saves what `backward` needs, `again` computes it
    once more, `backward` turns its gradient into those of the inputs (of those that want one). Shapes are
    those that the function in ops.py says."""

    def __init__(self, active: Saver, inputs: Sequence[paddle.Tensor | None], settings: dict) -> None:
        self.saver, self.settings = active, settings
        self.wants = [carries_gradient(x) for x in inputs]

    @staticmethod
    def compute(*inputs: paddle.Tensor | None, **settings: object) -> paddle.Tensor | Tensors:
        """The formula, by the fastest version that there is."""
        raise NotImplementedError

    @classmethod
    def differentiable(cls, *inputs: paddle.Tensor | None, **settings: object) -> paddle.Tensor | Tensors:
        """The formula in operators of Paddle that autograd differentiates."""
        return cls.compute(*inputs, **settings)

    def tell(self, result: paddle.Tensor) -> None:
        """Tell the Saver of the result: here, how to have it again."""
        if self.saver.policy.recompute:
            self.saver.offer(result, self.again)

    def again(self) -> paddle.Tensor:
        """The result once more, from what was saved."""
        raise NotImplementedError


class _ByHand(PyLayer):
    """Paddle's view of an op."""

    @staticmethod
    def forward(ctx, op: OpCall, *inputs: paddle.Tensor | None) -> paddle.Tensor | Tensors:
        ctx.op, ctx.are_tensors = op, [x is not None for x in inputs]
        return op.forward(*inputs)

    @staticmethod
    def backward(ctx, *grads: paddle.Tensor) -> Tensors:
        found = zip(ctx.op.backward(*grads), ctx.op.wants, ctx.are_tensors, strict=True)
        return tuple(gradient if wanted else None for gradient, wanted, is_tensor in found if is_tensor)
