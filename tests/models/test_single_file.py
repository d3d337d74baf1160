"""FLUX in one file, against what diffusers and the gguf package read from the same files."""

import json
import logging
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.errors import ConfigError
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.original_names import told_config
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import check_folder, load_component, load_transformer
from ppcoat.models.quantized_base import load_quantized_transformer
from ppcoat.models.single_file import components_in
from ppcoat.models.tensor_files import TensorInfo, map_tensor, read_header, rows_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, FULL = FIXTURES / "single_file", FIXTURES / "tiny_flux_fp32"
ALL_IN_ONE, BF16 = FOLDER / "comfy_all_in_one_fp8.safetensors", FOLDER / "flux_bfl_bf16.safetensors"
SCALED = FOLDER / "flux_bfl_fp8_scaled.safetensors"
# file -> the group of refs.npz that has its values
TRANSFORMERS = {
    "flux_bfl_bf16.safetensors": "bfl",
    "transformer/diffusion_pytorch_model.safetensors": "bfl",
    "flux_bfl_fp8_e4m3.safetensors": "fp8_e4m3",
    "flux_bfl_fp8_scaled.safetensors": "fp8_scaled",
    "flux_bfl_fp8_comfy_quant.safetensors": "fp8_scaled",
    "flux_Q8_0.gguf": "Q8_0",
    "flux_Q4_0.gguf": "Q4_0",
    "comfy_all_in_one_fp8.safetensors": "fp8_e4m3",
}
PARTS = {"vae": "aio_vae", "text_encoder": "aio_clip", "text_encoder_2": "aio_t5"}


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs:
        return dict(refs)


def values(info):
    found = map_tensor(info)
    return found.view(ml_dtypes.bfloat16).astype(np.float32) if found.dtype == np.uint16 else found


def saved(path, tensors, **metadata):
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata or None
    )
    return path


def is_group(infos, refs, group):
    assert sorted(infos) == sorted(refs[f"{group}/names"].tolist())
    for name, total, probe in zip(
        *(refs[f"{group}/{key}"] for key in ("names", "sum", "probe")), strict=True
    ):
        matrix = values(infos[name]).astype(np.float64)
        matrix = matrix.reshape(len(matrix), -1)
        rows, columns = (np.arange(side) for side in matrix.shape)
        got = np.cos(0.7 * rows + 0.2) @ matrix @ np.cos(1.3 * columns + 0.5)
        assert got == pytest.approx(probe, abs=1e-9) and matrix.sum() == pytest.approx(total, abs=1e-9), name
    for name in ("transformer_blocks.1.attn.to_k", "single_transformer_blocks.0.proj_mlp", "norm_out.linear"):
        if f"{group}/full/{name}.weight" in refs:
            np.testing.assert_array_equal(
                values(infos[f"{name}.weight"]), refs[f"{group}/full/{name}.weight"]
            )


@pytest.mark.parametrize(("file", "group"), TRANSFORMERS.items())
def test_every_weight_of_a_transformer_is_the_one_that_the_programs_read(refs, file, group):
    is_group(components_in(FOLDER / file, [FOLDER])["transformer"].tensors, refs, group)


@pytest.mark.parametrize(("part", "group"), PARTS.items())
def test_every_weight_of_encoders_and_autoencoder_is(refs, part, group):
    is_group(components_in(ALL_IN_ONE, [FULL])[part].tensors, refs, group)


@pytest.mark.parametrize("file", TRANSFORMERS)
def test_a_forward_pass_is_that_of_diffusers(refs, file):
    group = TRANSFORMERS[file]
    model = load_transformer(FluxFiles.found(FOLDER / file)["transformer"], "float32")
    inputs = {name: paddle.to_tensor(refs[key]) for name, key in (
        ("hidden_states", "hidden"), ("encoder_hidden_states", "t5"), ("pooled_projections", "clip"),
        ("timestep", "t"), ("guidance", "guidance"), ("img_ids", "img_ids"))}  # fmt: skip
    with paddle.no_grad():
        out = model(**inputs, txt_ids=paddle.zeros([7, 3])).sample
    wanted = refs["out" if group == "bfl" else f"{group}/out"]
    np.testing.assert_allclose(out.numpy(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_fp8_code_has_its_value(tmp_path, dtype):
    codes = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, dtype))
    file = saved(tmp_path / "codes.safetensors", {"a": codes.reshape(16, 16)})
    np.testing.assert_array_equal(values(read_header(file)["a"]).ravel(), codes.astype(np.float32))


