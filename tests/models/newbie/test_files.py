import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import (
    check_newbie_folder,
    load_gemma3,
    load_jina_clip,
    load_newbie_vae,
    load_nextdit,
)

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
ROBERTA = "text_model.transformer.roberta."
PARAMETRIZED = ".parametrizations.weight."
WEIGHTS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "clip_model": "model"}


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "newbie"))


def change_weights(folder, part, change):
    """change(tensors) -> tensors, on the file of one part."""
    file = folder / part / f"{WEIGHTS[part]}.safetensors"
    save_file(change(load_file(file)), file)


def change_config(folder, part, change):
    file = folder / part / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def folded_in_numpy(tensors, scale):
    """Name (after ROBERTA, torch layout) -> float64 weights with their LoRA folded."""
    folded = {}
    for name, tensor in tensors.items():
        if not name.startswith(ROBERTA) or "lora_" in name:
            continue
        if not name.endswith(f"{PARAMETRIZED}original"):
            folded[name.removeprefix(ROBERTA)] = tensor
            continue
        layer = name.removesuffix(f"{PARAMETRIZED}original")
        a, b = (tensors[f"{layer}{PARAMETRIZED}0.lora_{x}"][0].astype("float64") for x in "AB")
        delta = a @ b if "embeddings" in name else b @ a
        folded[f"{layer.removeprefix(ROBERTA)}.weight"] = tensor + scale * delta
    return folded


def test_the_fixture_is_whole():
    check_newbie_folder(FOLDER)


@pytest.mark.parametrize("alpha", [4, 1, 8])
def test_task_lora_is_folded_with_the_scale_of_the_config(copy, alpha):
    def set_alpha(config):
        config["text_config"]["hf_model_config_kwargs"]["lora_alpha"] = alpha

    change_config(copy, "clip_model", set_alpha)
    wanted = folded_in_numpy(load_file(copy / "clip_model" / "model.safetensors"), alpha / 4)
    parameters = load_jina_clip(copy / "clip_model", "float32").state_dict()
    assert parameters.keys() == wanted.keys()
    for name, parameter in parameters.items():
        is_linear = parameter.ndim == 2 and "embeddings" not in name
        layout = wanted[name].T if is_linear else wanted[name]
        np.testing.assert_allclose(parameter.numpy(), layout, rtol=0, atol=1e-6, err_msg=name)


def test_a_file_folded_by_others_loads_as_it_is(copy):
    ours = load_jina_clip(copy / "clip_model", "float32").state_dict()

    def fold(tensors):
        folded = folded_in_numpy(tensors, 1.0)
        return {f"model.{name}": value.astype("float32") for name, value in folded.items()}

    change_weights(copy, "clip_model", fold)
    again = load_jina_clip(copy / "clip_model", "float32").state_dict()
    for name, parameter in again.items():
        np.testing.assert_allclose(parameter.numpy(), ours[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


def test_lora_without_its_scale_is_refused(copy):
    def drop_alpha(config):
        del config["text_config"]["hf_model_config_kwargs"]["lora_alpha"]

    change_config(copy, "clip_model", drop_alpha)
    with pytest.raises(ConfigError, match="lora_alpha"):
        load_jina_clip(copy / "clip_model")


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "model.language_model."])
def test_gemma_is_found_under_every_prefix(copy, prefix):
    wanted = load_gemma3(copy / "text_encoder", "float32").state_dict()
    old = "language_model.model."
    change_weights(
        copy, "text_encoder", lambda tensors: {name.replace(old, prefix): x for name, x in tensors.items()}
    )
    found = load_gemma3(copy / "text_encoder", "float32").state_dict()
    for name, parameter in found.items():
        np.testing.assert_array_equal(parameter.numpy(), wanted[name].numpy(), err_msg=name)


