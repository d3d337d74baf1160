"""Files that users came with, one of each kind: what is read, how strong, or what is said instead."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ppcoat.errors import ConfigError
from ppcoat.lora import read_fitting, read_lora_file, write_lora_file

D = 8  # width of the model
SHAPES = {
    "transformer": {
        f"{path}.weight": shape
        for path, shape in {
            **{
                f"transformer_blocks.0.attn.{name}": [D, D]
                for name in (
                    "to_q",
                    "to_k",
                    "to_v",
                    "to_out.0",
                    "add_q_proj",
                    "add_k_proj",
                    "add_v_proj",
                    "to_add_out",
                )
            },
            **{f"single_transformer_blocks.0.attn.{name}": [D, D] for name in ("to_q", "to_k", "to_v")},
            "single_transformer_blocks.0.proj_mlp": [4 * D, D],
            "single_transformer_blocks.0.proj_out": [D, 5 * D],
            "transformer_blocks.0.attn.norm_q": [4],
            "x_embedder": [D, 4],
            "proj_out": [4, D],
        }.items()
    },
    "text_encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": [D, D]},
    "text_encoder_2": {"encoder.block.0.layer.0.SelfAttention.q.weight": [D, D]},
}
SHAPES["transformer"] |= {
    f"{name.removesuffix('.weight')}.bias": shape[:1]
    for name, shape in SHAPES["transformer"].items()
    if len(shape) == 2
}
Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
DOWN_UP, XLABS = ("lora_down.weight", "lora_up.weight"), ("down.weight", "up.weight")
A = np.linspace(-1, 1, 2 * D, dtype="float32").reshape(2, D)
B = np.cos(np.arange(2 * D, dtype="float32")).reshape(D, 2)
W = np.sin(np.arange(D * D)).reshape(D, D)  # of every square module
ROWS = np.linspace(0.5, 2, D, dtype="float32")
FOUR, TWO = np.cos(np.arange(16, dtype="float32")).reshape(4, 4), np.float32([[1, -2], [0.5, 3]])


def pair(stem, names=("lora_A.weight", "lora_B.weight"), a=A, b=B):
    return {f"{stem}.{names[0]}": a, f"{stem}.{names[1]}": b}


def number(value):
    return np.asarray(value, "float32")


def clip(b=B, a=A):
    return pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", DOWN_UP, a, b)


def dora(strength, axis=1, rule="PEFT"):
    """W' - W of `pair` with lengths ROWS of rows (1) or columns (0)."""
    update = B.astype("float64") @ A
    whole = W + (strength if rule == "PEFT" else 1.0) * update
    factor = np.expand_dims(ROWS, axis) / np.linalg.norm(whole, axis=axis, keepdims=True)
    return whole * factor - W if rule == "PEFT" else strength * (whole * factor - W)


def turn(strength):
    q = FOUR.astype("float64") - FOUR.T
    r = (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q)
    turned = np.concatenate([(strength * r + (1 - strength) * np.eye(4)).T @ part for part in np.split(W, 2)])
    return turned - W


def times(matrix):
    return lambda strength: strength * np.asarray(matrix, "float64")


