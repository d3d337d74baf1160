"""COAT put into a model and its optimizer from outside: one object that reads the `coat` section of a config.

    coat = COATTrainer(COATConfig())
    optimizer = coat.create_optimizer(lora_parameters, lr=1e-4)
    with coat.saved_tensors() as saved:
        loss = ...
    loss.backward()

COAT: arXiv 2410.19313. With `enabled: false` the same calls give AdamW and ordinary activations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import paddle
from pydantic import Field

from ppcoat.config.schema import CoatConfig
from ppcoat.models.checkpointing import CheckpointedBlocks
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.policy import get_policy, granularity_groups
from ppcoat.nn.saved import SavedTensors, fp8_saved_tensors
from ppcoat.nn.saving import apply_saving_policy, flux_blocks, remove_saving_policy
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig

_log = logging.getLogger(__name__)


class COATConfig(CoatConfig):
    """The `coat` section of a config, switched on."""

    enabled: bool = Field(True, description="train with COAT")


class COATTrainer:
    """Chooses optimizer, saving policy and Linears of a run from its `coat` settings.

    gradient_checkpointing: blocks are computed again in backward and keep their inputs only, in FP8 if
    coat.memory.enable_efficient_checkpoint. FLUX blocks are told by `convert`, NextDiT_CLIP by its
    enable_gradient_checkpointing(). Any other model checkpoints by itself; Paddle allows no second pair of
    saved-tensor hooks beside those of its recompute, so nothing is packed or counted there.
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
        """Put the saving policy and gradient checkpointing into `model`, in place; call it after inject_lora.

        Frozen Linears without LoRA keep nothing for backward; FLUX blocks follow the policy.
        """
        if isinstance(model, CheckpointedBlocks):
            self._model_takes_hooks = False
        activation = self.config.activation
        if self.fp8_activations:
            replace_linear_with_fp8(model, activation.linear_granularity, activation.group_size)
        blocks = len(list(flux_blocks(model)))
        if not blocks:
            return model
        memory, checkpointed = self.config.memory, 0
        if self.gradient_checkpointing:
            checkpointed = memory.checkpoint_blocks or blocks
        policy = get_policy(
            self.policy,
            granularity_groups(activation.nonlinear_granularity, activation.group_size),
            self.linear_group_size,
        )
        left = apply_saving_policy(model, policy, checkpointed, self._fp8_checkpoints)
        if checkpointed and left:
            # Holding everything of these blocks could be more than the memory that checkpointing was to save.
            _log.warning("the model checkpoints all blocks by itself")
            remove_saving_policy(model)
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
        """FP8AdamW, or paddle's AdamW where FP8 states are off. max_grad_norm 0 clips nothing.

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
