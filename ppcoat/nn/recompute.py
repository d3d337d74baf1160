"""Gradient checkpointing: what a block computes is not saved but computed again in backward.

    y = checkpointed(block, x, cos, sin, trained=parameters)    # saves x, runs the block again in backward

The inputs are saved as the active Saver says (saved_tensors.py). No hooks of Paddle's are taken, so that this
works beside those of the context. While the block runs again its ops save their inputs as they are.

Source: gradient checkpointing (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import paddle
from paddle.autograd import PyLayer

from .policy import AS_IT_IS, SavingPolicy
from .saved_forms import PlainSaved, SavedTensor
from .saved_tensors import FLOATS, policy_of_recomputation, saved_as_they_are, saver

Outputs: TypeAlias = paddle.Tensor | tuple[paddle.Tensor, ...]


def checkpointed(
    function: Callable[..., Outputs], *inputs: paddle.Tensor | None, trained: Sequence[paddle.Tensor] = ()
) -> Outputs:
    """function(*inputs), saving its inputs only; it runs again in backward, with the same random numbers.

    Tokens [B, tokens, width] are saved in FP8 where the active context has `fp8_checkpoints`, everything else
    as it is, in any dtype. trained: the parameters inside that are trained; their gradients are added to
    their .grad while backward runs (so paddle.grad does not see them).
    """
    if not (paddle.is_grad_enabled() and (trained or any(map(carries_gradient, inputs)))):
        return function(*inputs)
    return _Checkpoint.apply(_CheckpointedCall(function, inputs), *inputs, *trained)


def carries_gradient(x: paddle.Tensor | None) -> bool:
    """Whether backward has to give a gradient of x, of any shape and dtype."""
    return x is not None and not x.stop_gradient


class LocalGraph:
    """output = function(*inputs) with a graph of its own, cut off from everything around it.

    Tensors have any shape and dtype that the function takes. wanted: which inputs get a gradient, by default
    all; the others may be None. policy: what ops inside save.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        *inputs: paddle.Tensor | None,
        wanted: Sequence[bool] = (),
        policy: SavingPolicy = AS_IT_IS,
    ) -> None:
        self._wanted = wanted or [True] * len(inputs)
        self.inputs = [None if x is None else x.detach() for x in inputs]
        for x, gets_gradient in zip(self.inputs, self._wanted, strict=True):
            if x is not None:
                x.stop_gradient = not gets_gradient
        with paddle.enable_grad(), saved_as_they_are(policy):
            self._outputs = function(*self.inputs)

    @property
    def output(self) -> paddle.Tensor:
        """Of a function with one result."""
        return self._outputs.detach()

    def gradients(self, *grads: paddle.Tensor) -> list[paddle.Tensor | None]:
        """Gradients of the results -> those of the inputs; parameters inside get theirs added to .grad."""
        outputs = self._outputs if isinstance(self._outputs, tuple | list) else (self._outputs,)
        # Not paddle.grad: it must not run inside another paddle.grad.
        paddle.autograd.backward(list(outputs), list(grads))
        return [x.grad if wanted else None for x, wanted in zip(self.inputs, self._wanted, strict=True)]


class _CheckpointedCall:
    """One call of a function: its inputs in the forms in which they are saved, and the state of the random
    generators."""

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[paddle.Tensor | None]) -> None:
        self.function, self._random = function, _random_states()
        self.saved, self._policy = [_save(x) for x in inputs], policy_of_recomputation()
        self._wanted = [carries_gradient(x) for x in inputs]

    def gradients(self, *grads: paddle.Tensor) -> list[paddle.Tensor | None]:
        """Gradients of the results -> those of the inputs that are tensors."""
        inputs = [None if saved is None else saved.unpack() for saved in self.saved]
        with _random_numbers_from(self._random):
            graph = LocalGraph(self.function, *inputs, wanted=self._wanted, policy=self._policy)
        return [d for d, x in zip(graph.gradients(*grads), inputs, strict=True) if x is not None]


class _Checkpoint(PyLayer):
    @staticmethod
    def forward(ctx, call: _CheckpointedCall, *tensors: paddle.Tensor | None) -> Outputs:
        inputs = tensors[: len(call.saved)]
        ctx.call, ctx.trained = call, len(tensors) - len(inputs)
        return call.function(*inputs)

    @staticmethod
    def backward(ctx, *grads: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        call, ctx.call = ctx.call, None
        # The parameters' gradients are where they belong already.
        return *call.gradients(*grads), *[None] * ctx.trained


def _save(x: paddle.Tensor | None) -> SavedTensor | None:
    if x is None:
        return None
    if x.ndim == 3 and x.dtype in FLOATS:  # tokens
        return saver().save_checkpoint(x)
    # Steering vectors are small. Constants (rotary tables, masks) belong to the model's whole pass and do not
    # count here.
    return PlainSaved(x.detach()) if x.stop_gradient else saver().save_plain(x)


def _random_states() -> dict[str | None, list]:
    """State of the generators of the current device (None), and of the host's, which seeds dropout."""
    return {device: paddle.get_rng_state(device) for device in (None, "cpu")}


def _set_random_states(states: dict[str | None, list]) -> None:
    for device, state in states.items():
        paddle.set_rng_state(state, device)


@contextmanager
def _random_numbers_from(states: dict[str | None, list]) -> Iterator[None]:
    """Context manager: the generators draw from `states` on; afterwards they go on where they were."""
    before = _random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(before)
