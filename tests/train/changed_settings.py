"""Every setting of a run changed to another valid value, one at a time, and starts that go on under it."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError

from ppcoat.coat import chosen_modules
from ppcoat.config.lightning import MISTAKES, LightningConfig
from ppcoat.config.resume import setting_fields, settings_that_matter
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.distill.flux_lightning import WORDS, _compatible
from ppcoat.optim import lr_scheduler
from ppcoat.train.base_model import compatible
from ppcoat.train.checkpoint import save_run
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.report import SigmaBins
from ppcoat.train.resume import data_record, resume_run
from ppcoat.train.run_state import Records, ResumeWords, RunState

# What a setting needs beside it to be valid or to have an effect.
WITH = {
    "lr_warmup_steps": {"train.lr_scheduler": "constant_with_warmup"},
    "lr_num_cycles": {"train.lr_scheduler": "cosine_with_restarts"},
    "lr_power": {"train.lr_scheduler": "polynomial"},
    **dict.fromkeys(("lr_step_size", "lr_gamma"), {"train.lr_scheduler": "step", "train.lr_step_size": 5}),
    "prodigy": {"train.optimizer": "prodigy", "train.lr": 1.0},
    "schedulefree": {"train.optimizer": "schedulefree_adamw"},
    "adafactor": {"train.optimizer": "adafactor", "train.adafactor.relative_step": True},
    **dict.fromkeys(("lokr_full_rank", "lokr_factor", "lokr_rank_dropout", "lokr_module_dropout"),
                    {"network.type": "lokr"}),
    "fp8_states": {"coat.optimizer.use_fp8": True, "coat.enabled": False},
    "save_every_epochs": {"train.num_epochs": 2},
    "quantize_matmul": {"model.quantize": "fp8"},
    **dict.fromkeys(("diff_output_preservation_class", "diff_output_preservation_multiplier"),
                    {"train.diff_output_preservation": True}),
    "blank_prompt_preservation_multiplier": {"train.blank_prompt_preservation": True},
    "checkpoint_blocks": {"train.gradient_checkpointing": True},
    **dict.fromkeys(("invert_mask", "mask_min_value"), {"datasets.1.mask_path": "masks"}),
    **dict.fromkeys(("full_size_control_images", "control_transparent_color", "control_path"),
                    {"datasets.1.control_path": ["references"]}),
    "sample": {"sample.prompts": ["a green hat"], "sample.width": 64, "sample.height": 64,
               "sample.sample_steps": 1},
    "train.validation.control_path": {"train.validation.folder_path": "more",
                                      "train.validation.control_path": ["references"],
                                      "train.validation.resolution": 64},
    "validation": {"train.validation.items": [{"image_path": "pictures/pictures0.png"}],
                   "train.validation.resolution": 64},
    "mask_path": {"datasets.1.mask_path": "masks"},
    "prompt_prefix": {"model.family": "newbie"},
}  # fmt: skip
WITH_IN_DISTILLATION = {"lr_warmup_steps": {"lr_scheduler": "constant_with_warmup"}}
# The other value where the first that is valid would not do: of places a copy, of others one that matters.
VALUES = {
    "folder_path": "copy/more", "control_path": ["copy/references"], "mask_path": "copy/masks",
    "caption_ext": "caption", "double_blocks": [0, 0], "single_blocks": [0, 0], "targets": ["to_q"],
    "only_if_contains": ["attn"], "ignore_if_contains": ["attn"], "bucket_step": 64, "keep_tokens": 1,
    "blocks_to_swap": 1, "adv_weight": 0.0, "linear_granularity": "per_group", "lokr_factor": 2,
    "max_sequence_length": 24, "format": ["diffusers", "paddle"], "slice_p": 3, "policy": "coat+recompute",
    "prompt_prefix": "You draw.", "prompts": ["a hat"], "samples": [{"prompt": "a hat"}],
    "control_transparent_color": [9, 9, 9], "growth_rate": 2.0, "lr": 2e-3, "learning_rate": 2e-3,
    "group_size": 64, "adam_beta1": 0.8, "optimizer": "lion", "train.beta1": 0.8, "block_size": 32,
    "cache_dir": "caches",
    "items": [{"image_path": "pictures/pictures1.png"}], "name_or_path": "copy/model",
    "text_encoders": ["copy/model"], "vae": "copy/model", "tokenizers": ["copy/model"], "device": "auto",
    "pretrained_teacher_model": "copy/model", "data_path": "copy/more", "vram_gb": 64.0,
    "resume_from_checkpoint": None, "save_format": ["paddle"],
}  # fmt: skip
# What changes with a setting, so that the settings are valid and nothing else is another.
BESIDE = {"adv_weight": {"adv_lr": None, "head_blocks": None}, "compat": dict.fromkeys(MISTAKES, "fixed")}
ONE_VALUE = {"coat.optimizer.stochastic_rounding"}  # a run takes no other


@dataclass(frozen=True)
class Changed:
    """A setting by its dotted name, and the whole settings before and after."""

    key: str
    before: BaseModel
    after: BaseModel


def write_data(folder: Path) -> None:
    """pictures, more with masks and smaller references, and copies of all in copy; in sizes that settings
    divide otherwise."""
    for root in (folder, folder / "copy"):
        rng = np.random.default_rng(0)
        for name, sizes in {"pictures": [(64, 64)] * 2, "more": [(64, 64), (64, 112)]}.items():
            for number, (width, height) in enumerate(sizes):
                path = root / name / f"{name}{number}.png"
                _draw(path, rng, height, width, 4)
                for ending in (".txt", ".caption"):
                    path.with_suffix(ending).write_text("a hat, green, small")
                if name == "more":
                    _draw(root / "masks" / path.name, rng, height, width, 3)
                    _draw(root / "references" / path.name, rng, height // 2, width // 2, 3)


def _draw(path: Path, rng: np.random.Generator, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, "uint8")).save(path)


def every_change(config: BaseModel, skip: set[str] = frozenset()) -> list[Changed]:
    """One for each setting that has a second value; where a config has two datasets, it is the second's."""
    fields, skip = setting_fields(type(config)), skip | ONE_VALUE
    found = {key: _changed(config, key, field) for key, field in fields.items() if key not in skip}
    without = [key for key, change in found.items() if change is None]
    assert not without, f"no other valid value is known of {without}"
    return list(found.values())


