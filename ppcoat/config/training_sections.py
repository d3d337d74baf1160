"""The sections of a run's settings that say how it trains and what it leaves behind: `train` (steps, learning
rate, optimizer, loss, and what is measured meanwhile), `coat` (FP8 optimizer states and FP8 saved
activations, COAT, arXiv 2410.19313), `save`, `sample` and `logging`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Strict, field_validator, model_validator

from ppcoat.config.base import PathText, PathTexts, Pixels, Section, Seed, Strings
from ppcoat.errors import unknown_name

NoiseLevel = Annotated[float, Field(ge=0, le=1)]
Fp8Format = Literal["e4m3", "e5m2"]
Granularity = Literal["per_tensor", "per_group"]
PolicyName = Literal["none", "coat", "coat+recompute", "coat+recompute+attention"]
LoRAFormat = Literal["diffusers", "kohya", "paddle"]


class EMAConfig(Section):
    """A running mean of the LoRA's weights, which is what previews show and the LoRA file holds."""

    use_ema: bool = Field(False, description="keep the mean, in float32, and use it instead of the weights")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="share of the old mean in each update of it")


class ValidationItem(Section):
    """One picture of a validation set that is given picture by picture."""

    image_path: PathText = Field(description="a picture")
    prompt: str = Field("", description="its caption; [trigger] is replaced")