@pytest.mark.parametrize(
    "file", ["flux_bfl_bf16.safetensors", "flux_bfl_fp8_scaled.safetensors", "flux_Q4_0.gguf"]
)
def test_rows_are_those_of_the_whole_also_where_halves_are_swapped(file):
    infos = components_in(FOLDER / file, [FOLDER])["transformer"].tensors
    for name in (
        "norm_out.linear.weight",
        "norm_out.linear.bias",
        "single_transformer_blocks.0.attn.to_v.weight",
    ):
        whole, info = map_tensor(infos[name]), infos[name]
        for start, stop in ((0, 5), (3, 40), (30, 34), (40, 999), (len(whole), len(whole) + 1)):
            np.testing.assert_array_equal(rows_of(info, start, stop), whole[start:stop])


@pytest.mark.parametrize(
    "file", ["flux_bfl_bf16.safetensors", "flux_bfl_fp8_scaled.safetensors", "flux_Q8_0.gguf"]
)
def test_an_fp8_base_is_the_decoded_file_rounded_once(file, assert_rounded_once):
    component = FluxFiles.found(FOLDER / file)["transformer"]
    assert len(assert_rounded_once(load_quantized_transformer(component), load_transformer(component))) == 44


def test_scales_in_the_header_are_those_beside_the_weights(refs, tmp_path):
    tensors = load_file(FOLDER / "flux_bfl_fp8_comfy_quant.safetensors")
    layers = {name.removesuffix(".comfy_quant"): {"format": "float8_e4m3fn"}
              for name in tensors if name.endswith(".comfy_quant")}  # fmt: skip
    assert layers
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".comfy_quant")}
    said = json.dumps({"format_version": "1.0", "layers": layers})
    file = saved(tmp_path / "a.safetensors", tensors, _quantization_metadata=said)
    is_group(components_in(file, [FOLDER])["transformer"].tensors, refs, "fp8_scaled")
    saved(file, tensors, _quantization_metadata=said.replace("float8_e4m3fn", "mxfp8"))
    with pytest.raises(ConfigError, match="is quantised as 'mxfp8', wanted float8_e4m3fn, float8_e5m2"):
        components_in(file)


