"""Prompts with flags, lists of samples, and validation pictures."""

import pytest

from ppcoat.config.schema import PreviewConfig, ValidationConfig, ValidationItem

OURS = """\
name: shirts
model: {name_or_path: tiny}
datasets: [{folder_path: photos}]
"""


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
    ("prompt", "drawn", "part"),
    [
        ("a --ctrl_img x.png --ctrl_img_2 y.png", {"ctrl_img": ("x.png", "y.png")}, None),
        ("a --ctrl_img", {}, "its 'ctrl_img' names no file: it is drawn without one"),
        ("a --ar 2:3 --v 6 --s 12", {"sample_steps": 12}, "'ar' is nothing that a preview can follow"),
        ("a --m 0.5", {}, "previews show the LoRA at full strength"),
        ("a --m 1.0", {}, None),
        ("a --w wide", {}, "width 'wide' cannot be drawn with and is left out"),
        ("a --w 100 --h 64", {"width": 96, "height": 64}, "width becomes 96, a multiple of 16"),
        ("a --h 3", {"height": 16}, "height becomes 16"),
        ("a --s 0 --cfg -2", {}, "guidance_scale '-2' cannot be drawn with"),
    ],
)
def test_what_previews_cannot_do_is_left_out_with_a_word(load, warnings, prompt, drawn, part):
    sample = load(f"sample.prompts=[{prompt}]").sample
    wanted = (PreviewConfig(prompt="a", **drawn),)
    assert (sample.samples or tuple(PreviewConfig(prompt=each) for each in sample.prompts)) == wanted
    said = warnings(f"sample.prompts=[{prompt}]")
    assert not said if part is None else any(part in line for line in said)


def test_a_prompt_of_nothing_but_flags_is_text(load, warnings):
    assert load('sample.prompts=["--no hat, a dress"]').sample.prompts == ("--no hat, a dress",)
    assert any("'--no' is taken as text" in line for line in warnings('sample.prompts=["--no hat, a dress"]'))


def test_a_seed_below_0_is_any_seed_and_it_is_told(load, warnings):
    assert 0 <= load("sample.seed=-1").sample.seed < 2**32
    assert 0 <= load("sample.prompts=[a --d -1]").sample.samples[0].seed < 2**32
    assert any("any seed is " in line for line in warnings("sample.seed=-1"))


def test_a_seed_that_is_drawn_is_the_one_that_is_told(load, caplog):
    """Prompts with flags and samples are put together; each seed below 0 is drawn once all the same."""
    given = ("sample.prompts=[a --d -1]", "sample.samples=[{prompt: b, seed: -1}, {prompt: b, seed: -1}]")
    drawn = [preview.seed for preview in load(*given).sample.samples]
    told = [int(line.rpartition("any seed is ")[2]) for line in caplog.messages if "any seed is " in line]
    assert len(set(drawn)) == 3 and sorted(told) == sorted(drawn)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("sample.width=abc", "sample.width: came 'abc', wanted"),
        ("sample.width=500", "sample.width: came 500; wanted a multiple of 16; the nearest are 496 and 512"),
        ("sample.height=0", "sample.height: came 0, wanted"),
        ("sample.sample_steps=0", "sample.sample_steps: came 0, wanted"),
        ("sample.seed=-2", "sample.seed: came -2, wanted"),
        ("sample.samples=[{prompt: a, width: 500}]", "the nearest are 496 and 512"),
        ("sample.samples=[{prompt: a, height: abc}]", "samples.0.height: came 'abc', wanted"),
    ],
)
def test_our_own_form_refuses_what_cannot_be_drawn_with(load, refusal, given, part):
    assert part in refusal(given, text=OURS)
    load(given)  # in ai-toolkit's form it is left out, with a word


def test_our_own_form_takes_any_seed_and_the_flags_of_other_programs(load, warnings):
    given = (
        "sample.seed=-1",
        "sample.prompts=[a --ar 2:3 --w 100]",
        "sample.samples=[{prompt: b, m: '1.0'}]",
    )
    sample = load(*given, text=OURS).sample
    assert 0 <= sample.seed < 2**32
    assert sample.samples == (PreviewConfig(prompt="a", width=96), PreviewConfig(prompt="b"))
    assert len(warnings(*given, text=OURS)) == 3


def test_settings_of_all_previews_fit_or_are_left_out(load, warnings):
    sample = load("sample.width=100", "sample.height=50", "sample.sample_steps=none").sample
    assert (sample.width, sample.height, sample.sample_steps) == (96, 48, 28)
    assert len(warnings("sample.width=100", "sample.sample_steps=none")) == 2


def test_keys_of_films_say_nothing_where_the_web_interface_writes_them(load, warnings):
    sample = (
        "{prompt: a, ctrl_img: null, ctrl_idx: 0, fps: 1, num_frames: 1, network_multiplier: '1.0', neg: ''}"
    )
    given = (f"sample.samples=[{sample}]", "sample.num_frames=1", "sample.fps=16")
    assert load(*given).sample.samples == (PreviewConfig(prompt="a"),) and not warnings(*given)


def test_a_prompt_that_is_no_text_is_refused(refusal):
    assert "wanted text" in refusal("sample.prompts=[3]")
    assert "wanted a list" in refusal("sample.samples=3")


def test_negative_prompts_are_named(load, warnings):
    given = 'sample.prompts=["a coat --n ugly, blurred --w 64"]'
    assert load(given).sample.samples == (PreviewConfig(prompt="a coat", width=64),)
    assert any("negative prompts have no effect" in line for line in warnings(given))


@pytest.mark.parametrize("prompt", ["well--known dress", "a dress -- red", "a dress --", " a dress "])
def test_dashes_that_are_no_flag_stay(load, prompt):
    assert load(f"sample.prompts=['{prompt}']").sample.prompts == (prompt,)


def test_prompts_with_flags_come_before_samples(load):
    sample = load("sample.prompts=[a --w 64, c]", "sample.samples=[{prompt: b}]").sample
    assert [each.prompt for each in sample.previews] == ["a", "c", "b"]


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
