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
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.saved import SavedTensors, saved_tensors
from ppcoat.optim import FP8AdamW, FP8QuantizationConfig


class COATConfig(CoatConfig):
    """The `coat` section of a config, switched on."""

    enabled: bool = Field(True, description="train with COAT")


class COATTrainer:
    """Chooses optimizer, saving policy and Linears of a run from its `coat` settings.

    gradient_checkpointing: the model recomputes its blocks in backward. Only block inputs are kept then, and
    Paddle allows no second pair of saved-tensor hooks beside those of its recompute, so FP8 activations are
    off.
    """

    def __init__(self, config: CoatConfig | None = None, gradient_checkpointing: bool = False):
        self.config = config if config is not None else COATConfig()
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def fp8_activations(self) -> bool:
        """Whether activations are kept in FP8 for backward."""
        return self.config.enabled and self.config.activation.use_fp8 and not self.gradient_checkpointing

    @property
    def policy(self) -> str:
        """Name of the saving policy: "coat" or "none"."""
        return "coat" if self.fp8_activations else "none"

    @property
    def linear_group_size(self) -> int | None:
        """Features that share one scale in the input kept for a LoRA; None: one scale per tensor."""
        activation = self.config.activation
        return activation.group_size if activation.linear_granularity == "per_group" else None

    def convert(self, model: paddle.nn.Layer) -> paddle.nn.Layer:
        """Replace frozen Linears without LoRA by ones that keep nothing for backward; in place."""
        return replace_linear_with_fp8(model) if self.fp8_activations else model

    def saved_tensors(self) -> AbstractContextManager[SavedTensors | None]:
        """Context for the forward pass: what autograd keeps becomes FP8, or is only counted.

        With gradient checkpointing nothing can be counted, and the context gives None.
        """
        if self.gradient_checkpointing:
            return nullcontext()
        return saved_tensors(self.policy, self.config.activation.group_size)

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
        )