def test_encoders_and_autoencoder_are_taken_as_files_too(tmp_path):
    """clip_l, t5xxl (in FP8 with scales) and ae as ComfyUI and Black Forest Labs give them out."""
    tensors = load_file(ALL_IN_ONE)

    def part(prefix):
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    clip = saved(tmp_path / "clip_l.safetensors", part("text_encoders.clip_l.transformer."))
    t5 = part("text_encoders.t5xxl.transformer.")
    t5 |= {
        f"{name.removesuffix('weight')}scale_weight": np.float32([0.5])
        for name in t5
        if ".SelfAttention.q." in name
    }
    t5["scaled_fp8"] = np.zeros([0], ml_dtypes.float8_e4m3fn)
    t5 = saved(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors", t5)
    ae = saved(tmp_path / "ae.safetensors", part("vae."))
    files = FluxFiles.found(BF16, text_encoders=[t5, clip], vae=ae, tokenizers=FULL, config=FULL)
    check_folder(files)
    together = FluxFiles.found(ALL_IN_ONE, tokenizers=FULL)
    for name in PARTS:
        assert Path(files[name]).parent == tmp_path
        ours, theirs = (
            load_component(each[name], name, "float32").state_dict() for each in (files, together)
        )
        for key, tensor in theirs.items():
            factor = 0.5 if ".SelfAttention.q." in key else 1
            np.testing.assert_array_equal(ours[key].numpy(), factor * tensor.numpy(), err_msg=key)


def test_a_pipeline_is_put_together_and_written_as_a_folder(tmp_path):
    pipeline = FluxPipeline.from_single_file(ALL_IN_ONE, "float32", tokenizers=FULL)
    alone = FluxTransformer2DModel.from_pretrained(ALL_IN_ONE, paddle_dtype="float32")
    for name, tensor in pipeline.transformer.state_dict().items():
        np.testing.assert_array_equal(alone.state_dict()[name].numpy(), tensor.numpy())
    pipeline.set_progress_bar_config(disable=True)
    asked = {"height": 32, "width": 32, "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    picture = pipeline("a red dress", **asked).images
    pipeline.save_pretrained(tmp_path / "folder")
    again = FluxPipeline.from_pretrained(tmp_path / "folder", "float32")
    again.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(
        again("a red dress", height=32, width=32, num_inference_steps=2, seed=1, output_type="np").images,
        picture,
    )


def test_what_lies_where(tmp_path, caplog):
    """The place for a part counts before the base, the base before other places, a FLUX folder gives the
    rest, and so does the folder in which a file lies."""
    files = FluxFiles.found(ALL_IN_ONE, vae=FULL)
    lie = [Path(files[name]) for name in ("transformer", "text_encoder", "vae", "tokenizer")]
    assert lie == [ALL_IN_ONE, ALL_IN_ONE, FULL / "vae", FULL / "tokenizer"]
    shutil.copytree(FULL, tmp_path / "flux")
    file = shutil.copy(BF16, tmp_path / "flux" / "flux1-dev.safetensors")
    check_folder(file)
    beside = FluxFiles.found(file)
    assert (Path(beside["transformer"]), beside["vae"]) == (Path(file), tmp_path / "flux" / "vae")
    given = FluxFiles.found(FULL, vae=ALL_IN_ONE)
    assert (given["text_encoder"], Path(given["vae"])) == (FULL / "text_encoder", ALL_IN_ONE)
    check_folder(given)


def test_without_guidance_it_is_schnell(tmp_path):
    tensors = {n: t for n, t in load_file(BF16).items() if not n.startswith("guidance_in.")}
    files = FluxFiles.found(saved(tmp_path / "schnell.safetensors", tensors))
    assert files["transformer"].config["guidance_embeds"] is False
    schnell, dev = (load_component(each["scheduler"], "scheduler") for each in (files, FluxFiles.found(BF16)))
    assert (schnell.config.shift, schnell.config.use_dynamic_shifting) == (1.0, False)
    assert (dev.config.shift, dev.config.use_dynamic_shifting) == (3.0, True)


def test_shapes_tell_the_published_models(tmp_path):
    """Of the sizes of FLUX.1-dev, whose files say nothing else; at other sizes what is taken is warned of."""

    def infos(**shapes):
        return {
            name.replace("__", "."): TensorInfo(Path("a"), shape, True, "BF16", 0)
            for name, shape in shapes.items()
        }

    transformer = infos(
        x_embedder__weight=[3072, 64], proj_out__weight=[64, 3072], context_embedder__weight=[3072, 4096],
        time_text_embed__text_embedder__linear_1__weight=[3072, 768],
        **{f"transformer_blocks__{i}__attn__norm_q__weight": [128] for i in range(19)},
        **{f"single_transformer_blocks__{i}__attn__norm_q__weight": [128] for i in range(38)},
    )  # fmt: skip
    told, published, unsure = told_config("transformer", transformer)
    assert published["axes_dims_rope"] == [16, 56, 56] and unsure == ""
    dev = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
           "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
           "guidance_embeds": False}  # fmt: skip
    assert told == dev
    clip = infos(
        text_model__embeddings__token_embedding__weight=[49408, 768],
        text_model__embeddings__position_embedding__weight=[77, 768],
        text_model__encoder__layers__0__mlp__fc1__weight=[3072, 768],
    )
    told, published, unsure = told_config("text_encoder", clip)
    assert (told["hidden_size"], published["num_attention_heads"], unsure) == (768, 12, "")


def test_a_guess_is_said_once_and_a_config_beside_ends_it(tmp_path, caplog):
    file = shutil.copy(BF16, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert components_in(file)["transformer"].config["axes_dims_rope"] == [4, 6, 6]
        components_in(file)
    assert [record.getMessage().count("rotary axes") for record in caplog.records] == [1]
    config = json.loads((FOLDER / "transformer/config.json").read_text()) | {"axes_dims_rope": [8, 4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert components_in(file)["transformer"].config["axes_dims_rope"] == [8, 4, 4]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 9}))  # of another model
    assert components_in(file)["transformer"].config["axes_dims_rope"] == [4, 6, 6]


def with_changes(**changes):
    """The tensors of the plain file, some of another shape, or gone (None)."""
    tensors = load_file(BF16) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def bf16(*shape):
    return np.zeros(shape, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            with_changes(img_in__weight=bf16(32, 96)),
            "is an inpainting FLUX .96 inputs a token, wanted 64.*; take",
        ),
        (with_changes(double_stream_modulation_img__lin__weight=bf16(4, 4)), "is a FLUX.2 model, wanted"),
        (with_changes(time_in__in_layer__weight=None), "missing time_text_embed.timestep_embedder.linear_1"),
        (with_changes(txt_in__weight=None), "tensors of its transformer are incomplete .*context_embedder"),
        ({"img_in.weight": bf16(32, 64)}, "the tensors of its transformer are incomplete .*: fetch it again"),
        (with_changes(img_in__lora_A__weight=bf16(4, 64)), "is a LoRA, not a base model: give a model"),
        (
            with_changes(**{"img_in.weight.quant_map": bf16(3)}),
            "quantised already .bitsan",
        ),
        (with_changes(strange__weight=bf16(3)), r"unexpected strange.weight \[3\]"),
        (with_changes(**{"double_blocks.0.img_attn.qkv.bias": bf16(95)}), r"qkv.bias \[95\] is not 3 parts"),
        ({"model.diffusion_model.input_blocks.0.0.weight": bf16(4)}, "is a Stable Diffusion 1, 2 or XL"),
        (
            {"a.weight": bf16(4), "b.weight": bf16(4)},
            "is no model of FLUX.1: its tensors are like a.weight, b",
        ),
        (with_changes(txt_in__weight_scale=np.float32(2)), "a scale for txt_in.weight, which is not in FP8"),
        (load_file(SCALED) | {"txt_in.scale_weight": np.float32(np.nan)}, "is nan, wanted a finite scale"),
        (
            load_file(SCALED) | {"txt_in.scale_weight": np.ones([32, 1])},
            r"\[32, 1\], wanted one scale a tens",
        ),
        (
            load_file(SCALED) | {"txt_in.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)},
            "txt_in is quantised as 'nvfp4', wanted float8_e4m3fn, float8_e5m2: take the file in FP8 or b",
        ),
    ],
    ids=range(15),
)
def test_what_is_no_flux_1_is_named(tmp_path, tensors, message):
    file = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ConfigError, match=message):
        check_folder(FluxFiles.found(file, text_encoders=FULL))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"<!DOCTYPE html><p>log in", "is a web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.safetensors", b"", "is empty: the download failed; fetch it again"),
        ("a.safetensors", b"PK\x03\x04" + b"\xff" * 40 + b"model/data.pkl", "is a pickle under another name"),
        ("a.ckpt", b"PK\x03\x04", "is a pickle, and reading it can run code: convert it to .safetensors"),
        ("a.safetensors", BF16.read_bytes()[:-9], "its header speaks of"),
        ("a.safetensors", BF16.read_bytes()[:900], "is not a whole safetensors file: it is cut off"),
        ("a.gguf", (FOLDER / "flux_Q8_0.gguf").read_bytes()[:-700], "damaged or cut-off GGUF file"),
        ("a.gguf", (FOLDER / "flux_Q8_0.gguf").read_bytes()[:900], "damaged or cut-off GGUF file"),
        ("a-00001-of-00003.safetensors", BF16.read_bytes(), "is one of several shards: give the folder"),
    ],
    ids=range(10),
)
def test_files_that_are_no_model_are_named_as_what_they_are(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        FluxFiles.found(tmp_path / name)


def test_what_is_missing_is_named_with_what_to_do():
    files = FluxFiles.found(SCALED, "model.name_or_path", vae=FULL / "vae")
    with pytest.raises(ConfigError, match="hold transformer, vae, but no text_encoder, .*: set ") as error:
        check_folder(files)
    assert "model.text_encoders (a FLUX folder, or the files clip_l" in str(error.value)
    assert "model.tokenizers (" in str(error.value) and "model.vae" not in str(error.value)
    with pytest.raises(
        ConfigError, match=r"--vae: .*flux_bfl_bf16.safetensors holds transformer, wanted a FLUX"
    ):
        FluxFiles.found(SCALED, "--model", vae=BF16)
    with pytest.raises(ConfigError, match="nowhere is not there: give a local file or folder"):
        FluxFiles.found(SCALED, vae="nowhere")
    with pytest.raises(
        ConfigError, match="no model file a.gguf: none is downloaded; set --model to a local file"
    ):
        FluxFiles.found("a.gguf", "--model")
    with pytest.raises(
        ConfigError, match="hold vae, but no scheduler and no transformer: set the model to a FLUX"
    ):
        check_folder(FluxFiles.found(FULL / "vae"))


def test_components_of_different_models_are_refused():
    other = Path(__file__).parents[2] / "ppcoat/assets/tiny_flux"
    with pytest.raises(
        ConfigError, match="text_encoder has hidden_size 64, but the transformer of .* wants 32: take"
    ):
        check_folder(FluxFiles.found(BF16, text_encoders=other))


def test_tensors_of_no_component_are_left_out_with_a_word(tmp_path, caplog):
    """A scale of 1 beside a weight that is not in FP8 changes nothing."""
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(BF16).items()}
    tensors["model.diffusion_model.img_in.scale_weight"] = np.ones([1], np.float32)
    file = saved(tmp_path / "a.safetensors", tensors | {"model_ema.decay": np.float32([1])})
    with caplog.at_level(logging.WARNING):
        assert list(components_in(file, [FOLDER])) == ["transformer"]
    assert "1 tensors of no component of FLUX are left out, e.g. model_ema.decay" in caplog.text
