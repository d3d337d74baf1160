import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import (
    check_folder,
    linear_weights,
    load_clip,
    load_clip_tokenizer,
    load_t5,
    load_t5_tokenizer,
    load_transformer,
    load_vae,
    read_tensors,
)
from ppcoat.models.tensor_files import tensor_infos
from ppcoat.models.writing import save_tokenizer

NEW = Path(__file__).parent.parent / "fixtures" / "tiny_flux_diffusers_042"
TOLERANCE = 2e-5
SHARD = "transformer/diffusion_pytorch_model-00002-of-00004.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(fp32_folder, tmp_path):
    shutil.copytree(fp32_folder, tmp_path / "flux")
    return tmp_path / "flux"


@pytest.fixture
def sharded_copy(bf16_folder, tmp_path):
    shutil.copytree(bf16_folder, tmp_path / "flux")
    return tmp_path / "flux"


def close(tensor, reference, tolerance=TOLERANCE):
    np.testing.assert_allclose(tensor.numpy(), reference, rtol=0, atol=tolerance)


def test_text_encoders_are_those_of_transformers(pipeline, torch_refs):
    clip = pipeline.text_encoder(paddle.to_tensor(torch_refs["clip_ids"]))
    close(clip.last_hidden_state, torch_refs["clip_last"])
    close(clip.pooler_output, torch_refs["clip_pooled"])
    close(pipeline.text_encoder_2(paddle.to_tensor(torch_refs["t5_ids"]))[0], torch_refs["t5_out"])


def test_vae_is_that_of_diffusers(pipeline, torch_refs):
    posterior = pipeline.vae.encode(paddle.to_tensor(torch_refs["vae_in"])).latent_dist
    close(posterior.mean, torch_refs["vae_mean"])
    close(posterior.logvar, torch_refs["vae_logvar"])
    close(pipeline.vae.decode(paddle.to_tensor(torch_refs["vae_z"])).sample, torch_refs["vae_dec"])
    assert pipeline.vae.config.shift_factor == 0.1159


def test_tokenizers_give_the_ids_of_transformers(pipeline, torch_refs):
    prompts = [str(prompt) for prompt in torch_refs["prompts"]]
    for tokenizer, key in ((pipeline.tokenizer, "clip_ids"), (pipeline.tokenizer_2, "t5_ids")):
        length = torch_refs[key].shape[1]
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        np.testing.assert_array_equal(np.array(ids), torch_refs[key])


def test_bf16_shards_are_the_rounded_float32_weights(fp32_folder, bf16_folder):
    exact = load_transformer(fp32_folder / "transformer", "float32").state_dict()
    rounded = load_transformer(bf16_folder / "transformer", "float32").state_dict()
    for name, tensor in exact.items():
        bits = tensor.numpy().view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # round half to even
        wanted = ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
        np.testing.assert_array_equal(rounded[name].numpy(), wanted, err_msg=name)


def test_dtype_can_be_chosen(bf16_folder):
    model = load_t5(bf16_folder / "text_encoder_2", "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {paddle.bfloat16}
    assert paddle.get_default_dtype() == "float32"


def test_streaming_reads_one_tensor_at_a_time_in_paddle_layout(bf16_folder):
    infos = tensor_infos(bf16_folder / "transformer")
    model = load_transformer(bf16_folder / "transformer", "float32")
    stream = read_tensors(infos, linear_weights(model))
    name, tensor = next(stream)
    assert tensor.dtype == paddle.bfloat16
    shapes = {name: list(tensor.shape)} | {name: list(tensor.shape) for name, tensor in stream}
    assert shapes == {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def test_paddle_layout_files_are_not_transposed(copy):
    reference = load_transformer(copy / "transformer", "float32").state_dict()
    (copy / WEIGHTS).unlink()
    save_file(
        {name: tensor.numpy() for name, tensor in reference.items()},
        copy / "transformer/diffusion_paddle_model.safetensors",
        metadata={"format": "pd"},
    )
    for name, tensor in load_transformer(copy / "transformer", "float32").state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), reference[name].numpy(), err_msg=name)


def test_loading_writes_nothing(sharded_copy):
    def listing():
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sharded_copy.rglob("*")}

    for path in sharded_copy.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = listing()
    FluxPipeline.from_pretrained(sharded_copy)
    assert listing() == before


def test_check_folder_accepts_both_fixtures(fp32_folder, bf16_folder):
    check_folder(fp32_folder)
    check_folder(bf16_folder)


