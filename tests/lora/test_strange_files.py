"""Files that people bring by mistake, and dialects: named as what they are on every path, or read rightly."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from ppcoat.cli.main import main
from ppcoat.errors import ConfigError
from ppcoat.lora import load_lora, read_lora_file
from ppcoat.lora.parse import parse_lora

BASE = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"
Q = "transformer_blocks.0.attn.to_q"
A, B = np.full([4, 64], 0.5, "float32"), np.full([64, 4], 0.25, "float32")


def pair(stem, a=A, b=B, names=("lora_A.weight", "lora_B.weight")):
    return {f"{stem}.{names[0]}": a, f"{stem}.{names[1]}": b}


def tensors_of(arrays):
    return {key: paddle.to_tensor(value) for key, value in arrays.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: the download failed"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html lang='en'>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b'{"error": "Unauthorized"}', "what a server answered"),
        (b"\x80\x04\x95\n\0\0\0\0\0\0\0", "a pickle under another name"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "a pickle under another name"),
        (b"PK\x03\x04" + bytes(26) + b"lora.safetensors", "an archive under another name: unpack it"),
        (b"\x1f\x8b\x08", "an archive under another name"),
        (b"\x89PNG\r\n\x1a\n", "a picture, saved under this name"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "a web page"),
        (b"<Error><Code>AccessDenied</Code>", "a web page"),
        (b"\xef\xbb\xbf{}", "what a server answered"),
        (b"Entry not found", "a text, what a server answered"),
        (bytes(600), "is all zeros: the download stopped"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (
            b'\xff\x06\0\0\0\0\0\0{"__metadata__": {"format": "pt"}',
            "it is cut off, or something else",
        ),
        (b"\xff" * 40, "is not a whole safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, said):
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_lora_file(tmp_path / "lora.safetensors")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OTHERS = [
    ([SDXL, "lora_te2_text_model_encoder_layers_0_mlp_fc1"], {}, "a LoRA of SDXL"),
    (["unet.down_blocks.2.attentions.0.transformer_blocks.3.attn1.to_q"], {}, "a LoRA of SDXL"),
    (["lora_unet_down_blocks_0_attentions_0_proj_in"], {}, "a LoRA of Stable Diffusion 1 or 2, or of SDXL"),
    ([SDXL], {"ss_base_model_version": "sdxl_base_v1-0"}, "a LoRA of SDXL"),
    (["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"], {}, "a LoRA of FLUX.2"),
    (["transformer.transformer_blocks.0.ff.linear_in"], {}, "a LoRA of FLUX.2"),
    (["diffusion_model.layers.3.attention.to_q"], {}, "a LoRA of Z-Image"),
    (["diffusion_model.layers.3.attention.qkv"], {}, "a LoRA of Z-Image, Lumina or NewBie"),
    (["diffusion_model.blocks.0.self_attn.q"], {}, "a LoRA of Wan"),
    (["lora_unet_blocks_0_cross_attn_k"], {}, "a LoRA of Wan"),
    (["transformer.transformer_blocks.0.img_mlp.net.0.proj"], {}, "a LoRA of Qwen-Image"),
    (["diffusion_model.joint_blocks.0.x_block.attn.qkv"], {}, "a LoRA of Stable Diffusion 3"),
]


@pytest.mark.parametrize(("stems", "header", "said"), OTHERS)
def test_loras_of_other_models_are_named(model, stems, header, said):
    arrays = {key: value for stem in stems for key, value in pair(stem).items()}
    file = parse_lora(tensors_of(arrays), header)
    assert file.foreign == said and not file.changes
    with pytest.raises(ConfigError, match=f"this LoRA is {said}, and fits no layer of this model"):
        load_lora(model, tensors_of(arrays), metadata=header)


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
KOHYA = ("lora_down.weight", "lora_up.weight")


@pytest.mark.parametrize(
    "strange",
    [
        f"{QKV}.lora_mid.weight",
        f"{QKV}.scalar",
        f"transformer.{Q}.lora_mid.weight",
        "controlnet_x",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
        "clip_g",
    ],
)
def test_a_lora_of_flux_with_a_strange_key_stays_one(model, strange):
    """Whether its module is FLUX's, or it is one among many."""
    arrays = pair(QKV, A[:, :16], np.concatenate([B[:16]] * 3), KOHYA)
    for name in ("to_add_out", "to_out.0"):
        arrays |= pair(f"transformer.{Q.replace('to_q', name)}", A[:, :16], B[:16])
    tensors = tensors_of(arrays | {strange: np.ones([4], "float32")})
    with pytest.raises(ConfigError, match="1 keys of this LoRA name nothing .*ignore_unknown=True"):
        load_lora(model, tensors)
    info = load_lora(model, tensors, ignore_unknown=True)
    assert info.unmatched == [strange] and info.what == "LoRA on 5 layers"


