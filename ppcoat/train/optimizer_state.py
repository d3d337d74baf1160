"""An optimizer's tensors: how many bytes they take, and their way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Iterable

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