def test_missing_shard_is_named(sharded_copy):
    (sharded_copy / SHARD).unlink()
    with pytest.raises(ConfigError, match="diffusion_pytorch_model-00002-of-00004.safetensors is missing"):
        check_folder(sharded_copy)


def test_tensor_missing_in_its_shard_is_named(sharded_copy):
    index = sharded_copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["proj_out.weight"] = SHARD.removeprefix("transformer/")
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="proj_out.weight is missing in .*00002-of-00004"):
        check_folder(sharded_copy)


def test_index_cannot_lead_out_of_the_folder(sharded_copy):
    index = sharded_copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"proj_out.weight": "../vae/diffusion_pytorch_model.safetensors"}})
    )
    with pytest.raises(ConfigError, match="weight_map.proj_out.weight: came ../vae/"):
        check_folder(sharded_copy)


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            WEIGHTS,
            lambda t: t.update({"proj_out.weight": t["proj_out.weight"][:5]}),
            r"proj_out.weight in .*has shape \[5, 64\].*wants \[64, 64\]",
        ),
        (
            WEIGHTS,
            lambda t: t.pop("proj_out.weight"),
            r"\(1 difference\): missing proj_out.weight \[64, 64\]: take",
        ),
        (WEIGHTS, lambda t: t.update({"extra.weight": np.ones(3)}), r"unexpected extra.weight \[3\]"),
        (
            "vae/diffusion_pytorch_model.safetensors",
            lambda t: t.pop("decoder.conv_in.weight"),
            "decoder.conv_in.weight",
        ),
        ("text_encoder_2/model.safetensors", lambda t: t.pop("shared.weight"), "missing shared.weight"),
    ],
)
def test_wrong_tensors_are_named(copy, file, change, message):
    change_tensors(copy / file, change)
    with pytest.raises(ConfigError, match=message):
        FluxPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"num_layers": 1000}, "config.json: num_layers: came 1000, but the weights are of 2"),
        ("transformer", {"num_single_layers": 1}, "num_single_layers: came 1, but the weights are of 3"),
        ("transformer", {"joint_attention_dim": 2**20}, "joint_attention_dim: came 1048576"),
        ("transformer", {"guidance_embeds": False}, "guidance_embeds: came False"),
        ("transformer", {"out_channels": 2**20}, "out_channels: came 1048576"),
        ("vae", {"layers_per_block": 999}, "layers_per_block: came 999"),
        ("vae", {"latent_channels": 2**19}, "latent_channels: came 524288"),
        ("vae", {"shift_factor": None}, "config.json: shift_factor is missing: take FLUX.1's autoencoder"),
        ("text_encoder", {"vocab_size": 2**20}, "vocab_size: came 1048576"),
        ("text_encoder", {"num_hidden_layers": 1000}, "num_hidden_layers: came 1000"),
        ("text_encoder_2", {"d_ff": 2**20}, "d_ff: came 1048576"),
        ("text_encoder_2", {"num_layers": 1000}, "num_layers: came 1000"),
    ],
)
def test_sizes_beyond_the_weights_are_named_before_anything_is_built(
    copy, part, change, message, monkeypatch
):
    def built(*_, **__):
        raise AssertionError("a layer is made")

    config = copy / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    load = {
        "transformer": load_transformer,
        "vae": load_vae,
        "text_encoder": load_clip,
        "text_encoder_2": load_t5,
    }
    if part != "vae" or "is missing" not in message:
        monkeypatch.setattr(paddle.nn, "Linear", built)
        monkeypatch.setattr(paddle.nn, "Embedding", built)
        with pytest.raises(ConfigError, match=message):
            load[part](copy / part)
    with pytest.raises(ConfigError, match=message):
        check_folder(copy)


def test_integers_in_the_place_of_weights_are_named(copy):
    change_tensors(copy / WEIGHTS, lambda t: t.update({"proj_out.bias": t["proj_out.bias"].view(np.int32)}))
    with pytest.raises(ConfigError, match="proj_out.bias in .* holds I32, wanted one of F64, F32, F16, BF16"):
        check_folder(copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_weights_that_are_quantised_already_are_refused_in_one_line(copy, part):
    """As diffusers and transformers write bitsandbytes' weights: said in the config, or by names alone."""
    config = copy / part / "config.json"
    text, said = (
        config.read_text(),
        r"quantised already \(bitsandbytes\): take the model in bfloat16, FP8 or GGUF",
    )
    nf4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(text) | nf4))
    with pytest.raises(ConfigError, match=f"config.json: its weights are {said}"):
        FluxPipeline.from_pretrained(copy)
    config.write_text(text)
    weights = next((copy / part).glob("*.safetensors"))
    name = next(name for name in tensor_infos(copy / part) if name.endswith(".weight"))
    change_tensors(weights, lambda t: t.update({f"{name}.quant_state.bitsandbytes__nf4": np.ones(3)}))
    with pytest.raises(ConfigError, match=f"safetensors: its weights are {said}"):
        FluxPipeline.from_pretrained(copy)


