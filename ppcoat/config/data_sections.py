"""The sections of `datasets`: folders of pictures with captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, field_validator, model_validator

from ppcoat.config.section import Pixels, Section, checked_trigger_word

BucketRule = Literal["aspect", "ai-toolkit", "square"]


def _each(value: object, check: ValidatorFunctionWrapHandler) -> int | tuple[int, ...]:
    """One number, or every number of a list."""
    return tuple(check(each) for each in value) if isinstance(value, list | tuple) else check(value)


class DatasetConfig(Section):
    """One folder of pictures with captions in text files of the same stem."""

    folder_path: str = Field(
        min_length=1,
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

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All of `resolution`. In the datasets of a RunConfig it is one: there, a list has become copies."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution,)
