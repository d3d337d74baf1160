"""Computing again in backward what was not kept: whole blocks, and the cheap parts of a block.

    y = checkpointed(block, x, cos, sin, trained=parameters)    # always: holds x, runs the block again
    y = recomputed(norm, x)                                     # holds x, and y nowhere, under "+recompute"
    o = recomputed_attention(core, q, k, v, bias)               # the same; q, k, v in FP8 under "+attention"

Inputs are held as the active context of saved.py says, where there is one. Constants (masks, rotary tables)
are held as they are. No hooks of Paddle's are taken, so that this works beside those of the context. Within
what is computed again nothing is packed and nothing else is left out.

Source: gradient checkpointing (arXiv 1604.06174); COAT (arXiv 2410.19313) section 5 for what to keep in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import paddle
from paddle.autograd import PyLayer

from .held import RebuiltTensor
from .saved import Kept, SavedTensors, kept_as_they_are, saving_now

Function = Callable[..., paddle.Tensor]
Outputs = paddle.Tensor | tuple[paddle.Tensor, ...]


def checkpointed(
    function: Callable[..., Outputs], *inputs: paddle.Tensor | None, trained: Sequence[paddle.Tensor] = ()
) -> Outputs:
    """function(*inputs), keeping its inputs only; it runs again in backward, with the same random numbers.

    Tokens [B, tokens, width] that carry a gradient are held in FP8 if the active context has
    `fp8_checkpoints`, everything else as it is. trained: the parameters inside that are trained; their
    gradients are added to their .grad while backward runs (so paddle.grad does not see them).
    """
    if not (paddle.is_grad_enabled() and (trained or any(_carries_gradient(x) for x in inputs))):
        return function(*inputs)
    saving, call = saving_now(), _Call(function, inputs, paddle.get_rng_state())
    fmt = saving.checkpoint_fmt if saving is not None else None
    tokens = [isinstance(x, paddle.Tensor) and x.ndim == 3 for x in inputs]
    call.hold(saving, [(fmt if each else None, False) for each in tokens])
    return _Operation.apply(call, *inputs, *trained)


def recomputed(function: Function, *inputs: paddle.Tensor | None) -> paddle.Tensor:
    """function(*inputs); under "+recompute" only the inputs are held, packed, and the result is computed
    again for its own backward and for that of whoever reads it next.

    function: cheap, without random numbers and without layers that train. It must return the shape in which
    its reader sees it.
    """
    saving = _left_out(inputs)
    if saving is None:
        return function(*inputs)
    return _run(function, inputs, saving, [(saving.policy.fmt, False)] * len(inputs))


def recomputed_attention(
    function: Function,
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    *others: paddle.Tensor | None,
) -> paddle.Tensor:
    """function(q, k, v, *others), as `recomputed`. q, k, v [B, tokens, heads, head_dim] are held as they are;
    under "+attention" values in FP8, queries and keys in FP8 and half a byte.
    """
    saving = _left_out((q, k, v))
    if saving is None:
        return function(q, k, v, *others)
    fmt = saving.policy.fmt if saving.policy.pack_attention else None
    # Scores go through an exponential: 2.5 % of rounding in q or k would be 8 % behind it.
    forms = [(fmt, True), (fmt, True), (fmt, False), *[(None, False)] * len(others)]
    return _run(function, (q, k, v, *others), saving, forms)


class LocalGraph:
    """output = function(*inputs) with a graph of its own, cut off from everything around it.

    wanted: which inputs get a gradient, by default all; the others may be None.
    """

    def __init__(
        self, function: Callable[..., Outputs], *inputs: paddle.Tensor | None, wanted: Sequence[bool] = ()
    ) -> None:
        self._wanted = wanted or [True] * len(inputs)
        self.inputs = [None if x is None else x.detach() for x in inputs]
        for x, gets_gradient in zip(self.inputs, self._wanted, strict=True):
            if x is not None:
                x.stop_gradient = not gets_gradient
        with paddle.enable_grad(), kept_as_they_are():
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


class _Call:
    """One call of a function: what it held, and its graph from when it is computed again until its backward.

    random: the state of the generators at the call, None for a function that draws nothing.
    """

    def __init__(
        self, function: Callable[..., Outputs], inputs: Sequence[paddle.Tensor | None], random: list | None
    ) -> None:
        self.function, self._inputs, self._random = function, inputs, random
        self._wanted = [_carries_gradient(x) for x in inputs]
        self.is_tensor = [x is not None for x in inputs]
        self._graph: LocalGraph | None = None

    def hold(self, saving: SavedTensors | None, forms: Sequence[tuple]) -> None:
        """Hold the inputs instead of what they are: for each, its format (None: as it is) and if finely."""
        self._held = [
            None if x is None else Kept(x.detach()) if saving is None else saving.hold(x, *form)
            for x, form in zip(self._inputs, forms, strict=True)
        ]
        self._inputs = None

    def again(self) -> LocalGraph:
        """The function once more, ready for backward."""
        if self._graph is None:
            inputs = [None if kept is None else kept.unpack() for kept in self._held]
            with _random_state(self._random):
                self._graph = LocalGraph(self.function, *inputs, wanted=self._wanted)
        return self._graph

    def result(self) -> paddle.Tensor:
        """What the function returned, computed again."""
        return self.again().output

    def gradients(self, *grads: paddle.Tensor) -> list[paddle.Tensor | None]:
        """See LocalGraph; the graph goes with it."""
        graph, self._graph = self.again(), None
        return graph.gradients(*grads)


class _Operation(PyLayer):
    @staticmethod
    def forward(ctx, call: _Call, *tensors: paddle.Tensor | None) -> Outputs:
        ctx.call, ctx.trained = call, len(tensors) - len(call.is_tensor)
        return call.function(*tensors[: len(call.is_tensor)])

    @staticmethod
    def backward(ctx, *grads: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        found = zip(ctx.call.gradients(*grads), ctx.call.is_tensor, strict=True)
        # one for each tensor that came; those of the parameters are where they belong already
        return *(gradient for gradient, is_tensor in found if is_tensor), *[None] * ctx.trained


def _run(
    function: Function, inputs: Sequence[paddle.Tensor | None], saving: SavedTensors, forms: Sequence[tuple]
) -> paddle.Tensor:
    call = _Call(function, inputs, None)
    call.hold(saving, forms)
    output = _Operation.apply(call, *inputs)
    saving.rebuild(output.detach(), RebuiltTensor(call.result))
    return output


def _left_out(inputs: Sequence[paddle.Tensor | None]) -> SavedTensors | None:
    """The active context, if under it what is computed from these inputs is to be computed again."""
    saving = saving_now() if paddle.is_grad_enabled() else None
    if saving is None or not saving.policy.recompute or not any(_carries_gradient(x) for x in inputs):
        return None
    return saving


def _carries_gradient(x: paddle.Tensor | None) -> bool:
    return x is not None and not x.stop_gradient


@contextmanager
def _random_state(state: list | None) -> Iterator[None]:
    """Within it, the generators draw from `state` on; afterwards they go on where they were."""
    if state is None:
        yield
        return
    before = paddle.get_rng_state()
    paddle.set_rng_state(state)
    try:
        yield
    finally:
        paddle.set_rng_state(before)