def test_every_difference_is_listed_and_nothing_is_loaded(copy):
    def spoil(tensors):
        del tensors["layers.0.attention.out.weight"], tensors["norm_final.weight"]
        tensors["layers.9.attention.out.weight"] = np.zeros([2, 2], "float32")
        tensors["x_embedder.weight"] = tensors["x_embedder.weight"][:, :8]
        return tensors

    change_weights(copy, "transformer", spoil)
    for load in (lambda: load_nextdit(copy / "transformer"), lambda: check_newbie_folder(copy)):
        with pytest.raises(ConfigError, match=r"\(4 differences\)") as error:
            load()
        message = str(error.value)
        assert "\n" not in message
        for part in (
            "missing layers.0.attention.out.weight",
            "missing norm_final.weight",
            "unexpected layers.9.attention.out.weight [2, 2]",
            "x_embedder.weight in diffusion_pytorch_model.safetensors has shape [64, 8], "
            "config.json wants [64, 64]",
        ):
            assert part in message


@pytest.mark.parametrize(
    ("part", "name", "load"),
    [
        ("text_encoder", "language_model.model.layers.3.mlp.up_proj.weight", load_gemma3),
        ("clip_model", f"{ROBERTA}encoder.layers.1.mlp.fc1{PARAMETRIZED}0.lora_A", load_jina_clip),
        ("clip_model", f"{ROBERTA}encoder.layers.2.norm1.bias", load_jina_clip),
    ],
)
def test_a_missing_or_strange_tensor_of_an_encoder_is_named(copy, part, name, load):
    change_weights(
        copy, part, lambda tensors: {(f"{key}s" if key == name else key): x for key, x in tensors.items()}
    )
    with pytest.raises(ConfigError, match="2 differences") as error:
        load(copy / part)
    assert f"missing {name} [" in str(error.value) and f"unexpected {name}s [" in str(error.value)


def test_lora_of_another_rank_is_refused(copy):
    def other_rank(config):
        config["text_config"]["hf_model_config_kwargs"] |= {"lora_rank": 8}

    change_config(copy, "clip_model", other_rank)
    wanted = r"\(28 differences\).*lora_B in .*has shape \[1, 4, 32\], config.json wants \[1, 8, 32\]"
    with pytest.raises(ConfigError, match=wanted):
        load_jina_clip(copy / "clip_model")


def test_class_names_of_other_tools_are_the_same_model(copy):
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"][1], index["text_encoder"][1] = "NextDiT_CLIP", "Gemma3Model"
    (copy / "model_index.json").write_text(json.dumps(index))
    change_config(copy, "transformer", lambda config: config.update(_class_name="NextDiT_CLIP"))
    check_newbie_folder(copy)


def test_vae_factors_default_to_those_of_flux(copy):
    def drop_factors(config):
        del config["scaling_factor"], config["shift_factor"]

    change_config(copy, "vae", drop_factors)
    config = load_newbie_vae(copy / "vae").config
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)


def test_dtype_of_the_parameters():
    model = load_nextdit(FOLDER / "transformer", "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.bfloat16}
    assert not model.training


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'), "FluxPipeline"),
        (lambda f: shutil.rmtree(f / "clip_model"), "clip_model is missing"),
        (lambda f: (f / "text_encoder" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: change_config(f, "vae", lambda c: c.update(latent_channels=4)), "has 4 latent channels"),
        (lambda f: change_config(f, "transformer", lambda c: c.update(widht=3)), "lacks: widht"),
        (lambda f: change_config(f, "text_encoder", lambda c: c["text_config"].update(hidden_size=64)), "64"),
    ],
)
def test_spoilt_folders_are_refused_before_weights_are_read(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ConfigError, match=message):
        check_newbie_folder(copy)


def test_parts_of_two_models_are_refused(copy):
    change_config(copy, "transformer", lambda config: config.update(cap_feat_dim=40))

    def narrow(tensors):
        tensors["cap_embedder.0.weight"] = tensors["cap_embedder.0.weight"][:40]
        tensors["cap_embedder.1.weight"] = tensors["cap_embedder.1.weight"][:, :40].copy()
        return tensors

    change_weights(copy, "transformer", narrow)
    with pytest.raises(ConfigError, match="cap_feat_dim is 40, but Gemma3TextEncoder gives 48"):
        check_newbie_folder(copy)
