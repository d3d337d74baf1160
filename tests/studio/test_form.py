"""The form of a run: every setting is in it, and what is typed is read, and refused, as in a config file."""

import re

import pytest
import yaml

from ppcoat.config.explain import schema_keys
from ppcoat.config.flags import CONFIGS, TINY_FLUX
from ppcoat.config.load import load_config
from ppcoat.config.newbie import load_run_config
from ppcoat.errors import ConfigError
from ppcoat.studio import form
from ppcoat.studio.field_words import CHINESE, field_text

FIELDS = {field.key: field for field in form.all_fields()}
SMALL = {"name": "run", "model.name_or_path": "tiny_flux", "datasets.0.folder_path": "photos"}


def test_every_setting_is_in_the_form_once():
    keys = [field.key for field in form.all_fields()]
    sections = {key.rpartition(".")[0].removesuffix(".0") for key in schema_keys()}
    lists = {key.removesuffix(".0") for key in map(lambda key: key.rpartition(".")[0], schema_keys())
             if key.endswith(".0")}  # fmt: skip
    assert sorted(keys) == sorted(set(schema_keys()) - (sections - lists))


def test_every_setting_is_described_in_both_languages():
    assert all(field.description for field in FIELDS.values())
    assert set(CHINESE) == set(FIELDS)
    pages = re.compile(r"docs/\w+\.md")
    assert all(pages.findall(text) == pages.findall(FIELDS[key].description) for key, text in CHINESE.items())
    assert field_text(FIELDS["train.lr"], "en") == "peak learning rate"
    assert all(re.search("[\u4e00-\u9fff]", text) or key == "device" for key, text in CHINESE.items())


def test_the_basic_settings_are_settings():
    assert set(form.BASIC) <= set(FIELDS)
    assert {key for key, field in FIELDS.items() if field.required and ".0." not in key} <= set(form.BASIC)


@pytest.mark.parametrize(
    ("key", "kind", "choices", "limits"),
    [
        ("train.lr", "number", (), "> 0, ≤ 1"),
        ("train.gradient_checkpointing", "switch", (), ""),
        ("model.quantize", "choice", (False, "fp8", "int8", "nf4", "fp4"), ""),
        ("save.format", "choices", ("diffusers", "kohya", "paddle"), ""),
        ("sample.prompts", "lines", (), ""),
        ("datasets.0.resolution", "number", (), "≥ 16, ≤ 8192, 16 × n"),
        ("train.validation.sigmas", "list", (), "≥ 0, ≤ 1"),
        ("datasets", "entries", (), ""),
        ("trigger_word", "text", (), ""),
    ],
)
def test_a_setting_is_asked_for_by_its_kind(key, kind, choices, limits):
    field = FIELDS[key]
    assert (field.kind, tuple(value for value, _ in field.choices), field.limits) == (kind, choices, limits)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.lr", "1e-4", 1e-4),
        ("train.steps", " 30 ", 30),
        ("train.lr", "abc", "abc"),
        ("train.lr", "", None),
        ("datasets.0.resolution", "512, 768", [512, 768]),
        ("datasets.0.resolution", "512", 512),
        ("train.validation.sigmas", "[0.5, 1.0]", [0.5, 1.0]),
        ("train.validation.sigmas", "0.5", [0.5]),
        ("sample.prompts", "a hat\n\n a cat, black \n", ["a hat", "a cat, black"]),
        ("name", "123", "123"),
        ("model.quantize", False, False),
    ],
)
def test_what_is_typed_becomes_a_value(key, text, value):
    assert FIELDS[key].value_of(text) == value
    if value not in (None, "abc"):
        assert FIELDS[key].value_of(FIELDS[key].text_of(value)) == value


@pytest.mark.parametrize("name", sorted(form.templates()))
def test_a_template_is_the_same_run_after_the_form(name):
    values = form.template_values(name)
    assert form.form_config(values) == load_run_config(CONFIGS / name)
    assert form.text_values(form.form_text(values)) == values


