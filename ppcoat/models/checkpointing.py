"""Gradient checkpointing of blocks: what they compute is not kept but computed again in backward."""

from __future__ import annotations

import paddle
from paddle import nn

from ppcoat.models.adapters import adapters, adapters_set
from ppcoat.nn.checkpoint import checkpointed


class CheckpointedBlocks:
    """For a ModelMixin whose forward runs its blocks through `run_block`.

    What a block keeps then is its inputs, in the form that the context around the forward pass says
    (nn/checkpoint.py).
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def run_block(self, block: nn.Layer, *args: paddle.Tensor | None):
        """block(*args); checkpointed while training, if enable_gradient_checkpointing() was called."""
        if not (self.gradient_checkpointing and self.training and paddle.is_grad_enabled()):
            return block(*args)

        scales = adapters(block)  # as they are now: the backward runs after `forward` has put them back

        def run_with_scales(*args):
            with adapters_set(scales):
                return block(*args)

        trained = [parameter for parameter in block.parameters() if not parameter.stop_gradient]
        return checkpointed(run_with_scales, *args, trained=trained)

    def _set_gradient_checkpointing(self, layer: nn.Layer, value: bool = False) -> None:
        if layer is self:
            self.gradient_checkpointing = value