def _changed(config: BaseModel, key: str, field) -> Changed | None:
    *sections, own = key.split(".")
    dotted = key.replace("datasets.", "datasets.1.")
    needs = WITH_IN_DISTILLATION if isinstance(config, LightningConfig) else WITH
    found = (needs[part] for part in (key, own, *reversed(sections)) if part in needs)
    before = _with(config, next(found, {}))
    value = _at(before.model_dump(mode="json"), dotted)
    for other in [VALUES.get(key, VALUES.get(own))] if {key, own} & VALUES.keys() else _others(value, field):
        try:
            after = _with(before, {dotted: other} | BESIDE.get(key, {}))
        except ValidationError:
            continue
        if _at(after.model_dump(mode="json"), dotted) != value:
            return Changed(dotted, before, after)
    return None


def _others(value, field) -> list:
    choices = [each for each in get_args(field.annotation) if isinstance(each, str | bool)]
    found = [each for each in choices if each != value]
    if isinstance(value, bool):
        return [*found, not value]
    if isinstance(value, int | float):
        return [*found, value + 1, value * 2, value + 16, value // 2, value / 2, 0.5, 0.25]
    if isinstance(value, list):
        return [["x"], [1.0, 0.5], [{"image_path": "x"}], [0, 1]]
    return [*found, "auto", "x", 2, 0.5, ["x"]]


def _with(config: BaseModel, values: dict) -> BaseModel:
    """The config with these settings, checked; those that are None are left out."""
    given = isinstance(config, LightningConfig)
    data = config.model_dump(mode="json", exclude_unset=given)
    for dotted, value in values.items():
        *sections, name = dotted.split(".")
        here = data
        for part in sections:
            here = here[int(part)] if part.isdecimal() else here[part]
        if given and value is None:
            here.pop(name, None)
        else:
            here[name] = value
    return type(config).model_validate(data)


def _at(data: dict, dotted: str):
    for part in dotted.split("."):
        data = data[int(part)] if part.isdecimal() else data[part]
    return data


def flat(config: BaseModel) -> dict:
    """All settings by dotted name, whatever their class."""
    dump, fields = config.model_dump(mode="json"), setting_fields(type(config))
    numbers = range(len(dump.get("datasets", [0])))
    keys = {key.replace("datasets.", f"datasets.{number}.") for key in fields for number in numbers}
    return {key: _at(dump, key) for key in sorted(keys)}


class Resumed:
    """Checkpoints of runs without parameters, and starts that go on from them."""

    def __init__(self, folder):
        self.folder, self.transformer, self.saved = folder, None, None

    def state(self, config, weights=None):
        """(its state, its config) of a run, as far as it is compared. weights: fingerprints of its base."""
        lightning = isinstance(config, LightningConfig)
        plain = config.run_config(config.data_path) if lightning else config
        datasets = scan_datasets(plain)
        batches = ResumableBatches(all_examples(datasets), plain.train.batch_size, plain.seed)
        if self.transformer is None:
            self.transformer = FluxSpec().unfilled(plain)
        modules = list(chosen_modules(plain.network, self.transformer))
        facts = _compatible(config) | {"modules": modules} if lightning else compatible(plain, modules)
        schedule = lr_scheduler("constant", 1e-3, 4)
        records = Records(settings_that_matter(config), weights or {}, data_record(datasets))
        state = RunState({}, NoOptimizer(), schedule, batches, SigmaBins(), None, facts, records)
        return state, plain.model_copy(update={"output_dir": str(self.folder), "name": "run"})

    def save(self, config, weights=None):
        """A checkpoint of a run."""
        save_run(*self.state(config, weights))

    def go_on(self, config, capsys, weights=None, **save):
        """What is said when a run goes on from it."""
        state, plain = self.state(config, weights)
        plain = plain.model_copy(update={"save": plain.save.model_copy(update=save)})
        words = WORDS if isinstance(config, LightningConfig) else ResumeWords()
        capsys.readouterr()
        resume_run(state, plain, Ranks(), words)
        return capsys.readouterr().out

    def changed(self, change, capsys, **save):
        """The same under changed settings."""
        if self.saved != flat(change.before):
            self.save(change.before)
            self.saved = flat(change.before)
        return self.go_on(change.after, capsys, **save)


class NoOptimizer:
    def state_dict(self):
        return {}

    def set_state_dict(self, state):
        assert state == {}


def shown(change):
    """`key old -> new`, as a line of a resumed run has it."""
    values = [settings_that_matter(each)[change.key] for each in (change.before, change.after)]
    return f"{change.key} {values[0]!r} -> {values[1]!r}"