def test_the_form_holds_only_what_differs_from_the_defaults():
    text = form.form_text(form.values_in(form.form_config(SMALL | {"train.steps": 1000, "train.lr": 2e-4})))
    assert yaml.safe_load(text) == {
        "name": "run", "model": {"name_or_path": "tiny_flux"}, "datasets": [{"folder_path": "photos"}],
        "train": {"lr": 0.0002},
    }  # fmt: skip
    assert form.form_config(SMALL).model.name_or_path == TINY_FLUX


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"train.lr": "abc"}, "train.lr", "came 'abc', wanted a number without quotes"),
        ({"train.lr": 2}, "train.lr", "came 2, wanted less than or equal to 1"),
        ({"train.batch_size": 1.5}, "train.batch_size", "wanted a whole number without quotes"),
        ({"datasets.0.resolution": [64, 17]}, "datasets.0.resolution", "came 17, wanted a multiple of 16"),
        ({"model.name_or_path": None}, "model.name_or_path", "is missing: folder of a pipeline"),
        ({"datasets.0.folder_path": None}, "datasets.0.folder_path", "is missing: folder of pictures"),
        ({"datasets.1.folder_path": None}, "datasets.1.folder_path", "is missing: folder of pictures"),
        ({"name": "a/b"}, "name", "must not hold any of"),
        ({"train.steps": 5, "train.lr_warmup_steps": 9}, "train.lr_warmup_steps", "is more than steps 5"),
        ({"network.type": "lokr", "network.dropout": 0.1}, "network.dropout", "has no effect with lokr"),
        ({"sample.width": 17}, "sample.width", "wanted a multiple of 16"),
        ({"coat.activation.policy": "coats"}, "coat.activation.policy", "the nearest is 'coat'"),
        ({"train.stepz": 5}, "", "unknown key 'train.stepz'; the nearest known key is 'train.steps'"),
    ],
)
def test_a_mistake_is_told_at_its_field_in_the_words_of_the_loader(tmp_path, changes, key, message):
    values = SMALL | changes
    with pytest.raises(ConfigError) as raised:
        form.form_config(values)
    found = form.errors_by_field(raised.value)
    assert list(found) == [key] and message in found[key]
    file = tmp_path / "run.yaml"
    file.write_text(form.form_text(values), encoding="utf-8")
    with pytest.raises(ConfigError) as of_file:
        load_config(file)
    assert found[key] in str(of_file.value)


def test_several_mistakes_are_told_each_at_its_field():
    with pytest.raises(ConfigError) as raised:
        form.form_config(SMALL | {"train.lr": "abc", "sample.guidance_scale": -1})
    assert set(form.errors_by_field(raised.value)) == {"train.lr", "sample.guidance_scale"}


def test_entries_are_added_and_taken_out():
    values = form.with_entry(SMALL, FIELDS["datasets"])
    assert form.entries_of(values, "datasets") == 2
    values |= {"datasets.1.folder_path": "more", "datasets.1.num_repeats": 3}
    assert len(form.form_config(values).datasets) == 2
    values = form.without_entry(values, "datasets", 0)
    assert (values["datasets.0.folder_path"], values["datasets.0.num_repeats"]) == ("more", 3)
    assert form.entries_of(values, "datasets") == 1
    assert form.numbered("train.validation.items.0.prompt", [2]) == "train.validation.items.2.prompt"


def test_text_that_looks_like_something_else_stays_text(monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    prompts = ["${SECRET}", "a: b", "- c", "yes", "1e-4", "<img src=x onerror=alert(1)>", "#x"]
    found = form.form_config(SMALL | {"sample.prompts": prompts, "trigger_word": "${SECRET}"})
    assert list(found.sample.prompts) == prompts and found.trigger_word == "${SECRET}"


def test_paths_are_found_to_be_held_to_the_folders():
    config = form.form_config(SMALL | {"datasets.1.folder_path": "b", "datasets.1.control_path": ["c", "d"],
                                       "cache_dir": "e", "datasets.1.mask_path": "f"})  # fmt: skip
    assert form.paths_in(config) == {
        "output_dir": ["output"], "datasets.0.folder_path": ["photos"], "datasets.1.folder_path": ["b"],
        "datasets.1.control_path": ["c", "d"], "datasets.1.mask_path": ["f"], "cache_dir": ["e"],
    }  # fmt: skip


def test_a_run_is_trained_by_the_command_of_its_family():
    newbie = form.form_config(form.template_values("newbie_lora.toml"))
    assert form.training_argv(newbie, "a.yaml") == ["train-newbie", "--config_file", "a.yaml"]
    assert form.training_argv(form.form_config(SMALL), "a.yaml") == ["train", "a.yaml"]


def test_what_a_plan_changes_goes_into_the_form():
    values = form.with_changes(
        SMALL | {"model.quantize": "fp8"}, {"model.quantize": False, "train.batch_size": 2}
    )
    assert values == SMALL | {"train.batch_size": 2}
