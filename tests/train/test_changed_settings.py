"""Every setting of every kind of run, changed: met as config/resume.py says."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from changed_settings import every_change, flat, write_data

from ppcoat.coat import chosen_modules
from ppcoat.config.lightning import LightningConfig, lightning_config
from ppcoat.config.load import load_config
from ppcoat.config.newbie import _NO_EFFECT, _PARTS, known_keys, load_newbie_config
from ppcoat.config.resume import CLASSES, class_of, setting_fields, settings_that_matter, without_number
from ppcoat.config.schema import RunConfig
from ppcoat.data import examples
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.distill.flux_lightning import WORDS, _compatible
from ppcoat.errors import ConfigError
from ppcoat.optim import lr_scheduler
from ppcoat.train.base_model import compatible
from ppcoat.train.checkpoint import save_run
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.report import SigmaBins
from ppcoat.train.resume import data_record, resume_run
from ppcoat.train.run_state import Records, ResumeWords, RunState

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> (folder with data, a FLUX run on it)."""
    folder = tmp_path_factory.mktemp("settings")
    write_data(folder)
    text = f"""
name: run
output_dir: {folder}
device: cpu
trigger_word: sks
model: {{name_or_path: {FIXTURE}}}
network: {{linear: 2, linear_alpha: 4}}
datasets:
  - {{folder_path: {folder / "pictures"}, resolution: 64}}
  - {{folder_path: {folder / "more"}, resolution: 64}}
train: {{max_sequence_length: 16, steps: 4, lr: 1e-3}}
coat: {{enabled: true}}
"""
    (folder / "run.yaml").write_text(text)
    return folder, load_config(folder / "run.yaml")


@pytest.fixture
def quick(monkeypatch):
    """A folder is read once, and the disk is trusted."""
    monkeypatch.setattr(examples, "scan_folder", cache(examples.scan_folder))
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_every_setting_of_every_config_has_a_class():
    """NewBie's keys become settings of the same schema."""
    known = setting_fields(RunConfig).keys() | setting_fields(LightningConfig).keys()
    assert known == CLASSES.keys()
    assert class_of("datasets.3.flip_x") == "order" and class_of("of.an.earlier.version") == "told"


# Of a key of [Model] or [Optimization] the two values that are compared; others get a number.
TOML_VALUES = {
    "adapter_type": ("lora", "lokr"), "mixed_precision": ("bf16", "no"), "lr_scheduler": ("cosine", "linear"),
    "optimizer_type": ("AdamW8bit", "AdamW"), "enable_bucket": (True, False), "use_cache": (True, False),
    "gradient_checkpointing": (True, False), "lokr_train_norm": (False, True),
    **dict.fromkeys(("lora_target_modules", "lokr_target_modules"), (["to_q"], ["to_k"])),
    **dict.fromkeys(("base_model_path", "gemma3_prompt", "output_dir", "output_name", "train_data_dir"),
                    ("a", "b")),
}  # fmt: skip


def test_every_key_of_newbies_file_is_a_setting_with_a_class(tmp_path):
    plain = {"base_model_path": "model", "train_data_dir": "data", "output_name": "run"}
    without_effect = set()
    for key in set(known_keys()) - {*_NO_EFFECT, *_PARTS}:
        numbers = (0.25, 0.5) if "dropout" in key or key == "learning_rate" else (16, 32)
        found = []
        for value in TOML_VALUES.get(key, numbers):
            values = plain | ({"adapter_type": "lokr"} if key.startswith("lokr") else {}) | {key: value}
            lines = [f"{name} = {json.dumps(each)}" for name, each in values.items()]
            (tmp_path / "run.toml").write_text("\n".join(["[Model]", *lines]))
            found.append(flat(load_newbie_config(tmp_path / "run.toml")))
        changed = {name for name, value in found[1].items() if found[0].get(name) != value}
        assert {without_number(name) for name in changed} <= CLASSES.keys()
        without_effect |= set() if changed else {key}
    assert without_effect == {"lokr_dropout", "lokr_train_norm"}  # which are warned of


