"""A LoRA run of NewBie in bfloat16 beside float32, and its previews."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pretended_gpu import PretendedGpu, bfloat16_noise, four_deviations, relative

from ppcoat.config.newbie import load_newbie_config
from ppcoat.data import garments
from ppcoat.models.newbie.pipeline import NewbiePipeline
from ppcoat.objective import NewbieFlowMatching
from ppcoat.train.run import train_lora

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny_newbie"
DRAWN = "a red dress"
SETTINGS = ["train.steps=2", f"sample.prompts=[{DRAWN}]", "sample.sample_every=2", "sample.sample_steps=2",
            "sample.skip_first_sample=false", "sample.seed=5", "coat.enabled=true",
            "coat.activation.policy=coat+recompute", "train.gradient_checkpointing=false"]  # fmt: skip


@pytest.fixture(scope="module")
def make_config(tmp_path_factory, write_newbie_run):
    """make_config(name, *settings) -> a run on four drawings whose captions are of different lengths."""
    folder = tmp_path_factory.mktemp("newbie")
    garments.write_folder(folder / "data" / "1_dress", 4, seed=1, motif="gold star", prefix="")
    (folder / "data" / "1_dress" / "0003.txt").write_text("a far longer caption than the others, " * 3)
    sections = {"Model": {"learning_rate": 1e-3}, "Optimization": {"optimizer_type": "AdamW8bit"}}
    file = write_newbie_run(folder, folder / "data", **sections)
    return lambda name, *settings: load_newbie_config(file, [f"name={name}", *SETTINGS, *settings])


def levels(picture):
    return np.asarray(picture).astype(int)


def preview(config):
    """The one before the first step: of the model as it is."""
    return levels(Image.open(min((config.run_dir / "samples").glob("*.png"))))


def by_pipeline():
    """The same picture, drawn by the whole pipeline."""
    pipeline = NewbiePipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return levels(pipeline(DRAWN, num_inference_steps=2, seed=5, height=64, width=64).images[0])


def kept_bytes(config):
    lines = (config.run_dir / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["kept_bytes"]


@pytest.mark.slow
def test_a_run_has_float32s_losses_and_its_previews_are_the_pipelines(
    make_config, noise_felt, assert_as_on_a_gpu, monkeypatch
):
    """Previews and the whole pipeline go different ways (captions from a cache, two batches) and draw the
    same picture. What differs from float32's is what rounding explains: with a random model and guidance 5,
    some ten levels of 255."""
    explained, exact = [], make_config("exact")
    with monkeypatch.context() as patch:
        noise_felt(patch, NewbieFlowMatching, explained)
        wanted = train_lora(exact).losses
    config = make_config("half")
    with PretendedGpu() as gpu:
        found = train_lora(config).losses
        whole = by_pipeline()
    assert_as_on_a_gpu(gpu, "norm_kernel", "rms_norm_rotated_kernel", "activation_kernel", "quantize_kernel",
                       "rms_norm_rotated_grad_kernel", "adamw_kernel")  # fmt: skip
    assert 0 < relative(found, wanted) < four_deviations(explained)
    assert kept_bytes(config) < kept_bytes(exact)
    assert np.abs(preview(config) - whole).max() <= 1
    assert np.abs(preview(exact) - by_pipeline()).max() <= 1
    with bfloat16_noise(0):
        noisy = by_pipeline()
    by_rounding, by_noise = (np.abs(x - preview(exact)).mean() for x in (whole, noisy))
    assert 0.5 < by_rounding / by_noise < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["coat.enabled=false"],
        [
            "coat.activation.policy=coat+recompute+attention",
            "model.quantize=true",
            "model.quantize_matmul=true",
        ],
        ["train.gradient_checkpointing=true", "coat.activation.policy=coat", "network.dropout=0.1"],
        ["network.type=lokr", "coat.enabled=false"],
        ["model.quantize=true", "model.blocks_to_swap=2"],
    ],
    ids=lambda settings: settings[0],
)
def test_other_settings(make_config, noise_felt, assert_as_on_a_gpu, monkeypatch, settings):
    explained, name = [], re.sub(r"\W", "", "".join(settings))
    with monkeypatch.context() as patch:
        noise_felt(patch, NewbieFlowMatching, explained)
        wanted = train_lora(make_config(name, *settings)).losses
    with PretendedGpu() as gpu:
        found = train_lora(make_config(f"half{name}", *settings)).losses
    assert_as_on_a_gpu(gpu)
    assert 0 < relative(found, wanted) < four_deviations(explained)
