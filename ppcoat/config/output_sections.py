"""The sections `save`, `sample` and `logging`: what a run leaves behind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator

from ppcoat.config.section import Pixels, Section, Seed, Strings

LoRAFormat = Literal["diffusers", "kohya", "paddle"]


class SaveConfig(Section):
    """Checkpoints and LoRA files."""

    save_every: int = Field(250, ge=1, description="updates between checkpoints, each with its LoRA file")
    save_every_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs between checkpoints, beside save_every; needs train.num_epochs",
    )
    max_step_saves_to_keep: int = Field(4, ge=1, description="checkpoints kept, and LoRA files of steps")
    strict_resume: bool = Field(
        False,
        description="stop where the latest checkpoint is damaged, instead of going on from the one before it",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype in the LoRA file")
    format: Annotated[tuple[LoRAFormat, ...], Strict(False)] = Field(
        ("diffusers",), min_length=1, description="key names of the LoRA file; one file for each listed"
    )

    @field_validator("format")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))


class PreviewConfig(Section):
    """One preview; what it leaves out is as in the section `sample`."""

    prompt: str = Field(description="what to draw; [trigger] is replaced")
    width: Pixels | None = Field(None, description="width in pixels, a multiple of 16")
    height: Pixels | None = Field(None, description="height in pixels, a multiple of 16")
    seed: Seed | None = Field(None, description="seed of this picture")
    guidance_scale: float | None = Field(None, ge=0, description="guidance of this picture")
    sample_steps: int | None = Field(None, ge=1, le=1000, description="denoising steps of this picture")


class SampleConfig(Section):
    """Preview pictures drawn while training."""

    sample_every: int = Field(250, ge=0, description="updates between previews; 0 is never")
    prompts: Strings = Field((), description="one picture each; [trigger] is replaced")
    samples: Annotated[tuple[PreviewConfig, ...], Strict(False)] = Field(
        (), description="pictures with a size, seed, guidance or steps of their own, after those of prompts"
    )
    skip_first_sample: bool = Field(True, description="draw no previews before the first step")
    force_first_sample: bool = Field(False, description="draw them before a resumed run goes on, too")
    width: Pixels = Field(512, description="width in pixels, a multiple of 16")
    height: Pixels = Field(512, description="height in pixels, a multiple of 16")
    seed: Seed = Field(42, description="seed of the first picture")
    walk_seed: bool = Field(False, description="picture i uses seed + i instead of the same seed")
    guidance_scale: float = Field(3.5, ge=0, description="guidance of the previews")
    sample_steps: int = Field(28, ge=1, le=1000, description="denoising steps")

    @property
    def wanted(self) -> bool:
        """Whether a run draws any."""
        return self.sample_every > 0 and bool(self.prompts or self.samples)


class LoggingConfig(Section):
    """Progress and curves."""

    log_every: int = Field(
        10, ge=1, description="updates between points in the curves and on the progress bar"
    )
    visualdl: bool = Field(True, description="write VisualDL curves and pictures to <run folder>/logs")
