"""Every flag of a FLUX-Lightning run: one frozen model. Command line and --help are made from its fields.

The first block of fields are the flags of the published training script, with its names and meaning; where
nothing is said the defaults are its recipe. Values come as text ("1024", "1e-3") and are converted. Nothing
here reads a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ppcoat.config.base import (
    ModelText,
    PathText,
    Quantize,
    TextEncoderPlaces,
    TokenizerPlaces,
    VAEPlace,
)
from ppcoat.config.explain import came_and_wanted
from ppcoat.config.flags import TINY_FLUX
from ppcoat.config.schema import BucketRule, PolicyName, RunConfig
from ppcoat.config.training_sections import LoRAFormat
from ppcoat.errors import ConfigError, check_whole

STUDENT_STEPS = 4  # in which a student draws
WINDOW = 1024  # pictures that a rank encodes ahead where there are too many to hold them all
Rule = Literal["fixed", "published"]
# The known mistakes of the public code: each of these fields has the values of Rule.
MISTAKES = ("forward_noise", "reflow_entry", "dmd_normalizer", "last_sigma", "phase_delta",
            "head_blocks", "bad_rows", "resume_order")  # fmt: skip
# flag -> what it is good for only together with
NEEDS = {
    "dmd_weight": "use_dmd_loss",
    "dmd_normalizer": "use_dmd_loss",
    "reflow_loss_weight": "apply_reflow_loss",
    "reflow_entry": "apply_reflow_loss",
    "phase_delta": "use_distill_loss",
    "adv_lr": "adv_weight",
    "head_blocks": "adv_weight",
    "image_column": "file_list_path",
    "caption_column": "file_list_path",
    "bad_rows": "file_list_path",
    "max_bad_share": "file_list_path",
    "dataloader_num_workers": "file_list_path",
    "strict_resume": "resume_from_checkpoint",
}


def _rule(published: str) -> Any:
    """A field for one known mistake of the public code."""
    return Field("fixed", description=f"fixed, or as published: {published}")


class LightningConfig(BaseModel):
    """A whole distillation. Its files go to <output_dir>/<tracker_project_name>."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data_path: PathText = Field(description="folder of pictures with captions beside them as .txt; "
                           "with file_list_path, folder of LAION shards")  # fmt: skip
    file_list_path: PathText | None = Field(None, description="text file that names the shards, one per line")
    pretrained_teacher_model: ModelText = Field(
        TINY_FLUX,
        description="folder of a FLUX pipeline in the diffusers layout, a FLUX file, or tiny_flux",
    )  # fmt: skip
    text_encoders: TextEncoderPlaces = ()
    vae: VAEPlace = None
    tokenizers: TokenizerPlaces = ()
    output_dir: PathText = Field(
        "outputs/lora_flux_lightning", min_length=1, description="folder of the run's folder"
    )
    tracker_project_name: str = Field(
        "lora_flux_lightning", description="name of the run: of its folder, LoRA file and VisualDL curves"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "bf16",
        description="no: float32, whose products are TF32 on a GPU unless the process starts with "
        "NVIDIA_TF32_OVERRIDE=0; bf16: on a GPU; a CPU computes in float32 anyway; fp16 is refused",
    )
    fp16_opt_level: Literal["O1", "O2"] = Field(
        "O2", description="O2: frozen weights are in the mixed precision too; O1: all stays in float32"
    )
    resolution: int = Field(
        1024, ge=16, le=8192, multiple_of=16, description="side of the pictures in pixels"
    )
    lora_rank: int = Field(32, ge=1, description="rank of the LoRA")
    learning_rate: float = Field(5e-6, gt=0, le=1, description="learning rate of the LoRA")
    loss_type: Literal["huber", "l2"] = Field("huber", description="distance of the consistency loss")
    adam_weight_decay: float = Field(1e-3, ge=0, le=1, description="decoupled weight decay, of heads too")
    max_train_steps: int = Field(
        28652, ge=1, description="steps; with adv_weight, half of them train the heads"
    )
    dataloader_num_workers: int = Field(
        0, ge=0, le=256, description="threads that unpack LAION shards; 0: one"
    )
    guidance_scale: float = Field(3.5, ge=0, description="guidance of teacher, student and previews")
    validation_steps: int = Field(
        20000, ge=0, description="steps between previews, drawn in multiphase steps; 0: none"
    )
    checkpointing_steps: int = Field(
        1000, ge=1, description="steps between checkpoints, each with a LoRA file"
    )
    checkpoints_total_limit: int = Field(
        30, ge=1, description="checkpoints kept; removed after the next is safe"
    )
    train_batch_size: int = Field(1, ge=1, description="pictures in one forward pass of one rank")
    gradient_accumulation_steps: int = Field(1, ge=1, description="forward passes in one step")
    resume_from_checkpoint: str | None = Field(
        None, description="latest: go on from the run's last checkpoint"
    )
    seed: int = Field(453645634, ge=0, lt=2**32, description="of initial weights, order, noise and levels")
    num_euler_timesteps: int = Field(100, ge=1, le=1000, description="Euler steps of the teacher")
    multiphase: int = Field(STUDENT_STEPS, ge=1, description="phases, each one step of the student")
    gradient_checkpointing: bool = Field(
        False, description="recompute blocks in backward: less memory, slower"
    )
    adv_weight: float = Field(0.1, ge=0, description="weight of the adversarial loss; 0: no discriminator")
    adv_lr: float = Field(1e-5, gt=0, le=1, description="learning rate of the discriminator's heads")
    pre_alloc_memory: int = Field(0, ge=0, description="GB of the GPU's memory to take at the start; 0: none")
    use_dmd_loss: bool = Field(False, description="add distribution matching")
    dmd_weight: float = Field(0.01, gt=0, description="weight of distribution matching")
    apply_reflow_loss: bool = Field(False, description="add the reflow loss")
    reflow_loss_weight: float = Field(0.01, gt=0, description="weight of the reflow loss")

    # below: what the published command leaves out
    device: str = Field("auto", pattern=r"^(auto|cpu|gpu|gpu:[0-9]+)$", description="auto, cpu, gpu or gpu:N")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; none: the rank (published: 8)")
    huber_c: float = Field(1e-3, gt=0, description="width of the pseudo-Huber loss around 0")
    use_distill_loss: bool = Field(
        False, description="the teacher walks to the end of the phase: a sharper target, many more passes"
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="course of learning_rate over the LoRA's steps; heads keep theirs"
    )
    lr_warmup_steps: int = Field(0, ge=0, description="LoRA's steps in which the rate rises from 0")
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="decay of the LoRA's first moment; heads have none"
    )
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moments")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="added to the root of the second moment")
    max_grad_norm: float = Field(
        1.0, ge=0, description="clip the norm of the LoRA's and of the heads' gradient"
    )
    bucket_rule: BucketRule = Field("square", description="size of pictures that are not square")
    deterministic: bool = Field(
        False,
        description="on a GPU: kernels that give the same bits each time, so that a resumed run equals an "
        "uninterrupted one; slower, by how much was not measured. A CPU always does",
    )
    max_sequence_length: int | None = Field(
        None, ge=1, le=512, description="T5 tokens; none: what the tokenizer allows, at most 512"
    )
    cache_to_disk: bool = Field(False, description="keep encoded pictures and captions in <run folder>/cache")
    encode_ahead: int | None = Field(
        None,
        ge=1,
        description="pictures that each rank encodes ahead and holds in host memory; none: all of the run "
        f"where they take up to 16 GB on all ranks together, else {WINDOW}",
    )
    strict_resume: bool = Field(
        False, description="stop where that checkpoint is damaged, instead of going on from the one before it"
    )
    rank_timeout: float = Field(
        600.0, ge=1, le=7 * 86400,
        description="seconds that ranks wait for one that shows no sign of work; then all end, and say which",
    )  # fmt: skip
    validation_prompt: tuple[str, ...] = Field(("a beautiful girl",), description="previews, one for each")
    log_every: int = Field(10, ge=1, description="steps between points in the curves")
    visualdl: bool = Field(True, description="write VisualDL curves")
    save_format: tuple[LoRAFormat, ...] = Field(
        ("diffusers",), min_length=1, description="LoRA files written"
    )
    fp8_optimizer: bool = Field(
        True, description="moments in FP8 (COAT); the heads' first moment is never kept"
    )
    quantize: Quantize = False
    blocks_to_swap: int = Field(0, ge=0, description="last blocks whose frozen weights wait in host memory")
    saving_policy: PolicyName = Field("coat", description="saving policy: what FLUX blocks save for backward")
    image_column: int | None = Field(None, ge=0, description="column of the picture in a shard; none: probed")
    caption_column: int | None = Field(None, ge=0, description="column of the caption; none: probed")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of unusable rows that stops the run")

    compat: Literal["none", "reference"] = Field(
        "none", description="reference: each of the following that is not given is published"
    )
    forward_noise: Rule = _rule("samples noised for the other losses get too little noise")
    reflow_entry: Rule = _rule("the reflow loss enters one Euler step off")
    dmd_normalizer: Rule = _rule("distribution matching is scaled by a velocity, and lacks sigma")
    last_sigma: Rule = _rule("the last phase ends at the smallest raw level, not at 0")
    phase_delta: Rule = _rule("use_distill_loss counts steps by the first picture of the batch")
    head_blocks: Rule = _rule("heads on every other block only")
    bad_rows: Rule = _rule(
        "the first unusable row is the end (there, an endless loop); no row is ever run as code"
    )
    resume_order: Rule = _rule("a resumed run begins with the first pictures again")

    @model_validator(mode="before")
    @classmethod
    def _take_mistakes_of_reference(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("compat") == "reference":
            return {name: "published" for name in MISTAKES} | given
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> LightningConfig:
        check_whole("validation_prompt", *self.validation_prompt)
        by_hand = self.model_fields_set - (set(MISTAKES) if self.compat == "reference" else set())
        for name, wanted in NEEDS.items():
            if name in by_hand and not getattr(self, wanted):
                wanted += " above 0" * (wanted == "adv_weight")
                raise ValueError(f"{name} has no effect without {wanted}; leave it out or give {wanted}")
        if "huber_c" in by_hand and self.loss_type == "l2" and not self.apply_reflow_loss:
            raise ValueError("huber_c has no effect with loss_type l2; leave it out or use huber")
        if self.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16: FLUX's activations overflow float16; use bf16 or no")
        in_step = self.train_batch_size * self.gradient_accumulation_steps
        if self.encode_ahead is not None and self.encode_ahead < in_step:
            raise ValueError(
                f"encode_ahead: came {self.encode_ahead}, wanted at least the {in_step} pictures that a rank "
                "sees in one step (train_batch_size x gradient_accumulation_steps)"
            )
        if 1000 % self.num_euler_timesteps:
            raise ValueError(
                f"num_euler_timesteps: came {self.num_euler_timesteps}, wanted a divisor of 1000"
            )
        if self.multiphase > self.num_euler_timesteps:
            raise ValueError(
                f"multiphase {self.multiphase} is more than num_euler_timesteps {self.num_euler_timesteps}"
            )
        if self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"resume_from_checkpoint: came {self.resume_from_checkpoint!r}, wanted latest; to go "
                "back, write the name of the step's folder into checkpoints/latest of the run"
            )
        return self

    @property
    def generator_steps(self) -> int:
        """Steps that train the LoRA: all, or every second, beginning with the second."""
        return self.max_train_steps // 2 if self.adv_weight > 0 else self.max_train_steps

    def run_config(self, data_folder: str | Path) -> RunConfig:
        """The same run in the LoRA trainer's terms, with pictures in `data_folder`. Raises ConfigError."""
        try:
            return RunConfig.model_validate(self._sections(data_folder))
        except ValidationError as error:
            raise ConfigError(_line(error)) from None

    def _sections(self, data_folder: str | Path) -> dict[str, Any]:
        exact = self.mixed_precision == "no" or self.fp16_opt_level == "O1"
        previews = self.validation_steps if self.validation_prompt else 0
        return {
            "name": self.tracker_project_name,
            "output_dir": self.output_dir,
            "seed": self.seed,
            "device": self.device,
            "model": {
                "name_or_path": self.pretrained_teacher_model,
                "text_encoders": self.text_encoders,
                "vae": self.vae,
                "tokenizers": self.tokenizers,
                "dtype": "float32" if exact else "auto",
                "quantize": self.quantize,
                "blocks_to_swap": self.blocks_to_swap,
            },
            "network": {"linear": self.lora_rank, "linear_alpha": float(self.lora_alpha or self.lora_rank)},
            "datasets": [
                {
                    "folder_path": str(data_folder),
                    "resolution": self.resolution,
                    "bucket_rule": self.bucket_rule,
                    "cache_to_disk": self.cache_to_disk,
                }
            ],
            "train": self._train_section(),
            "coat": {
                "enabled": self.fp8_optimizer or self.saving_policy != "none",
                "optimizer": {"use_fp8": self.fp8_optimizer},
                "activation": {"policy": self.saving_policy},
            },
            "save": {
                "save_every": self.checkpointing_steps,
                "max_step_saves_to_keep": self.checkpoints_total_limit,
                "format": self.save_format,
                "strict_resume": self.strict_resume,
            },
            "sample": {
                "sample_every": previews,
                "prompts": self.validation_prompt,
                "width": self.resolution,
                "height": self.resolution,
                "guidance_scale": self.guidance_scale,
                "sample_steps": self.multiphase,
                "seed": self.seed,
            },
            "logging": {"log_every": self.log_every, "visualdl": self.visualdl},
        }

    def _train_section(self) -> dict[str, Any]:
        return {
            "steps": self.max_train_steps,
            "batch_size": self.train_batch_size,
            "gradient_accumulation": self.gradient_accumulation_steps,
            "lr": self.learning_rate,
            "lr_scheduler": self.lr_scheduler,
            "lr_warmup_steps": self.lr_warmup_steps,
            "weight_decay": self.adam_weight_decay,
            "beta1": self.adam_beta1,
            "beta2": self.adam_beta2,
            "epsilon": self.adam_epsilon,
            "max_grad_norm": self.max_grad_norm,
            "cfg_scale": self.guidance_scale,
            "gradient_checkpointing": self.gradient_checkpointing,
            "deterministic": self.deterministic,
            "max_sequence_length": self.max_sequence_length,
            "rank_timeout": self.rank_timeout,
        }


def lightning_config(given: dict[str, Any]) -> LightningConfig:
    """Flags by name, as text or as values -> a checked config. Raises ConfigError, one line for the first
    problem: flag, what came, what was wanted."""
    try:
        return LightningConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_line(error)) from None


def _line(error: ValidationError) -> str:
    first, more = error.errors(include_url=False)[0], error.error_count() - 1
    if first["type"] == "value_error":
        line = str(first["ctx"]["error"])
    else:
        name = str(first["loc"][0])
        what = LightningConfig.model_fields.get(name)
        line = f"{name}: {came_and_wanted(first)}" + (f" ({what.description})" if what else "")
    return line + (f" (and {more} more)" if more else "")
