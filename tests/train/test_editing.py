"""Whole runs on references and masks: what the original code computes, whatever a block saves and however the
base is stored, exact resume, previews, the LoRA's header, and refusals in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from safetensors import safe_open

from ppcoat.errors import ConfigError
from ppcoat.models.flux.files import FluxFiles
from ppcoat.objective import FlowMatching
from ppcoat.plan.phases import MemoryModel
from ppcoat.plan.settings import as_given
from ppcoat.train.editing import fields_of_references
from ppcoat.train.flux import FluxSpec
from ppcoat.train.run import check_inputs, dry_run, encode_dataset, train_lora

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS = ["references", pytest.param("fill", marks=pytest.mark.slow)]
PAIRS = ["datasets.0.control_path=before", "datasets.0.mask_path=masks", "datasets.0.mask_min_value=0.1"]


@pytest.fixture
def pairs(make_config, tmp_path, monkeypatch):
    """pairs(...) -> a run whose drawings have inverted copies in `before`, all but one, and round masks."""
    for folder in ("before", "masks"):
        (tmp_path / folder).mkdir()
    for path in sorted((tmp_path / "data").glob("*.png")):
        ImageOps.invert(Image.open(path).convert("RGB")).save(tmp_path / "before" / path.name)
        mask = Image.new("L", (64, 64), 0)
        ImageDraw.Draw(mask).ellipse((16, 16, 48, 48), fill=255)
        mask.save(tmp_path / "masks" / path.name)
    (tmp_path / "before/0003.png").unlink()
    monkeypatch.chdir(tmp_path)
    return lambda *overrides, only=PAIRS: make_config(*only, *overrides)


@pytest.fixture
def fill(pairs, tmp_path):
    """fill(...) -> a run on the small Fill transformer with masks only."""
    folder = tmp_path / "fill"
    shutil.copytree(
        FIXTURES / "tiny_flux_fp32", folder, ignore=shutil.ignore_patterns("transformer", "*.npz")
    )
    (folder / "transformer").symlink_to(FIXTURES / "fill/transformer")
    return lambda *more: pairs(f"model.name_or_path={folder}", "datasets.0.mask_path=masks", *more, only=())


def log(config):
    return [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]


def header(file):
    with safe_open(str(file), framework="np") as opened:
        return opened.metadata()


def test_from_files_to_the_loss_as_the_original_code(make_config, tmp_path):
    """Its pictures written to disk, each reference at its own size."""
    with np.load(FIXTURES / "kontext/training.npz") as found:
        start = "train_own_size/"
        refs = {key.removeprefix(start): found[key] for key in found.files if key.startswith(start)}
    shutil.rmtree(tmp_path / "data")
    for folder, name in (("data", "target_pixels"), ("before", "ref_pixels")):
        (tmp_path / folder).mkdir()
        for number, pixels in enumerate(refs[name]):
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    for number, prompt in enumerate(refs["prompts"]):
        (tmp_path / f"data/{number}.txt").write_text(str(prompt))
    config = make_config(
        f"datasets.0.control_path={tmp_path}/before",
        "datasets.0.full_size_control_images=false",
        "datasets.0.resolution=48",
        "trigger_word=null",
        "train.max_sequence_length=24",
        "train.cfg_scale=3.5",
    )
    spec = FluxSpec()
    inputs = check_inputs(spec, config)
    pipeline = spec.load_encoders(config, inputs.dtype)
    cache = encode_dataset(spec, config, inputs.examples, pipeline)
    batch = cache.batch([0, 1], np.random.default_rng(0))
    for name, key in (("latents", "x0"), ("reference_0", "ref_latents"), ("prompt_embeds", "t5")):
        np.testing.assert_allclose(batch[name].numpy(), refs[key], rtol=0, atol=2e-5)
    spec.load_base(pipeline, config, inputs.dtype, inputs.ranks)
    objective = spec.objective(config)
    assert isinstance(objective, FlowMatching) and objective.guidance == refs["guidance"]
    b, c, h, w = refs["noise"].shape
    noise = (
        refs["noise"].reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)
    )
    loss = objective.losses_at(pipeline.transformer, batch, refs["t"], noise).mean
    assert float(loss) == pytest.approx(float(refs["loss"]), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_the_same_whatever_a_block_saves(pairs, fill, kind):
    """The LoRA's second factor is zero, so the forward pass is that of the base; gradients differ by what FP8
    rounds. What is saved is what the plan counts, but for the few values beside the blocks."""
    make = pairs if kind == "references" else fill
    steps = {}
    for name, settings in {
        "none": ["coat.enabled=false"],
        "coat": [],
        "all": [
            "coat.activation.policy=coat+recompute+attention",
            "train.gradient_checkpointing=true",
            "coat.memory.checkpoint_blocks=2",
        ],
    }.items():
        config = make(*settings)
        steps[name] = next(iter(dry_run(config)))[0]
        if name == "coat":
            memory = MemoryModel(config, on_gpu=False)
            kept = memory.activations(as_given(config, len(memory.model.blocks)))[0]
            assert steps[name].saved.bytes_kept == pytest.approx(kept, rel=0.08)
    plain = steps.pop("none")
    for step in steps.values():
        assert step.loss == plain.loss and step.grad_norm == pytest.approx(plain.grad_norm, rel=0.1)


@pytest.mark.slow  # in FP8 the published Kontext file trains on pairs, in test_ai_toolkit_run.py
@pytest.mark.parametrize("base", ["nf4", "fp8"])
def test_a_quantised_base_sees_references_too(pairs, base):
    plain, quantised = (
        next(iter(dry_run(pairs(*more))))[0].loss for more in ([], [f"model.quantize={base}"])
    )
    assert quantised == pytest.approx(plain, rel=0.05) and quantised != plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(pairs, fill, stopped_in, kind):
    common = ["train.steps=2", "save.save_every=1", "datasets.0.flip_x=true", "datasets.0.cache_to_disk=true",
              "datasets.0.caption_dropout_rate=0.3", "datasets.0.full_size_control_images=false",
              "train.diff_output_preservation=true"]  # fmt: skip
    make = pairs if kind == "references" else fill
    whole, halves = make("name=whole", *common), make("name=halves", *common)
    train_lora(whole)
    stopped_in(1, train_lora, halves)
    train_lora(halves)
    assert log(whole) == log(halves) and log(whole)[-1]["preservation_loss"] > 0
    manifests = [json.loads((run.run_dir / "checkpoints/000000002/manifest.json").read_text())
                 for run in (whole, halves)]  # fmt: skip
    assert manifests[0] == manifests[1]


def test_a_lora_of_kontext_says_so_and_its_previews_are_drawn_after_references(pairs, tmp_path):
    shapes = "width: 64, height: 48, sample_steps: 1"
    config = pairs(
        "model.arch=flux_kontext",
        "train.steps=1",
        "sample.sample_every=1",
        f"sample.samples=[{{prompt: a, {shapes}}}, {{prompt: a --ctrl_img before/0000.png, {shapes}}}, "
        f"{{prompt: a --ctrl_img before/0000.png --ctrl_img_1 before/0001.png, {shapes}}}]",
    )
    fields = header(train_lora(config).lora_file)
    assert fields["ss_base_model_version"] == "flux.1_kontext" and fields["references"] == "1"
    pictures = [Image.open(path) for path in sorted((config.run_dir / "samples").iterdir())]
    assert [picture.size for picture in pictures] == [(64, 48)] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3


def test_a_folder_of_kontext_is_known_without_a_setting(pairs, tmp_path):
    (tmp_path / "transformer").mkdir()
    config, files = pairs(), FluxFiles.found(tmp_path)
    for name, wanted in (("FluxPipeline", None), ("FluxKontextPipeline", "flux.1_kontext")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        fields = fields_of_references(config, files)
        assert fields.get("ss_base_model_version") == wanted and fields["references"] == "1"


def test_a_fill_model_draws_its_preview_in_a_picture(fill):
    sample = "[{prompt: a, ctrl_img: before/0000.png, mask_img: masks/0000.png, width: 64, height: 64}]"
    config = fill(
        "train.steps=1", "sample.sample_every=1", f"sample.samples={sample}", "sample.sample_steps=1"
    )
    assert header(train_lora(config).lora_file)["step"] == "1"
    assert Image.open(config.run_dir / "samples/000000001_00.png").size == (64, 64)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["datasets.0.mask_path=null"], "is a Fill model, which paints masks anew: datasets.0 has none"),
        (["datasets.0.control_path=before"], "which is shown no references: leave datasets.0.control_path"),
        (["datasets.0.mask_min_value=0.1"], "whose masks do not weigh the loss: leave datasets.0.mask_"),
        (["model.arch=flux_kontext"], "and model.arch says flux_kontext: leave that out"),
        (["train.validation.folder_path=data"], "pictures of train.validation have no masks: leave that out"),
        (["sample.sample_every=1", "sample.prompts=[a]"], "a Fill model draws in a picture what a mask"),
        (["datasets.0.mask_path=few"], "a Fill model paints masks anew, and 5 pictures have none: 0001.png, "
         "0002.png, 0003.png, 0004.png, 0005.png; draw their masks"),
    ],
)  # fmt: skip
def test_what_a_fill_model_cannot_do_is_told_in_one_line(fill, tmp_path, overrides, part):
    (tmp_path / "few").mkdir()
    shutil.copy(tmp_path / "masks/0000.png", tmp_path / "few")
    with pytest.raises(ConfigError) as caught:
        check_inputs(FluxSpec(), fill(*overrides))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "part"),
    [
        ("{prompt: a, ctrl_img: none.png}", "preview 'a': its reference none.png: the picture cannot be"),
        (
            "{prompt: a, mask_img: masks/0000.png}",
            "preview 'a': mask_img is for a Fill model, which this one",
        ),
    ],
)
def test_previews_that_cannot_be_drawn_are_told_before_anything_is_loaded(pairs, sample, part):
    with pytest.raises(ConfigError, match=part):
        check_inputs(FluxSpec(), pairs("sample.sample_every=1", f"sample.samples=[{sample}]"))