@pytest.mark.parametrize(
    ("shared", "own", "said"),
    [
        (("attn.to_q", "attn.to_k", "attn.to_out.0", "attn.add_q_proj"), ("img_mlp.net.2",), "Qwen-Image"),
        (("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj"), ("ff.linear_in",), "FLUX.2"),
    ],
)
def test_a_model_that_shares_most_names_with_flux_is_told_by_its_own(shared, own, said):
    arrays = {}
    for name in (*shared, *own):
        arrays |= pair(f"transformer.transformer_blocks.0.{name}")
    assert parse_lora(tensors_of(arrays), {}).foreign == f"a LoRA of {said}"


def test_a_lora_of_flux_is_no_other_models_where_newbies_modules_are_asked():
    file = parse_lora(tensors_of(pair(QKV, names=KOHYA)), {}, {"layers.0.attention.qkv"})
    assert file.foreign is None and len(file.unknown) == 2


def test_alpha_of_the_header_is_asked_only_where_it_is_wanted():
    """kohya's resizing writes "Dynamic" and an alpha to every module; a difference wants none at all."""
    dynamic = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    arrays = pair(f"transformer.{Q}") | {f"transformer.{Q}.alpha": np.float32(2)}
    more = {f"transformer.{Q.replace('to_q', 'to_k')}.diff": np.ones([64, 64], "float32")}
    file = parse_lora(tensors_of(arrays | more), dynamic)
    assert file.modules[Q].scale == 0.5 and file.what == "LoRA on 1 layer, difference on 1"
    assert not parse_lora(tensors_of(pair(f"transformer.{Q}")), dynamic).states_alpha
    assert parse_lora(tensors_of(more), {"alpha": "many"}).what == "difference on 1 layer"
    whole = {f"transformer.{Q}.lokr_w{i}": np.ones([8, 8], "float32") for i in (1, 2)}
    with pytest.raises(ConfigError, match="alpha must be a finite number, got 'many'"):
        parse_lora(tensors_of(whole), {"alpha": "many"})


def test_one_note_does_not_swallow_another():
    arrays = pair(f"transformer.{Q}") | {f"transformer.{Q}.dora_scale": B[:, :1]}
    arrays |= pair(f"lycoris_{Q.replace('to_q', 'to_k')}") | {f"lycoris_{Q}.diff_b": B[:, 0]}
    notes = parse_lora(tensors_of(arrays), {"ss_network_alpha": "1"}).notes
    assert len(notes) == 2 and "ss_network_alpha" in notes[0] and "DoRA by the rule of LyCORIS" in notes[1]


@pytest.mark.parametrize(
    ("name", "width", "rows"),
    [
        ("double_blocks.0.img_mlp.0", 64, 384),
        ("single_blocks.0.linear2", 256, 64),
        ("single_blocks.0.linear1", 64, 576),
        ("double_blocks.0.img_attn.qkv", 6144, 3 * 6144),
    ],
)
def test_flux_2_has_flux_1s_names_and_another_shape(name, width, rows):
    arrays = pair(f"diffusion_model.{name}", np.ones([2, width], "float32"), np.ones([rows, 2], "float32"))
    assert parse_lora(tensors_of(arrays), {}).foreign == "a LoRA of FLUX.2"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_whole_model_is_refused_before_its_tensors_are_read(tmp_path, prefix):
    names = (
        "img_in.weight",
        "img_in.bias",
        "double_blocks.0.img_attn.qkv.weight",
        "final_layer.linear.weight",
    )
    save_file(
        {prefix + name: np.full([4, 4], np.nan, "float32") for name in names}, tmp_path / "flux.safetensors"
    )
    with pytest.raises(ConfigError, match="flux.safetensors is a whole model, not a LoRA"):
        read_lora_file(tmp_path / "flux.safetensors")