class ValidationConfig(Section):
    """A loss that can be compared from step to step: fixed pictures, noise and noise levels."""

    folder_path: PathText | None = Field(
        None, description="folder of pictures with captions; none, and no items: no validation"
    )
    items: Annotated[tuple[ValidationItem, ...], Strict(False)] = Field(
        (), description="pictures and captions one by one, instead of or beside a folder"
    )
    control_path: PathTexts = Field((), description="references of that folder's pictures, as of datasets")
    resolution: Pixels = Field(512, description="side of the square pictures in pixels, a multiple of 16")
    every: int = Field(100, ge=1, description="updates between two validations; the last step is one too")
    sigmas: Annotated[tuple[NoiseLevel, ...], Strict(False)] = Field(
        (1.0, 0.75, 0.5, 0.25), min_length=1, description="noise levels, each with a curve of its own"
    )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to validate on."""
        return self.folder_path is not None or bool(self.items)


class ProdigyConfig(Section):
    """What only train.optimizer: prodigy reads; the names are those of prodigyopt."""

    d0: float = Field(1e-6, gt=0, le=1, description="first estimate of the learning rate")
    d_coef: float = Field(1.0, gt=0, description="factor of all estimates")
    growth_rate: float | None = Field(None, gt=1, description="most that the rate grows in a step; none: any")
    beta3: float | None = Field(None, ge=0, lt=1, description="decay of the estimate; none: sqrt(beta2)")
    use_bias_correction: bool = Field(False, description="correct the bias of the moments, as Adam does")
    safeguard_warmup: bool = Field(False, description="for learning rates that begin at 0")
    slice_p: int = Field(
        1, ge=1, description="estimate from every slice_p-th value only: 11 saves most of its memory"
    )


class ScheduleFreeConfig(Section):
    """What only train.optimizer: schedulefree_adamw reads; the names are those of schedulefree."""

    r: float = Field(0.0, ge=0, description="weight of a step in the average: its number to this power, ...")
    weight_lr_power: float = Field(2.0, ge=0, description="... times the largest rate so far to this power")


class AdafactorConfig(Section):
    """What only train.optimizer: adafactor reads; the names are those of transformers."""

    beta1: float = Field(0.0, ge=0, lt=1, description="decay of a momentum; 0: none")
    eps1: float = Field(1e-30, ge=0, description="added to squares")
    eps2: float = Field(1e-3, gt=0, description="least size of a parameter for scale_parameter")
    clip_threshold: float = Field(1.0, gt=0, description="largest root mean square of an update")
    decay_rate: float = Field(-0.8, lt=0, description="beta2 is 1 - step^decay_rate")
    scale_parameter: bool = Field(False, description="multiply the rate by the size of a parameter")
    relative_step: bool = Field(
        False, description="the rate is min(1e-2, 1 / sqrt(step)), whatever train.lr says"
    )
    warmup_init: bool = Field(False, description="with relative_step: 1e-6 x step in the place of 1e-2")

    @model_validator(mode="after")
    def _warmup_is_of_the_relative_step(self) -> AdafactorConfig:
        if self.warmup_init and not self.relative_step:
            raise ValueError("warmup_init has no effect without relative_step: true")
        return self


# What an optimizer's authors recommend where that is not the default of the section `train`.
_OWN_DEFAULTS = {
    "prodigy": {"lr": 1.0, "weight_decay": 0.0},
    "schedulefree_adamw": {"weight_decay": 0.0},
    "lion": {"beta2": 0.99, "weight_decay": 0.0},
    "adafactor": {"weight_decay": 0.0},
}
# Settings that some optimizers do not read; epsilon may stand, for ai-toolkit writes it for all.
_UNREAD = {"adafactor": ("beta1", "beta2")}
_OF_ONE = {"prodigy": "prodigy", "schedulefree": "schedulefree_adamw", "adafactor": "adafactor"}


class TrainConfig(Section):
    """Steps, learning rate, optimizer, loss."""

    steps: int = Field(1000, ge=1, description="optimizer updates")
    num_epochs: int | None = Field(
        None, ge=1, description="instead of steps: how often all pictures are seen, repeats counted"
    )
    batch_size: int = Field(1, ge=1, description="pictures in one forward pass")
    gradient_accumulation: int = Field(1, ge=1, le=10_000, description="forward passes of an update")
    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "step"
    ] = Field("constant", description="course of the learning rate")
    lr_warmup_steps: int = Field(0, ge=0, description="updates in which the learning rate rises from 0")
    lr_num_cycles: int = Field(1, ge=1, description="cosine_with_restarts: how often the rate falls to 0")
    lr_power: float = Field(1.0, gt=0, description="polynomial: its exponent; 1 is linear")
    lr_step_size: int | None = Field(None, ge=1, description="step: updates between two drops")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="step: factor of each drop")
    optimizer: Literal["adamw", "coat_fp8_adamw", "prodigy", "schedulefree_adamw", "lion", "adafactor"] = (
        Field("adamw", description="each with FP8 states where coat.enabled; coat_fp8_adamw (AdamW): always")
    )
    fp8_states: bool = Field(False, description="FP8 optimizer states without coat.enabled, too")
    weight_decay: float = Field(
        0.01, ge=0, le=1, description="decoupled weight decay; where none is given, 0 for all but AdamW"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="decay of the second moment; where none is given, 0.99 for lion"
    )
    epsilon: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
    prodigy: ProdigyConfig = Field(ProdigyConfig(), description="settings of prodigy alone")
    schedulefree: ScheduleFreeConfig = Field(
        ScheduleFreeConfig(), description="settings of schedulefree_adamw alone"
    )
    adafactor: AdafactorConfig = Field(AdafactorConfig(), description="settings of adafactor alone")
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
    deterministic: bool = Field(
        False,
        description="on a GPU: kernels that give the same bits each time, so that a resumed run equals an "
        "uninterrupted one; slower, by how much was not measured. A CPU always does",
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
    diff_output_preservation: bool = Field(
        False,
        description="keep what the model draws without the trigger word: it also learns to predict for each "
        "caption with the class word what it predicts without the adapter; two more forward passes, one more "
        "backward pass",
    )
    diff_output_preservation_class: str = Field(
        "", description="what stands in the place of the trigger word, such as person; empty: nothing"
    )
    diff_output_preservation_multiplier: float = Field(1.0, gt=0, description="weight of that loss")
    blank_prompt_preservation: bool = Field(
        False, description="the same with the empty caption in the place of the class word's"
    )
    blank_prompt_preservation_multiplier: float = Field(1.0, gt=0, description="weight of that loss")
    max_skipped_in_a_row: int = Field(
        5, ge=1, description="stop after this many consecutive steps whose loss or gradient is not finite"
    )
    rank_timeout: float = Field(
        600, ge=1, le=604_800, description="seconds that ranks wait for one that shows no sign of work"
    )
    ema: EMAConfig = Field(EMAConfig(), description="running mean of the LoRA's weights")
    validation: ValidationConfig = Field(ValidationConfig(), description="loss on pictures kept aside")

    @property
    def preservation_weight(self) -> float:
        """Weight of the loss that keeps the model's own output; 0 without."""
        if self.diff_output_preservation:
            return self.diff_output_preservation_multiplier
        return self.blank_prompt_preservation_multiplier if self.blank_prompt_preservation else 0.0

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_optimizer(cls, values: Any) -> Any:
        own = _OWN_DEFAULTS.get(str(values.get("optimizer")), {}) if isinstance(values, dict) else {}
        return own | values if own else values

    @model_validator(mode="after")
    def _optimizer_reads_what_is_set(self) -> TrainConfig:
        name, fields = self.optimizer, type(self).model_fields
        set_here = {key for key in fields if getattr(self, key) != fields[key].default}
        for key in _UNREAD.get(name, ()):
            if key in set_here:
                instead = "; adafactor.beta1 is its momentum" if key == "beta1" else ""
                raise ValueError(f"{key} has no effect with optimizer {name}; leave it out{instead}")
        for section, owner in _OF_ONE.items():
            if name != owner and section in set_here:
                raise ValueError(
                    f"{section} has no effect with optimizer {name}; leave it out or use optimizer: {owner}"
                )
        if name == "schedulefree_adamw" and self.ema.use_ema:
            raise ValueError(f"ema.use_ema: optimizer {name} writes an average by itself; leave it out")
        if name == "schedulefree_adamw" and self.beta1 == 0:
            raise ValueError(f"beta1 must be above 0 with optimizer {name}; 0.9 is usual")
        return self

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
        False,
        description="for bfloat16 parameters in a loop of one's own: rounded at random instead of having "
        "a float32 copy; not in a run",
    )


