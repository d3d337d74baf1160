"""What a run holds in tensors beside its parameters, and looks after: the optimizer's states (how many bytes
they take, and their way into a checkpoint and back), a running mean of the parameters in float32 (exponential
moving average), and where NaN or inf came from: the first module of a forward pass whose output is not
finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import paddle


def optimizer_state_bytes(optimizer: paddle.optimizer.Optimizer) -> int:
    """Bytes of the moments that an optimizer keeps, counted from its tensors."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    moments = [t for name, t in optimizer.state_dict().items() if "moment" in name]
    return sum(t.size * t.element_size() for t in moments)


def is_of_parameter(name: str, parameters: Iterable[paddle.Tensor]) -> bool:
    """Whether a name in an optimizer's state begins with that of one of the parameters."""
    return any(name.startswith(f"{parameter.name}_") for parameter in parameters)


def optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer, parameters: dict[str, paddle.Tensor]
) -> dict[str, paddle.Tensor]:
    """The optimizer's tensors under names that hold in another process.

    Paddle's AdamW names a moment after its parameter's automatic name (linear_7.w_0); here it gets the path.
    """
    state = {
        name: value for name, value in optimizer.state_dict().items() if isinstance(value, paddle.Tensor)
    }
    for path, parameter in parameters.items():
        prefix = f"{parameter.name}_"
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{path}|{name.removeprefix(prefix)}"] = state.pop(name)
    return state


def set_optimizer_tensors(
    optimizer: paddle.optimizer.Optimizer,
    tensors: dict[str, paddle.Tensor],
    parameters: dict[str, paddle.Tensor],
) -> None:
    """The way back."""
    state = dict(tensors)
    for name in [name for name in state if "|" in name]:
        path, _, part = name.partition("|")
        state[f"{parameters[path].name}_{part}"] = state.pop(name)
    optimizer.set_state_dict(state)


class RunningMean:
    """mean <- mean - (1 - decay) * (mean - parameter), after every update of the parameters.

    parameters: {path: tensor}; the mean starts from their values. Source: ai-toolkit's `ema_config`, which
    has no warm-up either.
    """

    def __init__(self, parameters: Mapping[str, paddle.Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.tensors = {
            path: parameter.detach().astype("float32").clone() for path, parameter in parameters.items()
        }

    @paddle.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        for path, mean in self.tensors.items():
            distance = mean - self.parameters[path].astype("float32")
            mean.subtract_(distance.scale_(1.0 - self.decay))

    @contextmanager
    def in_place_of_parameters(self) -> Iterator[None]:
        """Within it, the parameters hold the mean; afterwards, whatever happens, their own bits again."""
        own = {path: parameter.detach().clone() for path, parameter in self.parameters.items()}
        self._assign(self.tensors)
        try:
            yield
        finally:
            self._assign(own)

    def load(self, tensors: Mapping[str, paddle.Tensor]) -> None:
        """Take the mean from a checkpoint's tensors."""
        for path, mean in self.tensors.items():
            paddle.assign(tensors[path], output=mean)

    @paddle.no_grad()
    def _assign(self, values: Mapping[str, paddle.Tensor]) -> None:
        # into the memory that the parameters have: the optimizer may hold views of it
        for path, parameter in self.parameters.items():
            paddle.assign(values[path].astype(parameter.dtype), output=parameter)


@paddle.no_grad()
def first_bad_module(model: paddle.nn.Layer, forward: Callable[[], object]) -> str | None:
    """Path of the first sublayer (in the order in which they end) whose output holds NaN or inf in
    `forward()`, a pass through `model`; None if all are finite. Every output is read by the host: this is for
    a run that has gone wrong.
    """
    bad: list[str] = []

    def note(path: str) -> Callable:
        def hook(layer: paddle.nn.Layer, inputs: object, outputs: object) -> None:
            tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
            if not bad and not all(_is_finite(tensor) for tensor in tensors):
                bad.append(path)

        return hook

    hooks = [layer.register_forward_post_hook(note(path)) for path, layer in model.named_sublayers()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None


def _is_finite(value: object) -> bool:
    if not isinstance(value, paddle.Tensor) or not value.is_floating_point():
        return True
    return bool(paddle.isfinite(value.astype("float32")).all())
