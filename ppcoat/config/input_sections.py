"""The sections of a run's settings that say what it starts from: `model` (the frozen base), `network` (the
adapter that is trained on it), and those of `datasets` (folders of pictures with captions).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    Strict,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from ppcoat.config.base import (
    ModelText,
    PathText,
    PathTexts,
    Pixels,
    Quantize,
    Section,
    Strings,
    TextEncoderPlaces,
    TokenizerPlaces,
    VAEPlace,
    checked_trigger_word,
)
from ppcoat.errors import unknown_name

Channel = Annotated[int, Field(ge=0, le=255)]
BlockRange = Annotated[tuple[int, ...], Strict(False)]
AdapterType = Literal["lora", "dora", "lokr"]
BucketRule = Literal["aspect", "ai-toolkit", "square"]


class ModelConfig(Section):
    """The frozen base model."""

    name_or_path: ModelText = Field(
        description="folder of a pipeline in the diffusers layout, a FLUX file (.safetensors, .gguf), or "
        "tiny_flux"
    )
    text_encoders: TextEncoderPlaces = ()
    vae: VAEPlace = None
    tokenizers: TokenizerPlaces = ()
    family: Literal["flux", "newbie"] = Field("flux", description="which model it is: FLUX.1 or NewBie-image")
    arch: Literal["auto", "flux_kontext"] = Field(
        "auto",
        description="flux_kontext: FLUX.1 Kontext, whose LoRA is marked as one; auto: as the folder says",
    )
    prompt_prefix: str | None = Field(
        None, description="what NewBie's Gemma reads before a caption; none: as its base model was trained"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute dtype; auto is float32 on CPU and bfloat16 on GPU; products of float32 are TF32 "
        "on a GPU unless the process starts with NVIDIA_TF32_OVERRIDE=0",
    )
    quantize: Quantize = False
    quantize_matmul: bool = Field(
        False, description="with quantize: fp8, multiply in FP8 too, which rounds activations; wants sm_89 on"
    )
    quantized_beside_model: bool = Field(
        False,
        description="keep the quantised copy for the next start in the model's folder, not cache_dir",
    )
    stream_encoders: bool = Field(
        False,
        description="text encoders lie in host memory, and their blocks visit the device while captions are "
        "read: for cards below 12 GB",
    )
    blocks_to_swap: int = Field(
        0, ge=0, description="last blocks whose frozen weights stay in host memory until they compute"
    )

    @property
    def beside(self) -> dict[str, Any]:
        """Where what a model file lacks is, as `FluxFiles.found` takes it; only what is set."""
        places = {"text_encoders": self.text_encoders, "vae": self.vae, "tokenizers": self.tokenizers}
        return {name: place for name, place in places.items() if place is not None}

    @model_validator(mode="after")
    def _multiplies_what_is_quantised(self) -> ModelConfig:
        if self.quantize_matmul and self.quantize != "fp8":
            raise ValueError("quantize_matmul multiplies FP8 weights: set quantize: fp8, too")
        return self


class NetworkConfig(Section):
    """The adapter and where it goes."""

    type: AdapterType = Field(
        "lora",
        description="kind of adapter: lora; dora, which also trains a length for each output (flux); lokr",
    )
    linear: int = Field(16, ge=1, description="rank r of the LoRA")
    linear_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability to drop an input element of the LoRA")
    lokr_full_rank: bool = Field(
        False, description="LoKr with both matrices whole; linear has no effect then"
    )
    lokr_factor: int = Field(
        -1, ge=-1, description="largest side of LoKr's small matrix; -1: as square as the sizes allow"
    )
    lokr_rank_dropout: float = Field(0.0, ge=0, lt=1, description="share of LoKr's output rows left out")
    lokr_module_dropout: float = Field(0.0, ge=0, lt=1, description="probability to leave out a whole LoKr")
    pretrained_lora_path: PathText | None = Field(
        None,
        description="LoRA file or folder that a new run starts from, of any program; read only at the start",
    )
    pretrained_lora_partly: bool = Field(
        False, description="leave out what that file has for layers and kinds that this run does not train"
    )
    targets: Strings | None = Field(
        None,
        min_length=1,
        description="endings of module names that get an adapter; unset: the original trainer's defaults",
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

    @field_validator("type", mode="before")
    @classmethod
    def _is_a_known_type(cls, value: object) -> object:
        known = get_args(AdapterType)
        if isinstance(value, str) and value.lower() not in known:
            raise ValueError(unknown_name("kind of adapter", value, known))
        return value.lower() if isinstance(value, str) else value

    @property
    def kind(self) -> str:
        """The type, with what beside rank and alpha decides its parameters."""
        if self.type != "lokr":
            return self.type
        return f"lokr, factor {self.lokr_factor}" + (", full rank" if self.lokr_full_rank else "")

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


def _each(value: object, check: ValidatorFunctionWrapHandler) -> int | tuple[int, ...]:
    """One number, or every number of a list."""
    return tuple(check(each) for each in value) if isinstance(value, list | tuple) else check(value)


class DatasetConfig(Section):
    """One folder of pictures with captions in text files of the same stem."""

    folder_path: PathText = Field(
        description="folder of pictures; those in a subfolder named N_name, say 10_dress, count N times",
    )
    resolution: Annotated[Pixels, WrapValidator(_each)] = Field(
        512,
        description="side in pixels of a square picture, a multiple of 16; with a list, each picture is "
        "trained at each",
    )
    bucket_rule: BucketRule = Field(
        "aspect",
        description="size of other pictures: of about the same area and the nearest aspect, as ai-toolkit "
        "chooses, or square too",
    )
    bucket_step: int | None = Field(
        None, ge=16, multiple_of=16, description="bucket sides are multiples of this; none: 64, or less "
        "where the resolution is small"
    )  # fmt: skip
    caption_ext: str = Field("txt", pattern=r"^\.?\w+$", description="ending of caption files, dot optional")
    default_caption: str | None = Field(
        None, description="caption of pictures whose caption file is missing or empty; none: that is an error"
    )
    trigger_word: str | None = Field(None, description="for this folder, instead of the run's trigger_word")
    caption_dropout_rate: float = Field(0.0, ge=0, le=1, description="share of captions replaced by nothing")
    shuffle_tokens: bool = Field(False, description="shuffle the parts of a caption between commas")
    token_dropout_rate: float = Field(0.0, ge=0, le=1, description="share of these parts that is left out")
    keep_tokens: int = Field(0, ge=0, description="parts at the start that are neither left out nor shuffled")
    caption_variants: int = Field(
        8, ge=1, le=256, description="shuffled or thinned captions per picture, encoded before training"
    )
    num_repeats: int = Field(1, ge=1, description="times each picture is seen in an epoch")
    is_reg: bool = Field(
        False, description="regularisation pictures: every other batch, without the trigger word in front"
    )
    flip_x: bool = Field(False, description="add a copy of each picture with left and right exchanged")
    flip_y: bool = Field(False, description="add an upside-down copy of each picture")
    cache_to_disk: bool = Field(
        False, description="keep encoded pictures and captions of the run in cache_dir; one folder is enough"
    )
    skip_bad: bool = Field(False, description="leave out bad files, counted and listed, instead of stopping")
    control_path: PathTexts = Field(
        (),
        description="folder of references, or a list of them: pictures of the same names, which the model is "
        "shown (FLUX.1 Kontext, or FLUX.1-dev that learns to look)",
    )
    full_size_control_images: bool = Field(
        True, description="references are cut to their picture's size; false: shown whole, at their own size"
    )
    control_transparent_color: Annotated[tuple[Channel, Channel, Channel], Strict(False)] = Field(
        (0, 0, 0), description="red, green, blue below what is transparent in a reference"
    )
    mask_path: PathText | None = Field(
        None,
        description="folder of masks of the same names; white is what the loss is about, or what a Fill "
        "model paints anew",
    )
    alpha_mask: bool = Field(False, description="the opacity of a picture is its mask, instead of mask_path")
    invert_mask: bool = Field(False, description="black is what counts in masks")
    mask_min_value: float = Field(
        0.0, ge=0, lt=1, description="weight of the loss where a mask is black; 1 where it is white"
    )

    @field_validator("caption_ext")
    @classmethod
    def _without_dot(cls, value: str) -> str:
        return value.removeprefix(".")

    @field_validator("trigger_word")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        return checked_trigger_word(value)

    @model_validator(mode="after")
    def _has_sizes(self) -> DatasetConfig:
        if not self.resolutions:
            raise ValueError("resolution: came an empty list, wanted at least one number of pixels")
        if self.bucket_step and self.bucket_step > min(self.resolutions):
            raise ValueError(
                f"bucket_step {self.bucket_step} is more than resolution {min(self.resolutions)}; lower it "
                "or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _masks_have_an_effect(self) -> DatasetConfig:
        if self.mask_path and self.alpha_mask:
            raise ValueError("mask_path and alpha_mask both say where the mask is; leave one out")
        if not (self.mask_path or self.alpha_mask) and (self.invert_mask or self.mask_min_value):
            raise ValueError("invert_mask and mask_min_value have no effect without mask_path or alpha_mask")
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All of `resolution`. In the datasets of a RunConfig it is one: there, a list has become copies."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)