class CoatActivationConfig(Section):
    """FP8 activations saved for backward (COAT, section 5)."""

    use_fp8: bool = Field(True, description="save activations for backward in FP8")
    policy: PolicyName = Field(
        "coat",
        description="saving policy; +recompute computes inputs of Linears again, +attention packs q, k, v",
    )
    linear_granularity: Granularity = Field("per_tensor", description="scales of inputs of linear layers")
    nonlinear_granularity: Granularity = Field(
        "per_group", description="scales of everything else that is saved"
    )
    group_size: int = Field(128, ge=1, description="values that share one scale where per_group")

    @field_validator("policy", mode="before")
    @classmethod
    def _is_a_known_policy(cls, value: object) -> object:
        known = get_args(PolicyName)
        if isinstance(value, str) and value not in known:
            raise ValueError(unknown_name("saving policy", value, known))
        return value


class CoatMemoryConfig(Section):
    """What is done and said about memory."""

    enable_efficient_checkpoint: bool = Field(
        True,
        description="with train.gradient_checkpointing, save the inputs of checkpointed blocks in FP8, too",
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
    save_every_epochs: int | None = Field(
        None, ge=1, description="epochs between checkpoints, beside save_every; needs train.num_epochs"
    )
    max_step_saves_to_keep: int = Field(4, ge=1, description="checkpoints kept, and LoRA files of steps")
    strict_resume: bool = Field(
        False,
        description="stop where the latest checkpoint is damaged, instead of going on from the one before it",
    )
    restart_data: bool = Field(
        False, description="where pictures, their sizes or the batch changed, go on with a new order of them"
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
    ctrl_img: PathTexts = Field((), description="references that it is drawn after: a picture, or several")
    mask_img: PathText | None = Field(
        None, description="of a Fill model: mask of what is painted anew in the picture ctrl_img"
    )


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

    @property
    def previews(self) -> list[PreviewConfig]:
        """prompts, then samples, each with every setting filled in from this section."""
        entries = [*(PreviewConfig(prompt=prompt) for prompt in self.prompts), *self.samples]
        shared = {name: getattr(self, name) for name in ("width", "height", "guidance_scale", "sample_steps")}
        filled = []
        for number, entry in enumerate(entries):
            seed = self.seed + (number if self.walk_seed else 0)
            filled.append(PreviewConfig(**(shared | {"seed": seed} | entry.model_dump(exclude_none=True))))
        return filled


class LoggingConfig(Section):
    """Progress and curves."""

    log_every: int = Field(
        10, ge=1, description="updates between points in the curves and on the progress bar"
    )
    visualdl: bool = Field(True, description="write VisualDL curves and pictures to <run folder>/logs")