class Resumed:
    """Checkpoints of runs without parameters, and starts that go on from them."""

    def __init__(self, folder):
        self.folder, self.transformer = folder, None
        self.saved = {}

    def state(self, config):
        """What a run of this config is, as far as it is compared."""
        lightning = isinstance(config, LightningConfig)
        plain = config.run_config(config.data_path) if lightning else config
        datasets = scan_datasets(plain)
        batches = ResumableBatches(all_examples(datasets), plain.train.batch_size, plain.seed)
        if self.transformer is None:
            self.transformer = FluxSpec().unfilled(plain)
        modules = list(chosen_modules(plain.network, self.transformer))
        facts = _compatible(config) | {"modules": modules} if lightning else (
            compatible(plain, modules))  # fmt: skip
        schedule = lr_scheduler("constant", 1e-3, 4)
        records = Records(settings_that_matter(config), data=data_record(datasets))
        state = RunState({}, NoOptimizer(), schedule, batches, SigmaBins(), None, facts, records)
        return state, plain.model_copy(update={"output_dir": str(self.folder), "name": "run"})

    def go_on(self, before, after, capsys, **save):
        """What is said when a run of `after` goes on from a checkpoint of `before`."""
        key = json.dumps(flat(before), default=str)
        if self.saved.get("now") != key:
            save_run(*self.state(before))
            self.saved["now"] = key
        state, config = self.state(after)
        config = config.model_copy(update={"save": config.save.model_copy(update=save)})
        words = WORDS if isinstance(after, LightningConfig) else ResumeWords()
        capsys.readouterr()
        resume_run(state, config, Ranks(), words)
        return capsys.readouterr().out


class NoOptimizer:
    def state_dict(self):
        return {}

    def set_state_dict(self, state):
        assert state == {}


def shown(change):
    """`key old -> new`, as a line of a resumed run has it."""
    values = [settings_that_matter(each)[change.key] for each in (change.before, change.after)]
    return f"{change.key} {values[0]!r} -> {values[1]!r}"


def check_each(changes, resumed, capsys, restarts):
    wrong = {}
    for change in changes:
        kind = class_of(change.key)
        try:
            said = resumed.go_on(change.before, change.after, capsys)
        except ConfigError as error:
            said = f"refused: {error}"
        if kind == "free":
            right = said.startswith("resuming from") and "changed" not in said
        elif kind == "told":
            right = said.startswith("resuming from") and f"changed since then: {shown(change)}" in said
        else:
            begins = "refused: cannot resume" + (" the order of the data: " if kind == "order" else ": ")
            values = [repr(settings_that_matter(each)[change.key]) for each in (change.before, change.after)]
            named = change.key in said and all(value in said for value in values) and "set it back" in said
            right = said.startswith(begins) and named and "\n" not in said
        if right and kind == "order" and restarts:
            said = resumed.go_on(change.before, change.after, capsys, restart_data=True)
            right = shown(change) in said and "anew: the order of the pictures" in said
        if not right:
            wrong[change.key] = (kind, said)
    assert not wrong, "\n".join(f"{key}: {kind}, {said}" for key, (kind, said) in wrong.items())


def test_every_setting_of_a_flux_run_is_refused_told_or_passed_over_as_its_class_says(
    run, tmp_path, capsys, quick, monkeypatch
):
    folder, config = run
    monkeypatch.chdir(folder)
    check_each(every_change(config), Resumed(tmp_path), capsys, restarts=True)


def test_every_setting_of_a_distillation_is_refused_told_or_passed_over_as_its_class_says(
    run, tmp_path, capsys, quick, monkeypatch
):
    folder, _ = run
    flags = {"data_path": str(folder / "more"), "pretrained_teacher_model": str(FIXTURE), "resolution": "64",
             "lora_rank": "2", "use_dmd_loss": True, "apply_reflow_loss": True, "use_distill_loss": True,
             "resume_from_checkpoint": "latest", "file_list_path": "list.txt", "device": "cpu"}  # fmt: skip
    monkeypatch.chdir(folder)
    changes = every_change(lightning_config(flags), skip={"data_path"})
    check_each(changes, Resumed(tmp_path), capsys, restarts=False)
