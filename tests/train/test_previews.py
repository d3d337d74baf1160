"""Which previews a run draws: size, seed and text of each."""

import pytest
from PIL import Image

from ppcoat.config.load import load_config
from ppcoat.config.schema import PreviewConfig
from ppcoat.train.previews import preview_prompts, previews
from ppcoat.train.run import train_lora


@pytest.fixture
def load(tmp_path, write_run):
    file = write_run(tmp_path, tmp_path)
    return lambda *overrides: load_config(file, overrides)


def test_prompts_come_before_samples_and_share_the_section(load):
    config = load(
        "sample.prompts=['a [trigger] dress', plain]",
        "sample.samples=[{prompt: '[trigger] coat', width: 128, seed: 5}, {prompt: b, guidance_scale: 1.5}]",
        "sample.width=64", "sample.height=32", "sample.sample_steps=3", "sample.walk_seed=true",
        "sample.sample_every=1",
    )  # fmt: skip
    shared = {"height": 32, "sample_steps": 3}
    assert previews(config) == [
        PreviewConfig(prompt="a sks dress", width=64, seed=42, guidance_scale=3.5, **shared),
        PreviewConfig(prompt="plain", width=64, seed=43, guidance_scale=3.5, **shared),
        PreviewConfig(prompt="sks coat", width=128, seed=5, guidance_scale=3.5, **shared),
        PreviewConfig(prompt="b", width=64, seed=45, guidance_scale=1.5, **shared),
    ]
    assert preview_prompts(config) == ["a sks dress", "plain", "sks coat", "b"]
    assert [each.seed for each in previews(load("sample.prompts=[a, b]"))] == [42, 42]
    assert preview_prompts(load("sample.prompts=[a, b]", "sample.sample_every=0")) == []  # nor encoded


def test_a_run_draws_each_at_its_size(make_config):
    config = make_config(
        "train.steps=1", "sample.sample_every=1", "sample.sample_steps=1", "sample.width=64",
        "sample.height=64", "sample.prompts=[a]", "sample.seed=1",
        "sample.samples=[{prompt: a, width: 32}, {prompt: a, width: 32, seed: 2}, {prompt: '[trigger]'}]",
    )  # fmt: skip
    train_lora(config)
    pictures = [Image.open(path) for path in sorted((config.run_dir / "samples").iterdir())]
    assert [picture.size for picture in pictures] == [(64, 64), (32, 64), (32, 64), (64, 64)]
    assert pictures[1].tobytes() != pictures[2].tobytes()  # another seed
    assert pictures[3].text["prompt"] == "sks"
