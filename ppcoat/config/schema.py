"""Every setting of a training run: one frozen model per section, each field with default, limits and meaning.

Key names follow ai-toolkit's FLUX LoRA YAML without its `job`/`config`/`process` nesting; the `coat`
section follows the COAT paper's vocabulary (arXiv 2410.19313). Types are strict: `"16"` is not a number and
`true` is not 1. NaN and infinity are refused everywhere. Nothing here reads a file: see load.py.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

Fp8Format = Literal["e4m3", "e5m2"]
Granularity = Literal["per_tensor", "per_group"]
SavingPolicy = Literal["none", "coat", "coat+recompute", "coat+recompute+attention"]
# YAML gives lists and frozen models hold tuples: the one place where a value may change its type
Strings = Annotated[tuple[str, ...], Strict(False)]
BlockRange = Annotated[tuple[int, ...], Strict(False)]
LoRAFormat = Literal["diffusers", "kohya", "paddle"]
NoiseLevel = Annotated[float, Field(ge=0, le=1)]
# one latent token of FLUX covers 16 x 16 pixels (8 by the VAE, 2 by patchify)
Pixels = Annotated[int, Field(ge=16, le=8192, multiple_of=16)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
BucketRule = Literal["aspect", "ai-toolkit", "square"]


class Section(BaseModel):
    """What all sections share: frozen, unknown keys refused, no silent conversion, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The frozen base model."""

    name_or_path: str = Field(min_length=1, description="folder of a FLUX pipeline in the diffusers layout")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; auto is float32 on CPU and bfloat16 on GPU"
    )
    quantize: bool = Field(
        False, description="store the frozen Linears in FP8: half of bfloat16's memory, 2.6 % rounding"
    )
    quantized_beside_model: bool = Field(
        False, description="keep the FP8 copy for the next start in the model's folder, not in cache_dir"
    )
    blocks_to_swap: int = Field(
        0, ge=0, description="last blocks whose frozen weights stay in host memory until they compute"
    )


class NetworkConfig(Section):
    """The LoRA and where it goes."""

    type: Literal["lora"] = Field("lora", description="kind of adapter")
    linear: int = Field(16, ge=1, description="rank r of the LoRA")
    linear_alpha: float = Field(16.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability to drop an input element of the LoRA")
    targets: Strings | None = Field(
        None,
        min_length=1,
        description="endings of module names that get a LoRA; none: attention and feed-forward",
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

    @field_validator("double_blocks", "single_blocks")
    @classmethod
    def _is_a_range(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value and (len(value) != 2 or not 0 <= value[0] <= value[1]):
            raise ValueError(f"came {list(value)}, wanted [first, last] with 0 <= first <= last, or []")
        return value


def _trigger_word(value: str | None) -> str | None:
    if value is not None and (not value.strip() or value != " ".join(value.split())):
        raise ValueError("the trigger word must not be blank or have extra spaces; leave it out for none")
    if value is not None and ("[trigger]" in value or "[name]" in value):
        raise ValueError("the trigger word must not hold [trigger] or [name], which it replaces")
    return value


def _each(value: object, check: ValidatorFunctionWrapHandler) -> int | tuple[int, ...]:
    """One number, or every number of a list."""
    return tuple(check(each) for each in value) if isinstance(value, list | tuple) else check(value)


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
        return _trigger_word(value)

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


class TrainConfig(Section):
    """Steps, learning rate, optimizer, loss."""

    steps: int = Field(1000, ge=1, description="optimizer updates")
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
        None, ge=1, le=512, description="T5 tokens of a caption; none: what the tokenizer allows, at most 512"
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
        if self.lr_warmup_steps > self.steps:
            raise ValueError(f"lr_warmup_steps {self.lr_warmup_steps} is more than steps {self.steps}")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps has no effect with lr_scheduler constant; use constant_with_warmup"
            )
        return self


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
        description="what a FLUX block keeps: +recompute rebuilds linear inputs, +attention packs q, k, v",
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


class SaveConfig(Section):
    """Checkpoints and LoRA files."""

    save_every: int = Field(250, ge=1, description="updates between checkpoints, each with its LoRA file")
    max_step_saves_to_keep: int = Field(4, ge=1, description="checkpoints kept, and LoRA files of steps")
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


class RunConfig(Section):
    """A whole run. Its files go to <output_dir>/<name>."""

    name: str = Field(max_length=200, description="name of the run, its folder and its LoRA file")
    output_dir: str = Field("output", min_length=1, description="folder that holds the folder of the run")
    seed: Seed = Field(42, description="seed of initial weights, order, noise and dropout")
    device: str = Field("auto", pattern=r"^(auto|cpu|gpu|gpu:[0-9]+)$", description="auto, cpu, gpu or gpu:N")
    trigger_word: str | None = Field(
        None, description="replaces [trigger] in captions, put in front if absent"
    )
    memory: Literal["as_given", "auto"] = Field(
        "as_given",
        description="auto: policy, checkpointed and swapped blocks, base and batch are chosen to fit vram_gb",
    )
    vram_gb: float | None = Field(
        None, gt=0, description="GB (1e9 bytes) for memory: auto and plan; none: all that the device has"
    )
    model: ModelConfig = Field(description="the frozen base model")
    network: NetworkConfig = Field(NetworkConfig(), description="the LoRA")
    datasets: Annotated[tuple[DatasetConfig, ...], Strict(False)] = Field(
        min_length=1, description="the folders of pictures: a list with one entry or more"
    )
    cache_dir: str | None = Field(
        None, min_length=1, description="folder for cache_to_disk; none: <run folder>/cache"
    )
    reg_weight: float = Field(1.0, ge=0, description="weight of the loss of regularisation pictures")
    train: TrainConfig = Field(TrainConfig(), description="how to train")
    coat: CoatConfig = Field(CoatConfig(), description="FP8 optimizer states and saved activations")
    save: SaveConfig = Field(SaveConfig(), description="checkpoints")
    sample: SampleConfig = Field(SampleConfig(), description="previews")
    logging: LoggingConfig = Field(LoggingConfig(), description="progress and curves")

    @property
    def run_dir(self) -> Path:
        """Folder of everything this run writes."""
        return Path(self.output_dir) / self.name

    @property
    def data(self) -> DatasetConfig:
        """The first dataset of the run."""
        return self.datasets[0]

    @property
    def cache_folder(self) -> Path:
        """Where encoded pictures and captions lie if any dataset has cache_to_disk."""
        return Path(self.cache_dir) if self.cache_dir else self.run_dir / "cache"

    @property
    def uses_fp8_optimizer(self) -> bool:
        """Whether AdamW keeps its moments in FP8."""
        coat_asks = self.coat.enabled and self.coat.optimizer.use_fp8
        return coat_asks or self.train.optimizer == "coat_fp8_adamw"

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        # a name becomes a folder and a file: no way out of output_dir, nothing hidden, nothing unprintable
        if not value.strip() or value != value.strip() or value.startswith(".") or not value.isprintable():
            raise ValueError("the name must be printable, not empty, without outer spaces or a leading dot")
        if any(mark in value for mark in "/\\:[]"):
            raise ValueError(r"the name must not hold any of / \ : [ ]")
        return value

    @field_validator("trigger_word")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        return _trigger_word(value)

    @field_validator("datasets")
    @classmethod
    def _one_resolution_each(cls, value: tuple[DatasetConfig, ...]) -> tuple[DatasetConfig, ...]:
        if all(data.is_reg for data in value):
            raise ValueError("every folder is is_reg; wanted at least one that is not")
        return tuple(
            data.model_copy(update={"resolution": side}) for data in value for side in data.resolutions
        )

    @model_validator(mode="after")
    def _optimizer_agrees_with_coat(self) -> RunConfig:
        if self.train.optimizer == "coat_fp8_adamw" and not self.coat.optimizer.use_fp8:
            raise ValueError(
                "train.optimizer coat_fp8_adamw contradicts coat.optimizer.use_fp8: false; change one of them"
            )
        return self
