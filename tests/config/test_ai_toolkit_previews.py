"""Prompts with flags, lists of samples, and validation pictures."""

import pytest

from ppcoat.config.schema import PreviewConfig, ValidationConfig, ValidationItem


def test_flags_become_settings_of_their_preview_alone(load):
    prompts = '["a dress --w 768 --h 512 --l 3.5 --s 12 --m 1 --seed 7", "a coat --cfg 2 --steps 4", a shirt]'
    sample = load(f"sample.prompts={prompts}", "sample.width=64").sample
    assert sample.prompts == () and sample.width == 64
    assert sample.samples == (
        PreviewConfig(prompt="a dress", width=768, height=512, guidance_scale=3.5, sample_steps=12, seed=7),
        PreviewConfig(prompt="a coat", guidance_scale=2.0, sample_steps=4),
        PreviewConfig(prompt="a shirt"),
    )


def test_samples_say_the_same_in_another_form(load):
    samples = "[{prompt: a dress, width: 768, sample_steps: 12}, {prompt: a coat --w 512 --s 12}]"
    assert load(f"sample.samples={samples}").sample.samples == (
        PreviewConfig(prompt="a dress", width=768, sample_steps=12),
        PreviewConfig(prompt="a coat", width=512, sample_steps=12),
    )


@pytest.mark.parametrize(
    ("prompts", "part"),
    [
        ("[a --ctrl_img x.png]", "a preview cannot follow 'ctrl_img'"),
        ("[a --m 0.5]", "full strength"),
        ("[a --w wide]", "came 'wide', wanted a whole number"),
        ("[a --w 100]", "multiple of 16"),
        ("[3]", "wanted text"),
    ],
)
def test_what_previews_cannot_do_is_refused(refusal, prompts, part):
    message = refusal(f"sample.prompts={prompts}")
    assert message.startswith("--set sample.prompts=") and part in message


def test_negative_prompts_are_named(load, warnings):
    given = 'sample.prompts=["a coat --n ugly, blurred --w 64"]'
    assert load(given).sample.samples == (PreviewConfig(prompt="a coat", width=64),)
    assert any("negative prompts have no effect" in line for line in warnings(given))


@pytest.mark.parametrize("prompt", ["well--known dress", "a dress -- red", "a dress --", " a dress "])
def test_dashes_that_are_no_flag_stay(load, prompt):
    assert load(f"sample.prompts=['{prompt}']").sample.prompts == (prompt,)


def test_prompts_with_flags_and_samples_exclude_each_other(refusal):
    assert "says it too" in refusal("sample.prompts=[a --w 64]", "sample.samples=[{prompt: b}]")


def test_validation_has_ai_toolkits_defaults_and_counts_updates(load):
    """Defaults of its ValidationConfig: 512 pixels, every 10 steps, four levels."""
    given = "train.validation_config={validation_items: [{image_path: a.png, prompt: a dress}]}"
    wanted = ValidationConfig(
        items=(ValidationItem(image_path="a.png", prompt="a dress"),),
        resolution=512,
        every=10,
        sigmas=(1.0, 0.75, 0.5, 0.25),
    )
    assert load(given).train.validation == wanted
    slower = load(given, "train.gradient_accumulation_steps=5").train.validation
    assert slower.every == 2


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("{items: []}", "there is no 'items' in it; wanted validation_items"),
        ("5", "wanted a section"),
        ("{validation_sigmas: [2.0]}", "less than or equal to 1"),
        ("{validation_items: [{prompt: a}]}", "image_path"),
    ],
)
def test_a_wrong_validation_section_is_refused(refusal, section, part):
    message = refusal(f"train.validation_config={section}")
    assert message.startswith("--set train.validation_config=") and part in message