def with_value(value, dtype="float32"):
    broken = B.astype(dtype)
    broken[3, 1] = value
    return pair(f"transformer.{Q}", A.astype(dtype), broken)


BROKEN = [
    (with_value(np.nan), f"the tensor transformer.{Q}.lora_B.weight of the LoRA holds NaN or infinity"),
    (
        with_value(np.inf, "float16"),
        f"the tensor transformer.{Q}.lora_B.weight of the LoRA holds NaN or infinity",
    ),
    (
        {key: value.astype("int8") for key, value in pair(f"transformer.{Q}").items()},
        "2 tensors are I8, e.g.",
    ),
    (pair(f"transformer.{Q}", np.ones([0, 64], "float32"), np.ones([64, 0], "float32")), "a LoRA of rank 0"),
    (pair(f"transformer.{Q}") | pair("lora_transformer_transformer_blocks_0_attn_to_q"), f"{Q} twice, .*as "),
    (
        pair(f"transformer.{Q}") | {f"transformer.{Q}.dora_scale": B[:9]},
        r"DoRA of .*to_q: the magnitude is \[9, 4\]",
    ),
    (
        pair(f"lycoris_{Q}", A, B, ("hada_w1_a", "hada_w1_b")),
        "to_q is incomplete: it has hada_w1_a, hada_w1_b",
    ),
    (
        {f"lycoris_{Q}.lokr_w1": A, f"lycoris_{Q}.lokr_w2_a": A},
        "to_q is incomplete: it has lokr_w1, lokr_w2_a",
    ),
]


