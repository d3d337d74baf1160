"""What the transformers share around their blocks: the blocks by path, running them with or without gradient
checkpointing, and the strength of the adapters inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.ops import look_at_weights_again
from ppcoat.nn.recompute import checkpointed
from ppcoat.nn.saved_tensors import saved_as_they_are


class BlockModel:
    """For a ModelMixin whose forward runs its blocks through `run_block`.

    block_lists: names of the LayerLists of blocks, in the order in which they run. checkpoint_blocks: how
    many blocks, from the first, enable_gradient_checkpointing() covers; None: all. What a covered block saves
    is its inputs, in the form that the context around the forward pass says (nn/saved_tensors.py).
    """

    block_lists: ClassVar[tuple[str, ...]]
    checkpoint_blocks: int | None = None
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def named_blocks(self) -> dict[str, nn.Layer]:
        """Path -> block, in the order in which they run."""
        return {
            f"{name}.{i}": block for name in self.block_lists for i, block in enumerate(getattr(self, name))
        }

    def set_state_dict(self, state_dict: dict[str, paddle.Tensor], *args, **kwargs):
        """As of any Layer: names -> tensors, of any shape and dtype that the parameters have."""
        look_at_weights_again(self)
        return super().set_state_dict(state_dict, *args, **kwargs)

    def run_block(self, index: int, block: nn.Layer, *args: paddle.Tensor | None, **settings: object):
        """block(*args, **settings), the model's block number `index`; checkpointed while training if it is
        covered. settings: its arguments that are no tensors."""
        if not paddle.is_grad_enabled():
            with saved_as_they_are():  # nothing is, but Linears share what FP8 products make of their input
                return block(*args, **settings)
        covered = self.checkpoint_blocks is None or index < self.checkpoint_blocks
        if not (covered and self.gradient_checkpointing and self.training and paddle.is_grad_enabled()):
            return block(*args, **settings)

        state = adapters(block)  # as it is now: the backward runs after `forward` has put it back

        def run_with_adapters(*args):
            with adapters_set(state):
                return block(*args, **settings)

        trained = [parameter for parameter in block.parameters() if not parameter.stop_gradient]
        return checkpointed(run_with_adapters, *args, trained=trained)

    def _set_gradient_checkpointing(self, layer: nn.Layer, value: bool = False) -> None:
        count = self.checkpoint_blocks
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise ConfigError(f"checkpoint_blocks must be a whole number from 0 or None, got {count!r}")
        if layer is self:
            self.gradient_checkpointing = value


AdapterState = dict[str, float | bool]  # attribute -> value


def adapters(layer: nn.Layer, factor: float = 1.0) -> dict[nn.Layer, AdapterState]:
    """The adapters that were put into `layer` (sublayers with a `scale_multiplier`), and the state of each:
    `factor` times its strength, and whether it is switched on where it can be switched."""
    return {
        sub: {"scale_multiplier": sub.scale_multiplier * factor}
        | ({"enabled": sub.enabled} if hasattr(sub, "enabled") else {})
        for sub in layer.sublayers()
        if hasattr(sub, "scale_multiplier")
    }


@contextmanager
def adapters_set(states: dict[nn.Layer, AdapterState]) -> Iterator[None]:
    """Context manager: each adapter has the state given; afterwards the one that it had before."""
    before = {layer: {name: getattr(layer, name) for name in state} for layer, state in states.items()}
    try:
        _set(states)
        yield
    finally:
        _set(before)


def _set(states: dict[nn.Layer, AdapterState]) -> None:
    for layer, state in states.items():
        for name, value in state.items():
            setattr(layer, name, value)


def wanted_scale(joint_attention_kwargs: dict | None) -> float | None:
    """The scale wanted for this call, None if none is. Raises ConfigError for other keys."""
    known = dict(joint_attention_kwargs or {})
    scale = known.pop("scale", None)
    if known:
        raise ConfigError(f"joint_attention_kwargs has unknown keys {sorted(known)}: only 'scale' is known")
    return scale


def finite_half(x: paddle.Tensor) -> paddle.Tensor:
    """x, of any shape: float16 ends at 65504, and FLUX's largest would be inf. Other dtypes pass."""
    return x.clip(-65504, 65504) if x.dtype == paddle.float16 else x
