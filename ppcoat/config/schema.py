"""Every setting of a training run: one frozen model per section, each field with default, limits and meaning.

Key names follow ai-toolkit's FLUX LoRA YAML without its `job`/`config`/`process` nesting; the `coat`
section follows the COAT paper's vocabulary (arXiv 2410.19313). Types are strict: `"16"` is not a number and
`true` is not 1. NaN and infinity are refused everywhere. Nothing here reads a file: see load.py. The sections
stand in input_sections.py and training_sections.py and are re-exported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from ppcoat.config.base import PathText, Section, Seed, checked_trigger_word
from ppcoat.config.input_sections import BucketRule, DatasetConfig, ModelConfig, NetworkConfig
from ppcoat.config.training_sections import (
    CoatActivationConfig,
    CoatConfig,
    CoatMemoryConfig,
    CoatOptimizerConfig,
    EMAConfig,
    LoggingConfig,
    PolicyName,
    PreviewConfig,
    SampleConfig,
    SaveConfig,
    TrainConfig,
    ValidationConfig,
    ValidationItem,
)

__all__ = [
    "BucketRule",
    "CoatActivationConfig",
    "CoatConfig",
    "CoatMemoryConfig",
    "CoatOptimizerConfig",
    "DatasetConfig",
    "EMAConfig",
    "LoggingConfig",
    "ModelConfig",
    "NetworkConfig",
    "PreviewConfig",
    "RunConfig",
    "SampleConfig",
    "SaveConfig",
    "PolicyName",
    "Section",
    "TrainConfig",
    "ValidationConfig",
    "ValidationItem",
]


MOST_NAME_BYTES = 160  # file systems take 255: the rest is for the step, the ending, and the draft's name


class RunConfig(Section):
    """A whole run. Its files go to <output_dir>/<name>."""

    name: str = Field(description="name of the run, its folder and its LoRA file")
    output_dir: PathText = Field("output", description="folder that holds the folder of the run")
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
        None,
        gt=0,
        description="GB (1e9 bytes) for memory: auto; none: what is free on the device at the start",
    )
    model: ModelConfig = Field(description="the frozen base model")
    network: NetworkConfig = Field(NetworkConfig(), description="the LoRA")
    datasets: Annotated[tuple[DatasetConfig, ...], Strict(False)] = Field(
        min_length=1, description="the folders of pictures: a list with one entry or more"
    )
    cache_dir: PathText | None = Field(None, description="folder for cache_to_disk; none: <run folder>/cache")
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
        """Whether the optimizer keeps its states in FP8."""
        coat_asks = self.coat.enabled and self.coat.optimizer.use_fp8
        return coat_asks or self.train.fp8_states or self.train.optimizer == "coat_fp8_adamw"

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, value: str) -> str:
        # a name becomes a folder and a file: no way out of output_dir, nothing hidden, nothing unprintable
        if not value.strip() or value != value.strip() or value.startswith(".") or not value.isprintable():
            raise ValueError("the name must be printable, not empty, without outer spaces or a leading dot")
        if any(mark in value for mark in "/\\:[]"):
            raise ValueError(r"the name must not hold any of / \ : [ ]")
        if len(value.encode()) > MOST_NAME_BYTES:
            raise ValueError(
                f"the name has {len(value.encode())} bytes as UTF-8, wanted at most {MOST_NAME_BYTES}"
            )
        return value

    @field_validator("trigger_word")
    @classmethod
    def _is_a_word(cls, value: str | None) -> str | None:
        return checked_trigger_word(value)

    @field_validator("datasets")
    @classmethod
    def _one_resolution_each(cls, value: tuple[DatasetConfig, ...]) -> tuple[DatasetConfig, ...]:
        if all(data.is_reg for data in value):
            raise ValueError("every folder is is_reg; wanted at least one that is not")
        return tuple(
            data.model_copy(update={"resolution": side}) for data in value for side in data.resolutions
        )

    @model_validator(mode="after")
    def _rounding_has_an_effect(self) -> RunConfig:
        if self.coat.optimizer.stochastic_rounding:
            raise ValueError(
                "coat.optimizer.stochastic_rounding: true is for bfloat16 parameters, but adapters are "
                "float32: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _optimizer_agrees_with_coat(self) -> RunConfig:
        fp8_by_name = self.train.optimizer == "coat_fp8_adamw"
        if (fp8_by_name or self.train.fp8_states) and not self.coat.optimizer.use_fp8:
            asked = "optimizer coat_fp8_adamw" if fp8_by_name else "fp8_states: true"
            raise ValueError(f"train.{asked} contradicts coat.optimizer.use_fp8: false; change one of them")
        return self

    @model_validator(mode="after")
    def _preserves_something(self) -> RunConfig:
        train = self.train
        if train.diff_output_preservation and train.blank_prompt_preservation:
            raise ValueError(
                "train.diff_output_preservation and train.blank_prompt_preservation exclude each other: "
                "set one"
            )
        triggers = [data.trigger_word or self.trigger_word for data in self.datasets if not data.is_reg]
        if train.diff_output_preservation and not all(triggers):
            raise ValueError(
                "train.diff_output_preservation puts the class word in the place of the trigger word: set "
                "trigger_word, or train.blank_prompt_preservation instead"
            )
        of_class = train.diff_output_preservation_class.split()
        if train.diff_output_preservation and not set(triggers).isdisjoint(of_class):
            raise ValueError(
                "train.diff_output_preservation_class holds the trigger word, whose pictures it must not "
                "preserve: give the word of what is trained, such as person"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_of_this_model(self) -> RunConfig:
        tokens, limit = self.train.max_sequence_length, 512
        if self.model.family == "newbie":
            if self.network.type == "dora":
                raise ValueError("network.type dora is for model.family flux only; use lora or lokr")
            if any(data.control_path or data.mask_path or data.alpha_mask for data in self.datasets):
                raise ValueError("datasets[]: references and masks are for model.family flux only")
            if self.train.validation.control_path:
                raise ValueError("train.validation.control_path is for model.family flux only")
            if any(preview.ctrl_img or preview.mask_img for preview in self.sample.samples):
                raise ValueError("sample.samples: ctrl_img and mask_img are for model.family flux only")
            return self
        if tokens is not None and tokens > limit:
            raise ValueError(f"train.max_sequence_length: came {tokens}, but FLUX's T5 reads at most {limit}")
        if self.network.type == "lokr" and self.network.dropout:
            raise ValueError(
                "network.dropout has no effect with lokr: leave it out, or set lokr_rank_dropout"
            )
        if self.network.type == "lokr" and self.save.format != SaveConfig().format:
            raise ValueError(
                "save.format has no effect with lokr, whose file ComfyUI and ai-toolkit read: leave it out"
            )
        if self.network.type == "dora" and "paddle" in self.save.format:
            raise ValueError("save.format paddle has no place for dora: use diffusers or kohya")
        if self.model.prompt_prefix is not None:
            raise ValueError("model.prompt_prefix is for model.family newbie only; leave it out")
        return self

    @model_validator(mode="after")
    def _epochs_are_counted(self) -> RunConfig:
        if self.save.save_every_epochs is not None and self.train.num_epochs is None:
            raise ValueError("save.save_every_epochs needs train.num_epochs; use save.save_every with steps")
        return self
