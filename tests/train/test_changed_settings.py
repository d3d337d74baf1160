"""Every setting of every kind of run, changed: met as config/resume.py says."""

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
from changed_settings import Resumed, every_change, flat, shown, write_data
from counts import judge

from ppcoat.config.lightning import LightningConfig, lightning_config
from ppcoat.config.load import load_config
from ppcoat.config.newbie import _NO_EFFECT, _PARTS, DEFAULT_TARGETS, known_keys, load_newbie_config
from ppcoat.config.resume import (
    CLASSES,
    PLACES,
    class_of,
    setting_fields,
    settings_that_matter,
    without_number,
)
from ppcoat.config.schema import ModelConfig, NetworkConfig, RunConfig
from ppcoat.data import examples
from ppcoat.distill.flux_lightning import train_flux_lightning
from ppcoat.errors import ConfigError
from ppcoat.train.run import train_lora

FIXTURE, NEWBIE = (
    Path(__file__).parents[1] / "fixtures" / name for name in ("tiny_flux_fp32", "tiny_newbie")
)

FLAGS = {"pretrained_teacher_model": str(FIXTURE), "resolution": "64", "lora_rank": "2", "device": "cpu",
         "use_dmd_loss": True, "apply_reflow_loss": True, "use_distill_loss": True, "max_train_steps": "3",
         "max_sequence_length": "16", "num_euler_timesteps": "20", "validation_steps": "0",
         "resume_from_checkpoint": "latest"}  # fmt: skip


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
    assert known | {"datasets"} == CLASSES.keys() and known >= {*PLACES}
    assert class_of("datasets.3.flip_x") == "order" and class_of("of.an.earlier.version") == "told"


@pytest.mark.parametrize("page", ["training.md", "zh/training.md"])
def test_the_table_of_classes_in_the_docs_is_that_of_the_code(page):
    """A row has names, sections (save.*), and after a section what does not belong to it."""
    fields, found = setting_fields(RunConfig), {}
    text = (Path(__file__).parents[2] / "docs" / page).read_text("utf-8")
    for kind in ("same", "order", "free"):
        (row,) = re.findall(rf"(?m)^\| {kind} \|[^|]*\|(.*)\|$", text)
        found[kind] = set()
        for name in re.findall(r"`([^`]+)`", row):
            found[kind] ^= (
                {key for key in fields if key.startswith(name[:-1])} if name.endswith("*") else
                {name if name in fields else f"datasets.{name}"} - {"datasets.datasets"})  # fmt: skip
    wanted = {kind: {key for key in fields if CLASSES[key] == kind} for kind in found}
    assert found == wanted


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


def check_each(changes, resumed, capsys, restarts):
    wrong = {}
    for change in changes:
        kind = class_of(change.key)
        try:
            said = resumed.changed(change, capsys)
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
            said = resumed.changed(change, capsys, restart_data=True)
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
    flags = FLAGS | {"data_path": str(folder / "more"), "file_list_path": "list.txt"}
    monkeypatch.chdir(folder)
    changes = every_change(lightning_config(flags))
    check_each(changes, Resumed(tmp_path), capsys, restarts=False)


@pytest.fixture(scope="module")
def trained(run):
    """trained(settings) -> the folder of a run of 3 steps with them and with a checkpoint of each."""
    folder, _ = run
    shutil.copytree(FIXTURE, folder / "copy" / "model")

    @cache
    def train(key):
        config, name = wanted[key], f"whole{len(list(folder.glob('whole*')))}"
        if isinstance(config, LightningConfig):
            own = {"checkpointing_steps": 1, "tracker_project_name": name, "resume_from_checkpoint": None}
        else:
            own = {"name": name, "save": config.save.model_copy(update={"save_every": 1})}
        start(config.model_copy(update=own))
        return folder / name

    wanted = {}

    def of(config):
        key = repr(flat(config))
        wanted[key] = config
        return train(key)

    return of


def start(config):
    return train_flux_lightning(config) if isinstance(config, LightningConfig) else train_lora(config)