def test_non_square_weight_that_was_not_transposed_is_refused(copy):
    change_tensors(
        copy / WEIGHTS, lambda t: t.update({"norm_out.linear.weight": t["norm_out.linear.weight"].T.copy()})
    )
    with pytest.raises(ConfigError, match=r"norm_out.linear.weight.*\[64, 128\].*wants \[128, 64\]"):
        check_folder(copy)


def test_cut_off_file_is_named(copy):
    file = copy / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="diffusion_pytorch_model.safetensors has .* bytes"):
        check_folder(copy)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{x"])
def test_garbage_instead_of_safetensors_is_named(copy, content):
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError, match="diffusion_pytorch_model.safetensors"):
        check_folder(copy)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae", "text_encoder/config.json", "tokenizer/merges.txt"]
)
def test_missing_parts_are_named(copy, name):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ConfigError, match=name):
        check_folder(copy)


@pytest.fixture(scope="module")
def new_folder(fp32_folder, tmp_path_factory):
    """The reference model as diffusers 0.42 with transformers 5 writes it: tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("models") / "flux"
    shutil.copytree(NEW, folder)
    for file in fp32_folder.rglob("*.safetensors"):
        (folder / file.relative_to(fp32_folder)).symlink_to(file)
    return folder


@pytest.mark.parametrize(
    ("part", "load", "length"),
    [("tokenizer", load_clip_tokenizer, 77), ("tokenizer_2", load_t5_tokenizer, 512)],
)
def test_tokenizer_json_alone_gives_the_ids_of_transformers(new_folder, part, load, length):
    wanted = json.loads((NEW / "token_ids.json").read_text(encoding="utf-8"))
    tokenizer = load(new_folder / part)
    ids = tokenizer(wanted["texts"], padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ids == wanted[part]
    assert tokenizer.model_max_length == length


@pytest.mark.parametrize("named", [{"content": "<pad>", "lstrip": False}, None])
def test_what_a_tokenizer_config_does_not_say_is_as_in_flux(new_folder, tmp_path, named):
    shutil.copyfile(new_folder / "tokenizer_2/tokenizer.json", tmp_path / "tokenizer.json")
    if named:
        config = {"pad_token": named, "model_max_length": 10**30}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_t5_tokenizer(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 512)


def test_a_folder_of_diffusers_042_draws_and_its_tokenizers_are_written_again(
    new_folder, torch_refs, tmp_path
):
    pipeline = FluxPipeline.from_pretrained(new_folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [str(prompt) for prompt in torch_refs["prompts"]]
    latents = paddle.to_tensor(torch_refs["pipe_lat"])
    drawn = pipeline(prompts, None, 64, 64, 1, latents=latents, max_sequence_length=64, output_type="latent")
    close(drawn.images, torch_refs["pipe_latent_1"])
    for part in ("tokenizer", "tokenizer_2"):
        (tmp_path / part).mkdir()
        save_tokenizer(getattr(pipeline, part), tmp_path / part)
        written = {file.name: file.read_bytes() for file in (tmp_path / part).iterdir()}
        assert written == {file.name: file.read_bytes() for file in (NEW / part).iterdir()}


def test_a_tokenizer_without_its_files_is_named(copy):
    for name in ("spiece.model", "tokenizer.json"):
        (copy / "tokenizer_2" / name).unlink()
    with pytest.raises(ConfigError, match=r"spiece.model is missing, and tokenizer.json"):
        check_folder(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no vocabulary"),
        ("<html>", "not valid JSON"),
        (
            '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
            "has no <pad>, the pad_token",
        ),
    ],
)
def test_a_damaged_tokenizer_json_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_t5_tokenizer(tmp_path)


def to_variant(folder, variant):
    """All weights of a pipeline's folder under the names that diffusers and transformers give a variant."""
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.index.json")]:
        if file.suffix == ".json":
            content = json.loads(file.read_text())
            content["weight_map"] = {k: variant_of(v, variant) for k, v in content["weight_map"].items()}
            file.write_text(json.dumps(content))
        file.rename(file.with_name(variant_of(file.name, variant)))