KOHYA = pair("lora_unet_double_blocks_0_img_attn_proj", DOWN_UP)
BA, OUT = times(B.astype("float64") @ A), "transformer_blocks.0.attn.to_out.0"
HALF_LOKR = {"lokr_w1": TWO, "lokr_w2_a": FOUR[:, :2], "lokr_w2_b": FOUR[:2], "alpha": number(1)}
READ = {  # name -> tensors, header, what is said of it, {path: W' - W by strength}, what its notes say
    "12 XLabs, single blocks": (
        pair("single_blocks.0.processor.qkv_lora", XLABS, A, np.concatenate([B, 2 * B, 3 * B]))
        | pair("single_blocks.0.processor.proj_lora", XLABS, np.tile(A, 5))
        | pair("double_blocks.0.processor.qkv_lora2", XLABS, A, np.concatenate([B, 2 * B, 3 * B])),
        {},
        "LoRA on 7 layers",
        {
            f"single_transformer_blocks.0.attn.to_{part}": times((i + 1) * B @ A)
            for i, part in enumerate("qkv")
        }
        | {
            f"transformer_blocks.0.attn.add_{part}_proj": times((i + 1) * B @ A)
            for i, part in enumerate("qkv")
        }
        | {"single_transformer_blocks.0.proj_out": times(B @ np.tile(A, 5))},
        "",
    ),
    "13 CLIP all zero": (KOHYA | clip(0 * B), {}, "LoRA on 1 layer", {OUT: BA}, "all zero, left out: CLIP"),
    "13 CLIP all zero, of another size": (
        KOHYA | clip(0 * B[:3], A[:, :5]),
        {},
        "LoRA on 1 layer",
        {OUT: BA},
        "all zero, left out: CLIP",
    ),
    "13 CLIP and T5": (
        KOHYA | clip() | pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", DOWN_UP, 2 * A),
        {},
        "LoRA on 1 layer, CLIP: LoRA on 1, T5: LoRA on 1",
        {
            OUT: BA,
            "text_model.encoder.layers.0.mlp.fc1": BA,
            "encoder.block.0.layer.0.SelfAttention.q": times(2 * B @ A),
        },
        "",
    ),
    "14 extracted by ComfyUI": (
        pair(f"diffusion_model.{Q}")
        | {
            f"diffusion_model.{Q}.diff_b": ROWS,
            f"diffusion_model.{K}.diff": W,
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": ROWS[:4],
        },
        {},
        "LoRA on 1 layer, bias on 1, difference on 1, norm on 1",
        {Q: BA, f"{Q}.bias": times(ROWS), K: times(W), "transformer_blocks.0.attn.norm_q": times(ROWS[:4])},
        "",
    ),
    "14 differences of zeros": (
        pair(f"diffusion_model.{Q}")
        | {f"diffusion_model.{Q}.diff_b": 0 * ROWS, f"diffusion_model.{K}.diff": 0 * W},
        {},
        "LoRA on 1 layer",
        {Q: BA},
        "all zero, left out: difference on 1 layer, bias on 1",
    ),
    "14 a norm's difference under its own name": (
        pair(f"diffusion_model.{Q}")
        | {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff": ROWS[:4]},
        {},
        "LoRA on 1 layer, norm on 1",
        {Q: BA, "transformer_blocks.0.attn.norm_q": times(ROWS[:4])},
        "",
    ),
    "14 lora_bias": (
        pair(f"transformer.{Q}")
        | {f"transformer.{Q}.lora_B.bias": ROWS, f"transformer.{Q}.alpha": number(1)},
        {},
        "LoRA on 1 layer, bias on 1",
        {Q: times(B @ A / 2), f"{Q}.bias": times(ROWS / 2)},
        "",
    ),
    "15 control": (
        pair("img_in", a=A[:, :8]),
        {},
        "LoRA on 1 layer",
        {"x_embedder": lambda s: s * np.asarray(B, "float64") @ A},
        "a control LoRA: the model now draws after",
    ),
    "16 DoRA of diffusers": (
        pair(f"transformer.{Q}") | {f"transformer.{Q}.lora_magnitude_vector": ROWS},
        {},
        "DoRA by the rule of PEFT on 1 layer",
        {Q: dora},
        "DoRA by the rule of PEFT",
    ),
    "16 DoRA of OneTrainer, rows": (
        pair("lora_transformer_transformer_blocks_0_attn_to_q", DOWN_UP)
        | {"lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": ROWS[:, None]},
        {},
        "DoRA by the rule of OneTrainer on 1 layer",
        {Q: lambda s: dora(s, 1, "OneTrainer")},
        "OneTrainer",
    ),
    "16 DoRA of OneTrainer, columns": (
        pair("lora_transformer_transformer_blocks_0_attn_to_q", DOWN_UP)
        | {"lora_transformer_transformer_blocks_0_attn_to_q.dora_scale": ROWS[None]},
        {},
        "DoRA by the rule of OneTrainer on 1 layer",
        {Q: lambda s: dora(s, 0, "OneTrainer")},
        "OneTrainer",
    ),
    "16 DoRA of PEFT, with its infix": (
        pair(f"base_model.model.{Q}", ("lora_A.default.weight", "lora_B.default.weight"))
        | {f"base_model.model.{Q}.lora_magnitude_vector.default.weight": ROWS},
        {"lora_alpha": "2"},
        "DoRA by the rule of PEFT on 1 layer",
        {Q: dora},
        "",
    ),
    "17 LoKr of ai-toolkit": (
        {
            f"transformer.{Q}.lokr_w1": TWO,
            f"transformer.{Q}.lokr_w2": FOUR,
            f"transformer.{Q}.alpha": number(1e10),
        },
        {},
        "LoKr on 1 layer",
        {Q: times(np.kron(TWO, FOUR))},
        "",
    ),
    "17 LoKr of SimpleTuner": (
        {f"lycoris_{Q.replace('.', '_')}.lokr_w1": TWO, f"lycoris_{Q.replace('.', '_')}.lokr_w2": FOUR},
        {},
        "LoKr on 1 layer",
        {Q: times(np.kron(TWO, FOUR))},
        "",
    ),
    "17 LoKr under kohya's names": (
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": TWO,
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": np.tile(FOUR, [3, 1]),
        },
        {},
        "LoKr on 3 layers",
        {},
        "",
    ),
    "17 LoKr of low rank": (
        {f"lycoris_{Q.replace('.', '_')}.{role}": value for role, value in HALF_LOKR.items()},
        {},
        "LoKr on 1 layer",
        {Q: times(np.kron(TWO, FOUR[:, :2] @ FOUR[:2]) / 2)},
        "",
    ),
    "17 LoHa": (
        {
            f"lycoris_{Q.replace('.', '_')}.hada_w{i}_{side}": value
            for i in (1, 2)
            for side, value in (("a", B), ("b", A))
        },
        {},
        "LoHa on 1 layer",
        {Q: times((B @ A) ** 2)},
        "",
    ),
    "17 full": ({f"lycoris_{Q.replace('.', '_')}.diff": W}, {}, "difference on 1 layer", {Q: times(W)}, ""),
    "17 OFT": (
        {
            "oft_unet_double_blocks_0_img_attn_proj.oft_blocks": np.stack([FOUR, FOUR]),
            "oft_unet_double_blocks_0_img_attn_proj.alpha": number(0),
        },
        {},
        "OFT on 1 layer",
        {OUT: turn},
        "",
    ),
    "18 alpha folded": (pair(f"transformer.{Q}"), {}, "LoRA on 1 layer", {Q: BA}, ""),
    "18 default_0": (
        pair(f"transformer.{Q}", ("lora_A.default_0.weight", "lora_B.default_0.weight")),
        {},
        "LoRA on 1 layer",
        {Q: BA},
        "",
    ),
    "18 an adapter's name": (
        pair(Q, ("lora_A.my_style.weight", "lora_B.my_style.weight")),
        {},
        "LoRA on 1 layer",
        {Q: BA},
        "",
    ),
    "18 model.diffusion_model": (pair(f"model.diffusion_model.{Q}"), {}, "LoRA on 1 layer", {Q: BA}, ""),
    "18 unet.": (pair(f"unet.{Q}"), {}, "LoRA on 1 layer", {Q: BA}, ""),
    "18 last underscore": (
        pair("lora_unet_transformer_blocks_0_attn_to_q_", DOWN_UP)
        | {"lora_unet_transformer_blocks_0_attn_to_q_.alpha": number(0.5)},
        {},
        "LoRA on 1 layer",
        {Q: times(B @ A / 4)},
        "",
    ),
    "18 kohya's header": (
        pair(f"transformer.{Q}"),
        {"ss_network_alpha": "4", "ss_network_dim": "16"},
        "LoRA on 1 layer",
        {Q: times(B @ A / 4)},
        "header field ss_network_alpha",
    ),
    "18 linear layers": (
        pair(f"transformer.{Q}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
        {},
        "LoRA on 1 layer",
        {Q: BA},
        "",
    ),
    "18 a config as a text in a text": (
        pair(f"transformer.{Q}"),
        {"lora_adapter_metadata": json.dumps({"transformer": json.dumps({"r": 2, "lora_alpha": 1})})},
        "LoRA on 1 layer",
        {Q: times(B @ A / 2)},
        "",
    ),
    "19 empty metadata": (
        pair(f"transformer.{Q}"),
        {"lora_adapter_metadata": ""},
        "LoRA on 1 layer",
        {Q: BA},
        "",
    ),
    "20 all B zero": (
        pair(f"transformer.{Q}", b=0 * B),
        {},
        "LoRA on 1 layer",
        {Q: times(0 * W)},
        "changes nothing",
    ),
    "20 a LoKr of zeros": (
        {f"transformer.{Q}.lokr_w1": 0 * TWO, f"transformer.{Q}.lokr_w2": FOUR},
        {},
        "LoKr on 1 layer",
        {Q: times(0 * W)},
        "changes nothing",
    ),
    "20 a difference of zeros": (
        {f"diffusion_model.{Q}.diff": 0 * W},
        {},
        "difference on 1 layer",
        {Q: times(0 * W)},
        "changes nothing",
    ),
    "20 alpha zero": (
        pair(f"transformer.{Q}") | {f"transformer.{Q}.alpha": number(0)},
        {},
        "LoRA on 1 layer",
        {Q: times(0 * W)},
        "changes nothing",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_it_is_read_at_its_strength(tmp_path, name):
    tensors, header, what, deltas, note = READ[name]
    file = tmp_path / "lora.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, header)
    found = read_fitting(file, SHAPES)
    assert sorted(found.what.replace(" layers", "").replace(" layer", "").split(", ")) == sorted(
        what.replace(" layers", "").replace(" layer", "").split(", ")
    )
    assert not found.unknown and note in " ".join(found.notes)
    done = set()
    for change in found.changes if deltas else ():
        key = change.paths[0] + (".bias" if change.parameter == "bias" else "")
        size = [D if own is None else own for own in change.kind.shape]
        weight = W if size == [D, D] else np.zeros(size)
        for strength in (1.0, 0.5):
            (got,) = change.deltas([weight], strength)
            np.testing.assert_allclose(got, deltas[key](strength), atol=1e-6, err_msg=key)
        done.add(key)
    assert done == set(deltas)


HUNYUAN = pair("diffusion_model.double_blocks.0.img_attn_qkv", b=np.tile(B, [3, 1]))
WHOLE = [f"double_blocks.{i}.img_attn.qkv.{end}" for i in range(3) for end in ("weight", "scale_weight")]
REFUSED = {  # name -> tensors (or bytes), header, what is said
    "13 CLIP of another size": (
        KOHYA | clip(a=A[:, :5]),
        {},
        r"\[8, 5\] \[out, in\], CLIP has .*ignore_unknown",
    ),
    "14 lora_A.bias": (
        pair(f"transformer.{Q}") | {f"transformer.{Q}.lora_A.bias": ROWS[:2]},
        {},
        r"1 keys of .*, --ignore_unknown .* applies the rest: .*to_q.lora_A.bias",
    ),
    "14 a LoRA of a norm": (
        pair("transformer.transformer_blocks.0.attn.norm_q", a=A[:, :4], b=B[:4]),
        {},
        "fits no layer of the model: its keys are like .*norm_q.lora_A",
    ),
    "15 Fill": (
        pair("transformer.x_embedder", a=np.tile(A, 2)[:, :24]) | pair(f"transformer.{Q}"),
        {},
        "of another FLUX: its x_embedder takes 16 inputs, that of this model 4; use a LoRA of FLUX.1",
    ),
    "15 narrower than FLUX": (
        pair("transformer.x_embedder", a=A[:, :2]),
        {},
        r"\[8, 2\] \[out, in\], the model has",
    ),
    "16 a magnitude alone": (
        {f"transformer.{Q}.lora_magnitude_vector": ROWS},
        {},
        "is incomplete: it has magnitude",
    ),
    "16 DoRA in the config alone": (
        pair(f"transformer.{Q}"),
        {"lora_adapter_metadata": '{"use_dora": true}'},
        "its config says DoRA, and the file has no magnitudes; fetch the whole file",
    ),
    "17 half a GLoRA": (
        {f"lycoris_{Q}.a1.weight": B, f"lycoris_{Q}.a2.weight": A},
        {},
        "is incomplete: it has a1, a2",
    ),
    "17 Tucker's LoKr": (
        {f"lycoris_{Q}.lokr_w1": TWO, f"lycoris_{Q}.lokr_w2": FOUR[..., None, None]},
        {},
        r"lokr_w2 of the LoRA is \[4, 4, 1, 1\], wanted a matrix: it is of another model",
    ),
    "18 one module, two names": (
        pair("lora_transformer_transformer_blocks_0_attn_to_q", DOWN_UP) | pair(f"transformer.{Q}"),
        {},
        "to_q twice, .*: keep one of them",
    ),
    "18 alpha in words": (
        pair(f"transformer.{Q}"),
        {"ss_network_alpha": "many"},
        "ss_network_alpha must be a finite number, got 'many'",
    ),
    "18 rank 0 in the header": (
        pair(f"transformer.{Q}"),
        {"ss_network_alpha": "1", "ss_network_dim": "0"},
        "rank must be a number above 0, got '0'",
    ),
    "19 cut": (b'\x64\0\0\0\0\0\0\0{"a": ', {}, "is not a whole safetensors file: it is cut off"),
    "19 an embedding": (
        {"clip_l": A, "t5xxl": A},
        {},
        "is a textual inversion .*; use one that was made for it",
    ),
    "19 empty": (b"", {}, "is empty: the download failed; fetch it again"),
    "19 Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", {}, "a Git LFS pointer"),
    "19 a login": (
        b'{"error": "Invalid username or password."}',
        {},
        "what a server answered .*; fetch it again",
    ),
    "19 no tensors": ({}, {"format": "pt"}, "it has no tensors; use one that was made for it"),
    "19 a web page": (b"<!DOCTYPE html><html>", {}, "is a web page, .*; fetch it again"),
    "19 a pickle": (b"\x80\x04\x95\n\0\0\0\0\0\0\0", {}, "is a pickle under another name"),
    "19 rank 0": (
        pair(f"transformer.{Q}", a=A[:0], b=B[:, :0]),
        {},
        r"a LoRA of rank 0: it holds nothing; fetch",
    ),
    "19 an FP8 model": (
        dict.fromkeys(WHOLE, W.astype("float32")),
        {},
        "is a whole model, not a LoRA: .*; give the file of",
    ),
    "19 an IP-Adapter": (
        dict.fromkeys([f"ip_adapter.{i}.to_k_ip.weight" for i in range(4)], A),
        {},
        "an IP-Adapter",
    ),
    "19 HunyuanVideo, as wide as FLUX": (
        HUNYUAN,
        {},
        "is a LoRA of HunyuanVideo, and fits no layer of this model",
    ),
    "20 NaN": (
        pair(f"transformer.{Q}", b=B * np.nan),
        {},
        "lora_B.weight of the LoRA holds NaN or infinity .*: use",
    ),
    "20 beyond float16": (
        pair(f"transformer.{Q}", b=(B * np.inf).astype("float16")),
        {},
        "holds NaN or infinity",
    ),
    "20 beyond reason": (pair(f"transformer.{Q}", b=B * 1e20), {}, "holds numbers beyond 1e\\+09"),
    "20 int8": (
        pair(f"transformer.{Q}", a=A.astype("int8"), b=B.astype("int8")),
        {},
        "2 tensors are I8, e.g.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path, name):
    tensors, header, said = REFUSED[name]
    file = tmp_path / "lora.safetensors"
    if isinstance(tensors, bytes):
        file.write_bytes(tensors)
    else:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, header)
    with pytest.raises(ConfigError, match=said) as caught:
        read_fitting(file, SHAPES)
    assert "\n" not in str(caught.value) and "lora.safetensors" in str(caught.value)


@pytest.mark.parametrize("beside", [True, False])
def test_pefts_folder_and_its_file_have_the_strength_of_the_config(tmp_path, beside):
    """Also where an editor of Windows wrote the config, with a byte order mark."""
    save_file(pair(f"base_model.model.{Q}"), tmp_path / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 0.5})
    (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8-sig")
    file = read_lora_file(tmp_path / "adapter_model.safetensors" if beside else tmp_path)
    assert file.modules[Q].scale == 0.25


@pytest.mark.parametrize("name", [name for name in READ if name.startswith(("12", "13", "18"))])
def test_it_is_converted_with_the_same_differences(tmp_path, name):
    tensors, header, *_ = READ[name]
    file, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, header)
    lora = read_lora_file(file)
    assert write_lora_file(out, lora.modules, {}, "diffusers", others=lora.others) < 1e-6
    assert read_fitting(out, SHAPES).what == read_fitting(file, SHAPES).what