def gone_on(change, trained, folder, capsys):
    """(what is said, whether the last checkpoint has the bits of a run without a stop) of a run that goes on
    from the step before under the changed settings."""
    whole, own = trained(change.before), folder / "again" / change.key
    shutil.copytree(whole, own)
    before, last = sorted(each.name for each in (own / "checkpoints").iterdir() if each.is_dir())[-2:]
    (own / "checkpoints" / "latest").write_text(f"{before}\n")
    shutil.rmtree(own / "checkpoints" / last)
    place = {"output_dir": str(own.parent)}
    place["tracker_project_name" if isinstance(change.after, LightningConfig) else "name"] = change.key
    capsys.readouterr()
    try:
        start(change.after.model_copy(update=place))
    except ConfigError as error:
        return f"refused: {error}", False
    ends = [{file.name: file.read_bytes() for file in (each / "checkpoints" / last).glob("*.safetensors")}
            for each in (whole, own)]  # fmt: skip
    return capsys.readouterr().out, ends[0] == ends[1]


def check_trained(row, changes, trained, folder, capsys):
    wrong = {}
    for change in changes:
        kind = class_of(change.key)
        said, equal = gone_on(change, trained, folder, capsys)
        line = next((each for each in said.splitlines() if each.startswith("changed since then")), "")
        if kind == "free":
            right = equal and not line and "resuming from" in said
        elif kind == "told":
            right = shown(change) in line
        else:
            right = said.startswith("refused: cannot resume") and change.key in said
        ends = {"free": "nothing said, bit-equal", "told": "told"}.get(kind, "refused")
        judge(f"a setting of {row}, changed", ends, right, change.key)
        if not right:
            wrong[change.key] = kind, equal, line or said[-300:]
    assert not wrong, "\n".join(f"{key}: {each}" for key, each in wrong.items())


# What `memory: auto` chooses is told as the settings that it chose; a FLUX is no NewBie.
NOT_TRAINED = {"memory", "vram_gb", "model.family", "model.prompt_prefix"}


@pytest.mark.slow
def test_training_goes_on_under_every_changed_setting_as_its_class_says(
    run, trained, tmp_path, capsys, monkeypatch
):
    """Free ones leave every bit of weights, optimizer states and running mean."""
    folder, config = run
    monkeypatch.chdir(folder)
    steps = config.train.model_copy(update={"steps": 3})
    config = config.model_copy(update={"train": steps})
    check_trained("FLUX", every_change(config, NOT_TRAINED), trained, tmp_path, capsys)


@pytest.mark.slow
def test_a_distillation_goes_on_under_every_changed_setting_as_its_class_says(
    run, trained, tmp_path, capsys, monkeypatch
):
    folder, _ = run
    monkeypatch.chdir(folder)
    flags = FLAGS | {"data_path": str(folder / "more"), "output_dir": str(folder)}
    of_shards = {"image_column", "caption_column", "bad_rows", "max_bad_share", "dataloader_num_workers",
                 "file_list_path", "resume_from_checkpoint", "strict_resume"}  # fmt: skip
    check_trained("Lightning", every_change(lightning_config(flags), of_shards), trained, tmp_path, capsys)


@pytest.mark.slow
def test_newbie_leaves_every_bit_under_free_settings(run, trained, tmp_path, capsys, monkeypatch):
    folder, config = run
    newbie = tmp_path / "newbie"
    write_data(newbie)
    shutil.copytree(NEWBIE, newbie / "copy" / "model")
    monkeypatch.chdir(newbie)
    config = config.model_copy(
        update={
            "model": ModelConfig(name_or_path=str(NEWBIE), family="newbie"),
            "train": config.train.model_copy(update={"steps": 3, "lr": 1e-2}),
            "network": NetworkConfig(linear=2, targets=DEFAULT_TARGETS),
        }
    )
    of_flux = {f"datasets.{name}" for name in ("control_path", "mask_path", "full_size_control_images",
               "invert_mask", "control_transparent_color", "mask_min_value")}  # fmt: skip
    of_flux |= {"model.text_encoders", "model.vae", "model.tokenizers", "network.type"} | NOT_TRAINED
    of_flux |= {"train.validation.control_path", "datasets.alpha_mask"}
    changes = [each for each in every_change(config, of_flux) if class_of(each.key) == "free"]
    check_trained("NewBie", changes, trained, tmp_path, capsys)