def variant_of(name, variant):
    stem, dot, rest = name.partition(".")
    if rest.endswith("json"):
        return f"{stem}.safetensors.index.{variant}.json"
    base, shard, number = stem.partition("-0")
    return f"{base}.{variant}{shard}{number}{dot}{rest}"


def test_the_only_variant_is_read_and_told(sharded_copy, bf16_folder, caplog):
    to_variant(sharded_copy, "bf16")
    assert (sharded_copy / "transformer/diffusion_pytorch_model.safetensors.index.bf16.json").is_file()
    assert (sharded_copy / "transformer/diffusion_pytorch_model.bf16-00001-of-00004.safetensors").is_file()
    check_folder(sharded_copy)
    check_folder(sharded_copy)
    (told,) = caplog.messages
    parts = "text_encoder, text_encoder_2, transformer, vae"
    assert told.endswith(f": the bf16 files of {parts} are read, for there are no plain ones")
    got, wanted = (load_transformer(each / "transformer") for each in (sharded_copy, bf16_folder))
    for name, tensor in wanted.state_dict().items():
        np.testing.assert_array_equal(got.state_dict()[name].numpy(), tensor.numpy(), err_msg=name)


def test_a_variant_that_is_asked_for_is_read_before_plain_files(copy, caplog):
    biases = {
        "transformer": ("diffusion_pytorch_model", "proj_out.bias"),
        "vae": ("diffusion_pytorch_model", "decoder.conv_in.bias"),
        "text_encoder": ("model", "text_model.final_layer_norm.bias"),
        "text_encoder_2": ("model", "encoder.final_layer_norm.weight"),
    }
    wanted = {}
    for i, (part, (stem, name)) in enumerate(biases.items()):
        tensors = load_file(copy / part / f"{stem}.safetensors")
        tensors[name] = wanted[part] = np.full_like(tensors[name], i + 0.5, dtype="float16")
        save_file(tensors, copy / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    pipeline = FluxPipeline.from_pretrained(copy, variant="fp16")
    assert caplog.messages == []
    for part, (_, name) in biases.items():
        np.testing.assert_array_equal(getattr(pipeline, part).state_dict()[name].numpy(), wanted[part])
    transformer = FluxTransformer2DModel.from_pretrained(copy, "transformer", "float32", variant="fp16")
    np.testing.assert_array_equal(transformer.proj_out.bias.numpy(), wanted["transformer"])
    assert np.any(load_transformer(copy / "transformer").proj_out.bias.numpy() != wanted["transformer"])

    (copy / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    check_folder(copy, variant="fp16")
    (told,) = caplog.messages
    assert told.endswith("flux: the plain files of vae are read, for there are no fp16 ones")
    with pytest.raises(ConfigError, match="variant: came 'bf16', but .*flux has no such files; leave it out"):
        FluxPipeline.from_pretrained(copy, variant="bf16")


def test_one_of_several_variants_is_not_guessed(copy):
    file = copy / "text_encoder/model.safetensors"
    shutil.copyfile(file, file.with_name("model.fp16.safetensors"))
    file.rename(file.with_name("model.bf16.safetensors"))
    with pytest.raises(ConfigError, match=r"variant bf16, fp16, but no plain ones: give variant"):
        check_folder(copy)


def test_weights_that_are_no_safetensors_are_named(copy):
    (copy / "text_encoder/model.safetensors").rename(copy / "text_encoder/pytorch_model.bin")
    with pytest.raises(ConfigError, match="no weights: .*; pytorch_model.bin is not read: save the model as"):
        check_folder(copy)


def test_another_pipeline_is_refused(copy):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ConfigError, match="StableDiffusionPipeline"):
        check_folder(copy)


def test_all_differences_are_counted_and_a_few_of_each_kind_are_named(copy):
    def rename(tensors):
        for name in [name for name in tensors if name.startswith("single_transformer_blocks.")][:9]:
            tensors[f"{name}_of_another_model"] = tensors.pop(name)

    change_tensors(copy / WEIGHTS, rename)
    with pytest.raises(ConfigError, match=r"\(18 differences\)") as error:
        load_transformer(copy / "transformer")
    message = str(error.value)
    assert message.count("missing single_") == message.count("unexpected single_") == 4
    assert "5 more missing; 5 more unexpected" in message
