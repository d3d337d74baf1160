"""Adapter directories and ComfyUI files: what the original wrote is read right, what we write is its twin."""

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.lora import adapter_layers, load_lora, read_lora_file, remove_lora, save_comfyui, save_peft
from ppcoat.models.newbie.files import load_nextdit

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5
KINDS = ("lora", "lokr_full", "lokr_lowrank")
NO_DORA = '{"r": 4, "lora_alpha": 8, "use_dora": true}'


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs, np.load(FOLDER / "adapter_refs.npz") as adapters:
        return dict(refs) | dict(adapters)


@pytest.fixture(scope="module")
def whole():
    return load_nextdit(FOLDER / "transformer", "float32")


@pytest.fixture
def model(whole):
    yield whole
    remove_lora(whole)


def outputs(model, refs):
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    with paddle.no_grad():
        return model(*[paddle.to_tensor(refs[name][:2]) for name in names]).numpy()


def header(file):
    with safe_open(str(file), framework="np") as opened:
        return opened.metadata()


@pytest.mark.parametrize("kind", KINDS)
def test_written_directories_and_files_are_those_of_the_original_and_give_its_outputs(
    model, refs, tmp_path, kind
):
    """alpha is 2 x rank in "lora": a loader that takes the scale for 1 is far off."""
    info = load_lora(model, FOLDER / kind)
    assert len(info.ranks) == 20
    want = refs[f"{kind}_b2_out"]
    np.testing.assert_allclose(outputs(model, refs), want, rtol=0, atol=TOLERANCE)
    original = load_file(FOLDER / kind / "adapter_model.safetensors")
    targets = json.loads((FOLDER / "lora/adapter_config.json").read_text())["target_modules"]
    save_peft(tmp_path / kind, model, targets)
    save_comfyui(tmp_path / "comfy.safetensors", model)
    written = load_file(tmp_path / kind / "adapter_model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    config, theirs = (json.loads((folder / "adapter_config.json").read_text())
                      for folder in (tmp_path / kind, FOLDER / kind))  # fmt: skip
    assert config == theirs
    assert {"lora_rank", "lora_alpha"} <= header(tmp_path / kind / "adapter_model.safetensors").keys()
    for source in (
        tmp_path / kind,
        tmp_path / kind / "adapter_model.safetensors",
        tmp_path / "comfy.safetensors",
    ):
        load_lora(model, source)
        np.testing.assert_allclose(outputs(model, refs), want, rtol=0, atol=TOLERANCE, err_msg=str(source))


def test_the_comfyui_file_has_its_strength_in_the_weights(model, tmp_path):
    load_lora(model, FOLDER / "lora")
    save_comfyui(tmp_path / "comfy.safetensors", model)
    found, theirs = (
        load_file(tmp_path / "comfy.safetensors"),
        load_file(FOLDER / "lora/adapter_model.safetensors"),
    )
    assert (
        header(tmp_path / "comfy.safetensors")["lora_rank"]
        == header(tmp_path / "comfy.safetensors")["lora_alpha"]
    )
    assert not any(name.endswith(".alpha") for name in found)
    for path in adapter_layers(model):
        up, down = (found[f"diffusion_model.{path}.lora_{side}.weight"] for side in ("up", "down"))
        a, b = (theirs[f"base_model.model.{path}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        np.testing.assert_allclose(up @ down, 2 * b @ a, atol=1e-5)


def test_rslora_divides_by_the_root_of_the_rank(model, refs, tmp_path):
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "rs")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": 4}))
    load_lora(model, folder)  # 4 / sqrt(4) is the 8 / 4 of the fixture
    np.testing.assert_allclose(outputs(model, refs), refs["lora_b2_out"], rtol=0, atol=TOLERANCE)


def test_strength_and_replacement(model, refs):
    base = outputs(model, refs)
    load_lora(model, FOLDER / "lokr_full", 0.0)
    np.testing.assert_allclose(outputs(model, refs), base, atol=1e-6)
    load_lora(model, FOLDER / "lora", 0.0)
    np.testing.assert_allclose(outputs(model, refs), base, atol=1e-6)
    load_lora(model, FOLDER / "lokr_lowrank")
    np.testing.assert_allclose(outputs(model, refs), refs["lokr_lowrank_b2_out"], rtol=0, atol=TOLERANCE)


def test_mistakes_are_named_and_change_nothing(model, tmp_path):
    with pytest.raises(ConfigError, match="no LoRA file at"):
        load_lora(model, tmp_path / "nothing")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pickle"):
        read_lora_file(tmp_path / "a.pt")
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "lora")
    for text, part in (("{", "cannot be read"), ("{}", "lacks r and lora_alpha"),
                        (NO_DORA, "says DoRA, .* no magnitudes")):  # fmt: skip
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match=part):
            load_lora(model, folder)
    tensors = load_file(FOLDER / "lokr_full/adapter_model.safetensors")
    save_file(
        {name.replace("layers_1", "layers_9"): value for name, value in tensors.items()},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ConfigError, match="name nothing that this model has.*lycoris_layers_9"):
        load_lora(model, tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"\x12not whole\xff")
    with pytest.raises(ConfigError, match="is not a whole safetensors"):
        load_lora(model, tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="no LoRA or LoKr to save"):
        save_peft(tmp_path / "d", model, [])
    assert not adapter_layers(model)
