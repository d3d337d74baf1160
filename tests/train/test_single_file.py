"""Runs on a base that is one file: the losses of the same weights in a folder, copies in FP8, resuming."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.nn.base_weight import FP8Weight
from ppcoat.plan.phases import MemoryModel
from ppcoat.plan.settings import plan
from ppcoat.train.base_model import base_identity
from ppcoat.train.flux import FluxSpec
from ppcoat.train.newbie import NewbieSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import train_lora

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, FULL = FIXTURES / "single_file", FIXTURES / "tiny_flux_fp32"
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name.startswith(("flux_", "comfy_")))
FEW = [f"flux_{kind}" for kind in ("bfl_bf16.safetensors", "bfl_fp8_scaled.safetensors",
                                   "bfl_fp8_comfy_quant.safetensors", "Q4_0.gguf")]  # fmt: skip
COMFY = "comfy_all_in_one_fp8.safetensors"


def on(file, *others):
    """Settings of a run on this file; a folder has what it lacks."""
    where = "tokenizers" if Path(file).name == COMFY else "text_encoders"
    return [f"model.name_or_path={FOLDER / file}", f"model.{where}={FULL}", "train.steps=1", *others]


@pytest.mark.parametrize("files", [FEW, pytest.param(FILES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_the_loss_on_a_file_is_that_of_the_same_weights_in_a_folder(make_config, tmp_path, files):
    losses = {}
    for file in files:
        config = make_config(f"name={file.partition('.')[0]}", *on(file))
        losses[file] = train_lora(config).losses[0]
        assert (config.run_dir / f"{config.name}.safetensors").is_file()
    folder = tmp_path / "flux"
    shutil.copytree(FULL, folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(FOLDER / "transformer", folder / "transformer")
    plain = train_lora(make_config(f"model.name_or_path={folder}", "train.steps=1")).losses[0]
    assert losses["flux_bfl_bf16.safetensors"] == plain
    same = [losses[f"flux_bfl_fp8_{kind}.safetensors"] for kind in ("scaled", "comfy_quant")]
    assert same[0] == same[1] != plain
    assert len(set(losses.values())) == len(files) - 1
    assert max(abs(loss / plain - 1) for loss in losses.values()) < 0.05


def test_with_quantize_a_copy_is_kept_beside_the_file(make_config, monkeypatch, tmp_path):
    place = shutil.copy(FOLDER / "flux_Q8_0.gguf", tmp_path / "flux.gguf")
    config = make_config(*on(place, "model.quantize=true", "model.quantized_beside_model=true"))

    def loaded():
        pipeline = FluxSpec().load_encoders(config, "float32")
        FluxSpec().load_base(pipeline, config, "float32", Ranks())
        return pipeline.transformer

    first = loaded()
    assert sum(isinstance(layer, FP8Weight) for layer in first.sublayers()) == 44
    assert list((tmp_path / "flux.gguf-transformer-fp8").glob("*.safetensors"))
    monkeypatch.setattr(
        "ppcoat.models.quantized_base.quantised_tensors", lambda *_: pytest.fail("quantised a second time")
    )
    for name, value in loaded().state_dict().items():
        np.testing.assert_array_equal(value.numpy(), first.state_dict()[name].numpy(), err_msg=name)


def test_a_file_is_known_by_its_content_wherever_it_lies(make_config, tmp_path):
    file = tmp_path / "model.safetensors"
    shutil.copy(FOLDER / "flux_bfl_bf16.safetensors", file)
    assert train_lora(make_config(*on(file))).losses
    moved = tmp_path / "elsewhere" / "flux.safetensors"
    moved.parent.mkdir()
    shutil.move(file, moved)
    assert len(train_lora(make_config(*on(moved, "train.steps=2"))).losses) == 1
    tensors = load_file(moved)
    tensors["img_in.weight"] = 2 * tensors["img_in.weight"]
    save_file(tensors, moved)
    with pytest.raises(ConfigError, match="the weights of the base model are not those that the checkpoint"):
        train_lora(make_config(*on(moved, "train.steps=3")))
    assert base_identity(moved) != base_identity(FOLDER / "flux_bfl_bf16.safetensors")


def test_a_plan_is_that_of_the_folder(make_config, tmp_path):
    folder = tmp_path / "flux"
    shutil.copytree(FULL, folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(FOLDER / "transformer", folder / "transformer")
    of_folder, of_file = (make_config(*changes) for changes in ([f"model.name_or_path={folder}"], on(COMFY)))
    stored = sum(tensor.size for tensor in load_file(FOLDER / "flux_bfl_bf16.safetensors").values())
    vae = [t.size for name, t in load_file(FOLDER / COMFY).items() if name.startswith("vae.")]
    model = MemoryModel(of_file, on_gpu=True).model
    assert (model.parameters, model.encoders.vae) == (stored, sum(vae))
    assert plan(of_file, MemoryModel).phases == plan(of_folder, MemoryModel).phases


def test_what_is_missing_stops_a_run_before_anything_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr(FluxSpec, "load_encoders", lambda *_: pytest.fail("loaded"))
    config = make_config(f"model.name_or_path={FOLDER / FILES[1]}", f"model.vae={FULL}/vae")
    with pytest.raises(
        ConfigError, match="but no text_encoder, .*: set model.text_encoders .*; model.tokenizers"
    ):
        train_lora(config)
    config = make_config("model.family=newbie", f"model.vae={FULL}/vae")
    with pytest.raises(ConfigError, match="model.vae is FLUX's: leave it out for model.family newbie"):
        NewbieSpec().check(config)
