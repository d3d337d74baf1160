"""COAT put into a model and its optimizer from outside: one object that reads the `coat` section of a config.

    coat = COATTrainer(COATConfig())
    optimizer = coat.create_optimizer(lora_parameters, lr=1e-4)
    with coat.saved_tensors() as saved:
        loss = ...
    loss.backward()

COAT: arXiv 2410.19313. With `enabled: false` the same calls give AdamW and ordinary activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import paddle
from pydantic import Field

from ppcoat.config.schema import CoatConfig
from ppcoat.models.blocks import BlockModel
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.policy import granularity_groups
from ppcoat.nn.saved_tensors import SavedTensors, fp8_saved_tensors
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig


class COATConfig(CoatConfig):
    """The `coat` section of a config, switched on."""

    enabled: bool = Field(True, description="train with COAT")


class COATTrainer:
    """Chooses optimizer, saving policy and Linears of a run from its `coat` settings. It trains nothing: the
    loop is the caller's.

    gradient_checkpointing: `convert` tells the model. Blocks of FLUX and NextDiT_CLIP (the first
    coat.memory.checkpoint_blocks, or all) are computed again in backward and save their inputs only, in FP8
    if coat.memory.enable_efficient_checkpoint. Any other model checkpoints by itself; Paddle allows no second
    pair of saved-tensor hooks beside those of its recompute, so nothing is packed or counted there.
    """

    def __init__(self, config: CoatConfig | None = None, gradient_checkpointing: bool = False):
        self.config = config if config is not None else COATConfig()
        self.gradient_checkpointing = gradient_checkpointing
        self._model_takes_hooks = gradient_checkpointing  # until `convert` meets one that does not

    @property
    def fp8_activations(self) -> bool:
        """Whether activations are kept in FP8 for backward."""
        return (
            self.config.enabled and self.config.activation.use_fp8 and self.config.activation.policy != "none"
        )

    @property
    def policy(self) -> str:
        """Name of the saving policy, "none" where FP8 activations are off."""
        return self.config.activation.policy if self.fp8_activations else "none"

    @property
    def linear_group_size(self) -> int | None:
        """Features that share one scale in the input kept for a LoRA; None: one scale per tensor."""
        return granularity_groups(
            self.config.activation.linear_granularity, self.config.activation.group_size
        )

    def convert(self, model: paddle.nn.Layer) -> paddle.nn.Layer:
        """Make `model` ready, in place; call it after inject_lora. Frozen Linears without LoRA save nothing
        for backward, the others their input in FP8; blocks are checkpointed where that is wanted.
        """
        activation = self.config.activation
        if self.fp8_activations:
            replace_linear_with_fp8(model, activation.linear_granularity, activation.group_size)
        if isinstance(model, BlockModel):
            self._model_takes_hooks = False
            model.checkpoint_blocks = self.config.memory.checkpoint_blocks
        if self.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        return model

    def saved_tensors(self) -> AbstractContextManager[SavedTensors | None]:
        """Context for the forward pass: what autograd keeps becomes FP8, or is only counted.

        Where a model takes the hooks for its own recompute nothing can be counted: the context gives None.
        """
        if self._model_takes_hooks:
            return nullcontext()
        activation = self.config.activation
        return fp8_saved_tensors(
            self.policy,
            activation.nonlinear_granularity,
            activation.group_size,
            fp8_checkpoints=self._fp8_checkpoints,
        )

    @property
    def _fp8_checkpoints(self) -> bool:
        return self.config.enabled and self.config.memory.enable_efficient_checkpoint

    def create_optimizer(
        self,
        parameters: Sequence[paddle.Tensor],
        lr: float | paddle.optimizer.lr.LRScheduler = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        max_grad_norm: float = 1.0,
        fp8_states: bool | None = None,
    ) -> paddle.optimizer.Optimizer:
        """FP8AdamW, or paddle's AdamW where FP8 states are off, for parameters of any shape. max_grad_norm 0
        clips nothing.

        fp8_states: overrides what the config says (train.optimizer: coat_fp8_adamw asks for FP8 by name).
        """
        clip = paddle.nn.ClipGradByGlobalNorm(max_grad_norm) if max_grad_norm > 0 else None
        shared = {"learning_rate": lr, "parameters": list(parameters), "beta1": betas[0], "beta2": betas[1],
                  "epsilon": epsilon, "weight_decay": weight_decay, "grad_clip": clip}  # fmt: skip
        if fp8_states is None:
            fp8_states = self.config.enabled and self.config.optimizer.use_fp8
        if not fp8_states:
            return paddle.optimizer.AdamW(**shared)
        states = self.config.optimizer
        return FP8AdamW(
            **shared,
            fp8_config=FP8QuantizationConfig(
                m1_format=states.m1_format,
                m2_format=states.m2_format,
                block_size=states.block_size,
                use_dynamic_range_expansion=states.use_dynamic_range_expansion,
            ),
            stochastic_rounding=states.stochastic_rounding,
        )
