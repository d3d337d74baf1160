"""The section `train`: steps, learning rate, optimizer, loss, and what is measured meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from ppcoat.config.section import Pixels, Section

NoiseLevel = Annotated[float, Field(ge=0, le=1)]


class EMAConfig(Section):
    """A running mean of the LoRA's weights, which is what previews show and the LoRA file holds."""

    use_ema: bool = Field(False, description="keep the mean, in float32, and use it instead of the weights")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="share of the old mean in each update of it")


class ValidationItem(Section):
    """One picture of a validation set that is given picture by picture."""

    image_path: str = Field(min_length=1, description="a picture")
    prompt: str = Field("", description="its caption; [trigger] is replaced")


class ValidationConfig(Section):
    """A loss that can be compared from step to step: fixed pictures, noise and noise levels."""

    folder_path: str | None = Field(
        None, min_length=1, description="folder of pictures with captions; none, and no items: no validation"
    )
    items: Annotated[tuple[ValidationItem, ...], Strict(False)] = Field(
        (), description="pictures and captions one by one, instead of or beside a folder"
    )
    resolution: Pixels = Field(512, description="side of the square pictures in pixels, a multiple of 16")
    every: int = Field(100, ge=1, description="updates between two validations; the last step is one too")
    sigmas: Annotated[tuple[NoiseLevel, ...], Strict(False)] = Field(
        (1.0, 0.75, 0.5, 0.25), min_length=1, description="noise levels, each with a curve of its own"
    )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to validate on."""
        return self.folder_path is not None or bool(self.items)


class TrainConfig(Section):
    """Steps, learning rate, optimizer, loss."""

    steps: int = Field(1000, ge=1, description="optimizer updates")
    num_epochs: int | None = Field(
        None, ge=1, description="instead of steps: how often all pictures are seen, repeats counted"
    )
    batch_size: int = Field(1, ge=1, description="pictures in one forward pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes in one optimizer update")
    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "step"
    ] = Field("constant", description="course of the learning rate")
    lr_warmup_steps: int = Field(0, ge=0, description="updates in which the learning rate rises from 0")
    lr_num_cycles: int = Field(1, ge=1, description="falls to 0 of cosine_with_restarts")
    lr_power: float = Field(1.0, gt=0, description="exponent of polynomial; 1 is linear")
    lr_step_size: int | None = Field(None, ge=1, description="updates between two drops of step")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor of one drop of step")
    optimizer: Literal["adamw", "coat_fp8_adamw"] = Field(
        "adamw", description="adamw keeps FP8 states where coat.enabled; coat_fp8_adamw keeps them always"
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    epsilon: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0 is off")
    timestep_type: Literal["sigmoid", "linear", "shift", "weighted"] = Field(
        "sigmoid",
        description="how t is drawn: sigmoid of a normal, uniform, shifted by the picture size, or uniform "
        "with a loss that is weighted by t",
    )
    cfg_scale: float = Field(1.0, ge=0, description="value given to the guidance embedding while training")
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in backward: less memory, slower"
    )
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="tokens of a caption (flux: of T5, at most 512; newbie: of Gemma); none: 512, or what "
        "the tokenizer allows",
    )
    loss_type: Literal["mse", "mae", "pseudo_huber"] = Field(
        "mse", description="distance between predicted and true velocity: square, absolute, or in between"
    )
    max_skipped_in_a_row: int = Field(
        5, ge=1, description="steps skipped one after the other for a loss that is not finite: too many"
    )
    ema: EMAConfig = Field(EMAConfig(), description="running mean of the LoRA's weights")
    validation: ValidationConfig = Field(ValidationConfig(), description="loss on pictures kept aside")

    @model_validator(mode="after")
    def _schedule_has_what_it_needs(self) -> TrainConfig:
        for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial"),
                                ("lr_step_size", "step"), ("lr_gamma", "step")):  # fmt: skip
            default = type(self).model_fields[name].default
            if getattr(self, name) != default and self.lr_scheduler != scheduler:
                raise ValueError(f"{name} has no effect with lr_scheduler {self.lr_scheduler}; leave it out "
                                 f"or use {scheduler}")  # fmt: skip
        if self.lr_scheduler == "step" and self.lr_step_size is None:
            raise ValueError("lr_scheduler step needs lr_step_size: the updates between two drops")
        return self

    @model_validator(mode="after")
    def _warmup_has_an_effect(self) -> TrainConfig:
        if self.num_epochs is None and self.lr_warmup_steps > self.steps:
            raise ValueError(f"lr_warmup_steps {self.lr_warmup_steps} is more than steps {self.steps}")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps has no effect with lr_scheduler constant; use constant_with_warmup"
            )
        return self
