"""What is not finite, and where it comes from: NaN and infinity in tensors, in a model's weights, and in what
a model makes. They come from damaged files, and from numbers beyond what a dtype holds.

Nothing here is asked while all goes well but one tensor at a time: to look through all weights takes as long
as to copy them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import paddle
from paddle import nn

from ppcoat.errors import ConfigError

_FLOAT8 = (paddle.float8_e4m3fn, paddle.float8_e5m2)
# -> where a model lies, and the model that made a tensor
Maker = Callable[[], tuple[object, nn.Layer]]


def is_finite(tensor: paddle.Tensor) -> bool:
    """Whether no value of a tensor, of any shape and dtype, is NaN or infinite. Waits for the device."""
    if not (tensor.is_floating_point() or tensor.dtype in _FLOAT8):  # which Paddle calls none
        return True
    if tensor.place.is_cuda_pinned_place():  # a weight that waits in host memory
        tensor = tensor.cpu()
    # what the operator lacks a kernel for; a cast from float8 keeps its NaN
    return bool(paddle.isfinite(tensor.astype("float32")).all())


def first_not_finite(tensors: Mapping[str, paddle.Tensor]) -> str | None:
    """Name of the first of these tensors, of any shape, that is not finite. One without memory yet is passed
    over."""
    there = (name for name, tensor in tensors.items() if tensor._is_initialized())
    return next((name for name in there if not is_finite(tensors[name])), None)


def damaged_weight(model: nn.Layer) -> str | None:
    """Name of the first parameter or buffer of a model that is not finite."""
    return first_not_finite(model.state_dict())


def check_made(tensor: paddle.Tensor, what: str, maker: Maker | None = None) -> None:
    """Raises ConfigError, for a tensor of any shape that is not finite, which says whether the weights of the
    model that made it are to blame. what: names the tensor."""
    if is_finite(tensor):
        return
    place, model = maker() if maker else (None, None)
    weight = damaged_weight(model) if maker else None
    if weight is not None:
        raise ConfigError(f"{what} is not finite: {weight} of {place} holds NaN or infinity: fetch it again")
    raise ConfigError(f"{what} is not finite; use model.dtype float32 or bfloat16, or remove the file")
