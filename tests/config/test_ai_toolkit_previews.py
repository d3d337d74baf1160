"""Prompts with flags and lists of samples."""

import pytest


def test_flags_that_all_prompts_share_become_settings(load):
    prompts = (
        '["a dress --w 768 --h 512 --l 3.5 --s 12 --m 1", "a coat --w 768 --h 512 --cfg 3.5 --steps 12"]'
    )
    sample = load(f"sample.prompts={prompts}").sample
    assert sample.prompts == ("a dress", "a coat")
    assert (sample.width, sample.height, sample.guidance_scale, sample.sample_steps) == (768, 512, 3.5, 12)


def test_samples_say_the_same_in_another_form(load):
    samples = "[{prompt: a dress, width: 768, sample_steps: 12}, {prompt: a coat --w 768 --s 12}]"
    sample = load(f"sample.samples={samples}").sample
    assert (sample.prompts, sample.width, sample.sample_steps) == (("a dress", "a coat"), 768, 12)


@pytest.mark.parametrize(
    ("prompts", "section", "seed", "walk"),
    [
        ("[a --seed 7, b --d 7]", (), 7, False),
        ("[a --seed 7, b --seed 8, c --seed 9]", (), 7, True),
        ("[a, b --seed 6]", ("sample.seed=5", "sample.walk_seed=true"), 5, True),
        ("[a, b --seed 5]", ("sample.seed=5",), 5, False),
        ("[a --seed 7]", ("sample.walk_seed=true",), 7, False),
    ],
)
def test_seeds_are_equal_or_count_up(load, prompts, section, seed, walk):
    sample = load(f"sample.prompts={prompts}", *section).sample
    assert (sample.seed, sample.walk_seed) == (seed, walk)


@pytest.mark.parametrize(
    ("prompts", "part"),
    [
        ("[a --w 512, b --w 768]", "all previews share one width, these have [512, 768]"),
        ("[a --w 768, b]", "these have [768, 512]"),
        ("[a --seed 7, b --seed 3]", "all previews share one seed, these have [7, 3]"),
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


def test_a_flag_overrules_the_section_aloud_and_negative_prompts_are_named(load, warnings):
    given = ('sample.prompts=["a coat --n ugly, blurred --w 64"]', "sample.width=128")
    assert load(*given).sample.width == 64
    assert load(*given).sample.prompts == ("a coat",)
    said = warnings(*given)
    assert any("width 64 overrules sample.width 128" in line for line in said)
    assert not any("overrules" in line for line in warnings("sample.prompts=[a --cfg 2, b --cfg 2]"))
    assert any("negative prompts have no effect" in line for line in said)


@pytest.mark.parametrize("prompt", ["well--known dress", "a dress -- red", "a dress --", " a dress "])
def test_dashes_that_are_no_flag_stay(load, prompt):
    assert load(f"sample.prompts=['{prompt}']").sample.prompts == (prompt,)
