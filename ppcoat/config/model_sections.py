"""The sections `model` and `network`: the frozen base model, and the adapter that is trained on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from ppcoat.config.section import Section, Strings

BlockRange = Annotated[tuple[int, ...], Strict(False)]


class ModelConfig(Section):
    """The frozen base model."""

    name_or_path: str = Field(min_length=1, description="folder of a pipeline in the diffusers layout")
    family: Literal["flux", "newbie"] = Field("flux", description="which model it is: FLUX.1 or NewBie-image")
    prompt_prefix: str | None = Field(
        None, description="what NewBie's Gemma reads before a caption; none: as its base model was trained"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is float32 on CPU and bfloat16 on GPU"
    )
    quantize: bool = Field(
        False, description="store the frozen Linears in FP8: half of bfloat16's memory, 2.6 % rounding"
    )
    quantize_matmul: bool = Field(
        False, description="with quantize: multiply in FP8 too, which rounds activations; wants sm_89 on"
    )
    quantized_beside_model: bool = Field(
        False, description="keep the FP8 copy for the next start in the model's folder, not in cache_dir"
    )
    blocks_to_swap: int = Field(
        0, ge=0, description="last blocks whose frozen weights stay in host memory until they compute"
    )

    @model_validator(mode="after")
    def _multiplies_what_is_quantised(self) -> ModelConfig:
        if self.quantize_matmul and not self.quantize:
            raise ValueError("quantize_matmul multiplies FP8 weights: set quantize, too")
        return self


class NetworkConfig(Section):
    """The adapter and where it goes."""

    type: Literal["lora", "lokr"] = Field("lora", description="kind of adapter; lokr is for newbie only")
    linear: int = Field(16, ge=1, description="rank r of the LoRA")
    linear_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability to drop an input element of the LoRA")
    lokr_factor: int = Field(
        -1, ge=-1, description="largest side of LoKr's small matrix; -1: as square as the sizes allow"
    )
    lokr_rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of LoKr's output rows left out")
    lokr_module_dropout: float = Field(0.0, ge=0, lt=1, description="probability to leave out a whole LoKr")
    targets: Strings | None = Field(
        None,
        min_length=1,
        description="endings of module names that get an adapter; none: those of the model's first trainer",
    )
    only_if_contains: Strings | None = Field(
        None, min_length=1, description="keep a module only if transformer.<its path> contains one of these"
    )
    ignore_if_contains: Strings | None = Field(
        None, min_length=1, description="leave out a module if transformer.<its path> contains one of these"
    )
    double_blocks: BlockRange | None = Field(
        None, description="[first, last] of the double blocks that get a LoRA, from 0; []: none of them"
    )
    single_blocks: BlockRange | None = Field(
        None, description="[first, last] of the single blocks that get a LoRA, from 0; []: none of them"
    )

    @field_validator("lokr_factor")
    @classmethod
    def _is_a_factor(cls, value: int) -> int:
        if value == 0:
            raise ValueError("came 0, wanted -1 or at least 1")
        return value

    @field_validator("double_blocks", "single_blocks")
    @classmethod
    def _is_a_range(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value and (len(value) != 2 or not 0 <= value[0] <= value[1]):
            raise ValueError(f"came {list(value)}, wanted [first, last] with 0 <= first <= last, or []")
        return value
