"""The section `coat`: FP8 optimizer states and FP8 saved activations (COAT, arXiv 2410.19313)."""

from __future__ import annotations

import difflib
from typing import Literal, get_args

from pydantic import Field, field_validator

from ppcoat.config.section import Section

Fp8Format = Literal["e4m3", "e5m2"]
Granularity = Literal["per_tensor", "per_group"]
SavingPolicy = Literal["none", "coat", "coat+recompute", "coat+recompute+attention"]


class CoatOptimizerConfig(Section):
    """FP8 optimizer states (COAT, section 4)."""

    use_fp8: bool = Field(True, description="keep both AdamW moments in FP8")
    m1_format: Fp8Format = Field("e4m3", description="format of the first moment")
    m2_format: Fp8Format = Field("e4m3", description="format of the second moment")
    block_size: int = Field(
        128, ge=16, multiple_of=16, description="values that share one scale; smaller is more exact"
    )
    use_dynamic_range_expansion: bool = Field(
        True, description="adapt the codes of every block to its range, see ppcoat/fp8/quantize.py"
    )
    stochastic_rounding: bool = Field(
        False, description="bf16 parameters are rounded at random instead of having a float32 copy"
    )


class CoatActivationConfig(Section):
    """FP8 activations kept for backward (COAT, section 5)."""

    use_fp8: bool = Field(True, description="keep activations for backward in FP8")
    policy: SavingPolicy = Field(
        "coat",
        description="what a block keeps: +recompute rebuilds linear inputs, +attention packs q, k, v",
    )
    linear_granularity: Granularity = Field("per_tensor", description="scales of inputs of linear layers")
    nonlinear_granularity: Granularity = Field(
        "per_group", description="scales of everything else that is kept"
    )
    group_size: int = Field(128, ge=1, description="values that share one scale where per_group")

    @field_validator("policy", mode="before")
    @classmethod
    def _is_a_known_policy(cls, value: object) -> object:
        known = get_args(SavingPolicy)
        if isinstance(value, str) and value not in known:
            nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown saving policy {value!r}, the nearest is {nearest!r} of {', '.join(known)}"
            )
        return value


class CoatMemoryConfig(Section):
    """What is done and said about memory."""

    enable_efficient_checkpoint: bool = Field(
        True,
        description="with train.gradient_checkpointing, keep the inputs of checkpointed blocks in FP8 too",
    )
    checkpoint_blocks: int | None = Field(
        None,
        ge=1,
        description="blocks that train.gradient_checkpointing covers, from the first; none: all",
    )
    log_memory_stats: bool = Field(
        False, description="print allocated and reserved memory at the stages of a step"
    )


class CoatConfig(Section):
    """COAT: FP8 optimizer states and FP8 saved activations."""

    enabled: bool = Field(False, description="train with COAT")
    optimizer: CoatOptimizerConfig = Field(CoatOptimizerConfig(), description="FP8 optimizer states")
    activation: CoatActivationConfig = Field(CoatActivationConfig(), description="FP8 saved activations")
    memory: CoatMemoryConfig = Field(CoatMemoryConfig(), description="memory settings")