@pytest.mark.parametrize(("arrays", "said"), BROKEN)
def test_broken_files_stop_every_command_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, arrays, said
):
    monkeypatch.setattr("ppcoat.models.loading.load_transformer", lambda *_: pytest.fail("loaded"))
    file, out = tmp_path / "lora.safetensors", tmp_path / "out"
    save_file(arrays, file)
    with pytest.raises(ConfigError, match=said):
        read_lora_file(file)
    draw = ["--model", str(BASE), "--path_to_lora", str(file), "--prompt", "x", "--output_dir", str(out)]
    for command in (
        ["generate", *draw], ["lightning", *draw],
        ["convert", str(file), f"{out}.safetensors", "--format", "kohya"],
        ["merge", "--model", str(BASE), "--lora", str(file), "--output_dir", str(out)],
    ):  # fmt: skip
        assert main([*command, *(["--device", "cpu"] if "--prompt" in command else [])]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and shown.count("\n") == 1 and "lora.safetensors" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


S8, BLOCKS = np.ones([8, 8], "float32"), np.zeros([8, 8, 8], "float32")
ODD_SHAPES = [  # tensors of to_q, 64 -> 64 -> what is said
    ({"lokr_w1": S8[0], "lokr_w2": S8}, r"tensor .*to_q.lokr_w1 of the LoRA is \[8\], wanted a matrix"),
    ({"lokr_w1": S8, "lokr_w2_a": S8, "lokr_w2_b": S8[0, 0]}, r"lokr_w2_b of the LoRA is \[\], wanted a"),
    ({"lora_A.weight": A[0, 0], "lora_B.weight": B}, r"lora_A.weight of the LoRA is \[\], wanted a matrix"),
    ({"oft_blocks": BLOCKS, "alpha": S8[0, :4]}, r"to_q.alpha of the LoRA is \[4\], wanted one number"),
    ({"oft_blocks": S8[0, 0]}, r"OFT of .*to_q: blocks are \[\]"),
    (
        {"oft_blocks": np.stack([BLOCKS] * 5)},
        r"BOFT of .*to_q: .* 8 a stage, wanted a multiple of 2\^4 for 5",
    ),
    ({"oft_blocks": BLOCKS, "rescale": S8[0]}, r"OFT of .*to_q: rescale is \[8\], wanted \[64\]"),
    ({"a1.weight": B, "a2.weight": A[:, :9], "b1.weight": B, "b2.weight": A}, "GLoRA of .* different widths"),
    ({"diff": S8[0], "dora_scale": S8}, r"DoRA of .*to_q: its update is \[8\], wanted a matrix"),
]


@pytest.mark.parametrize(("roles", "said"), ODD_SHAPES)
def test_odd_shapes_are_named_by_the_reader(roles, said):
    stem = f"transformer.{Q}"
    with pytest.raises(ConfigError, match=said) as caught:
        parse_lora(tensors_of({f"{stem}.{role}": values for role, values in roles.items()}), {})
    assert "\n" not in str(caught.value)


def test_as_many_stages_as_there_are_blocks_for_are_read():
    arrays = {f"transformer.{Q}.oft_blocks": np.stack([BLOCKS] * 4)}
    (change,) = parse_lora(tensors_of(arrays), {}).changes
    assert not change.kind.delta(np.ones([64, 64], "float32"), 1.0).any()


LONG = "9" * 5000  # more digits than Python turns into a number


def test_texts_of_the_header_are_shown_without_control_characters_and_read_within_limits(model):
    tensors = tensors_of(pair(f"transformer.{Q}", A[:, :16], B[:16]))
    info = load_lora(model, tensors, metadata={"trigger_word": "sks\x1b[2J\n", "step": LONG})
    assert info.line() == "LoRA on 1 layer at scale 1, trigger word sks\\u001b[2J\\n" and info.step is None
    for text in (f'{{"step": {LONG}}}', "[" * 100_000):
        assert load_lora(model, tensors, metadata={"training_info": text}).step is None
        with pytest.raises(ConfigError, match="lora_adapter_metadata is not JSON"):
            load_lora(model, tensors, metadata={META: text})
    with pytest.raises(ConfigError, match="lora_alpha must be a finite number") as caught:
        load_lora(model, tensors, metadata={META: json.dumps({"lora_alpha": 10**400})})
    assert len(str(caught.value)) < 200
    named = {f"transformer.{Q}.lora_A.{name}.weight": A for name in ("a", "\x1b[2J")}
    with pytest.raises(ConfigError, match="to_q twice, as .*and as") as caught:
        load_lora(model, tensors_of(named))
    assert str(caught.value).isprintable()


def dialect(stem, names=("lora_A.weight", "lora_B.weight"), alpha=None, header=None):
    arrays = pair(stem, names=names) | ({} if alpha is None else {f"{stem}.alpha": np.float32(alpha)})
    return arrays, header or {}


META = "lora_adapter_metadata"
DIALECTS = {
    "folded": (dialect(f"transformer.{Q}"), 1.0),
    "adapter's own name": (dialect(Q, ("lora_A.my_style.weight", "lora_B.my_style.weight")), 1.0),
    "default_0": (dialect(f"transformer.{Q}", ("lora_A.default_0.weight", "lora_B.default_0.weight")), 1.0),
    "model.diffusion_model": (dialect(f"model.diffusion_model.{Q}"), 1.0),
    "last underscore": (
        dialect("lora_unet_transformer_blocks_0_attn_to_q_", ("lora_down.weight", "lora_up.weight"), 2.0),
        0.5,
    ),
    "lora_linear_layer": (
        dialect(f"transformer.{Q}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
        1.0,
    ),
    "kohya's header": (
        dialect(f"transformer.{Q}", header={"ss_network_alpha": "1.0", "ss_network_dim": "4"}),
        0.25,
    ),
    "kohya's header says nothing": (dialect(f"transformer.{Q}", header={"ss_network_alpha": "None"}), 1.0),
    "tensor before header": (dialect(f"transformer.{Q}", alpha=2, header={"ss_network_alpha": "1"}), 0.5),
    "empty metadata": (dialect(f"transformer.{Q}", header={META: "", "training_info": "not json"}), 1.0),
    "metadata null": (dialect(f"transformer.{Q}", header={META: "null"}), 1.0),
    "bare metadata": (dialect(Q, header={META: json.dumps({"r": 4, "lora_alpha": 2})}), 0.5),
    "nested metadata": (
        dialect(Q, header={META: json.dumps({"transformer": {"r": 4, "lora_alpha": 2}})}),
        0.5,
    ),
    "metadata of a text encoder": (
        dialect(f"transformer.{Q}", header={META: json.dumps({"text_encoder.lora_alpha": 2})}),
        1.0,
    ),
    "names without .weight": (dialect(Q, ("lora_A", "lora_B")), 1.0),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_of_names_and_alpha(name):
    (arrays, header), scale = DIALECTS[name]
    file = parse_lora(tensors_of(arrays), header)
    (module,) = file.modules.values()
    assert module.scale == scale and not file.unknown
    np.testing.assert_array_equal(module.a, A)
    assert ("ss_network_alpha" in " ".join(file.notes)) == (name == "kohya's header")


def test_pefts_lokr_divides_alpha_by_r_also_where_both_are_whole(tmp_path):
    """Its config names alpha `alpha`; LyCORIS gives two whole matrices scale 1."""
    stem, folder = f"base_model.model.{Q}", tmp_path / "peft"
    folder.mkdir()
    arrays = {f"{stem}.lokr_w1": np.eye(8, dtype="float32"), f"{stem}.lokr_w2": np.ones([8, 8], "float32")}
    save_file(arrays, folder / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 8, "alpha": 2, "alpha_pattern": {"attn.to_k": 16}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weight = np.zeros([64, 64], "float32")
    for source in (folder, folder / "adapter_model.safetensors"):
        (change,) = read_lora_file(source).changes
        np.testing.assert_allclose(change.kind.delta(weight, 1.0), 0.25 * np.kron(np.eye(8), np.ones([8, 8])))
    (folder / "adapter_config.json").unlink()
    file = read_lora_file(folder)
    np.testing.assert_allclose(
        file.changes[0].kind.delta(weight, 0.5), 0.5 * np.kron(np.eye(8), np.ones([8, 8]))
    )
    assert "adapter_config.json is not beside it" in file.notes[0]


def test_zero_parts_are_left_out_with_a_note(model):
    clip = pair(
        "lora_te1_text_model_encoder_layers_0_mlp_fc1", A, 0 * B, ("lora_down.weight", "lora_up.weight")
    )
    extra = {f"{Q}.diff_b": np.zeros(64, "float32"), "strange": np.zeros(3, "float32")}
    file = parse_lora(tensors_of(pair(Q) | clip | extra), {})
    assert file.what == "LoRA on 1 layer" and not file.unknown
    assert file.notes == ("1 tensors that name nothing here are all zero: left out",
                          "all zero, left out: bias on 1 layer, CLIP: LoRA on 1")  # fmt: skip
    idle = parse_lora(tensors_of(pair(Q, A, 0 * B)), {})
    assert (
        idle.notes == ("this LoRA changes nothing: its factors (every A or B, say) or alpha are zero",)
        and len(idle.modules) == 1
    )


def test_a_folder_with_one_file_is_that_file(tmp_path):
    with pytest.raises(
        ConfigError, match="is a folder, wanted one LoRA file: it has no adapter_model.safetensors"
    ):
        read_lora_file(tmp_path)
    save_file(pair(f"transformer.{Q}"), tmp_path / "mine.safetensors")
    assert len(read_lora_file(tmp_path).modules) == 1
    save_file(pair(f"transformer.{Q}", A, 2 * B), tmp_path / "pytorch_lora_weights.safetensors")
    assert read_lora_file(tmp_path).modules[Q].b[0, 0] == 0.5  # diffusers' usual name
    assert read_lora_file(tmp_path, weight_name="mine.safetensors").modules[Q].b[0, 0] == 0.25
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="it has mine.safetensors, other.safetensors; name the file"):
        read_lora_file(tmp_path)
