"""Components of FLUX as other programs keep them in one file: their tensors' names, and the config that the
tensors tell.

`renamed` turns Black Forest Labs' names of the transformer and of the autoencoder, and llama.cpp's of T5,
into those of a diffusers folder; names that are those already stay. A matrix that fuses several Linears is
cut by rows, without reading it. `told_config` is what shapes tell; what they cannot tell (rotary axes,
CLIP's heads, groups of the autoencoder's norms) is that of the published FLUX.1.

Source: black-forest-labs/flux (model.py, modules/autoencoder.py), ComfyUI-GGUF's names of T5.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ppcoat.errors import ConfigError
from ppcoat.models.flux import ATTENTION_AND_MLP, HALVES_SWAPPED, MODULATION, NORMS, OUTSIDE_BLOCKS
from ppcoat.models.tensor_files import Component, TensorInfo, config_file, sizes_of
from ppcoat.reading import shown

Infos = Mapping[str, TensorInfo]
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")
_MLP_SHARE = 4  # rows of the MLP in single blocks for each of q's
# A model of other inputs than FLUX.1-dev's 64 -> which it is.
_OTHER_INPUTS = {96: "an inpainting FLUX"}
_LDM = [  # autoencoder: Black Forest Labs' name -> diffusers'
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(coder)\.norm_out\.", r"\1.conv_norm_out."),
]
_LLAMA = [  # T5: llama.cpp's name -> transformers'
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"^enc\.blk\.(\d+)\.attn_rel_b\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
]


_TABLE = re.compile(r"embedding\.weight$|^shared\.|embed_tokens\.|attention_bias\.")  # matrices of no Linear


class ToldConfig(NamedTuple):
    """What a component's config.json would hold. told: keys that the tensors tell. published: keys that they
    do not, as FLUX.1 has them. unsure: what of those is a guess at these sizes, "" for nothing."""

    told: dict
    published: dict
    unsure: str = ""


class _Part(NamedTuple):
    """marks: a name that only this component has, under either set of names. ignored: what files keep beside
    its weights."""

    marks: str
    renamed: Callable[[Infos], dict[str, TensorInfo]]
    config: Callable[[Infos], ToldConfig]
    ignored: tuple[str, ...] = ()


def part_of(names: Mapping[str, object]) -> str | None:
    """The component whose tensors have these names, by its folder's name; None for no component of FLUX."""
    parts = (part for part, known in _PARTS.items() if any(re.match(known.marks, name) for name in names))
    return next(parts, None)


def renamed(part: str, infos: Infos) -> dict[str, TensorInfo]:
    """The tensors of a component under the names of a diffusers folder. Raises ConfigError for a fused matrix
    that cannot be cut."""
    known = _PARTS[part]
    return known.renamed({name: info for name, info in infos.items() if name not in known.ignored})


def told_config(part: str, infos: Infos) -> ToldConfig:
    """The config of a component, from its tensors under diffusers' names. Raises ConfigError for a missing
    tensor that is needed for it, and for a model that is not drawn with."""
    try:
        return _PARTS[part].config(infos)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        file = next(iter(infos.values())).file
        why = f"missing {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{file}: the tensors of its {part} are incomplete ({why}): fetch it again"
        ) from error


def check_sizes(part: str, component: Component, infos: Infos) -> None:
    """Raises ConfigError unless the sizes in the config of a component are those of its tensors: so a model
    that is built from the config has no more layers and numbers than its files."""
    config = sizes_of(component, part)
    told = told_config(part, {name: _as_torch(name, info) for name, info in infos.items()}).told
    if part == "transformer":
        told.setdefault("out_channels", told["in_channels"])
    for key, wanted in told.items():
        came = getattr(config, key)
        if came != wanted and (came, key) != (None, "out_channels"):
            raise ConfigError(
                f"{config_file(component, part)}: {key}: came {shown(came)}, but the weights are of "
                f"{shown(wanted)}: take config.json and all weights from one model"
            )


def _as_torch(name: str, info: TensorInfo) -> TensorInfo:
    """The matrix of a Linear of a file in Paddle's layout as torch has it."""
    turned = not info.torch_layout and len(info.shape) == 2 and not _TABLE.search(name)
    return info._replace(shape=info.shape[::-1]) if turned else info


def _transformer_names(infos: Infos) -> dict[str, TensorInfo]:
    found = {}
    for name, info in infos.items():
        module, _, kind = name.rpartition(".")
        match = _BLOCK.fullmatch(module)
        blocks, index, inside = match.groups() if match else ("", "", module)
        paths = _TABLES[blocks].get(inside)
        if paths is None:
            found[name] = info
            continue
        block = f"{_BLOCKS[blocks]}.{index}." if match else ""
        if paths == (HALVES_SWAPPED,):
            info = info._replace(first_row=info.shape[0] // 2)
        kind = "weight" if kind == "scale" else kind
        for path, part in zip(paths, _cut(name, info, len(paths)), strict=True):
            found[f"{block}{path}.{kind}"] = part
    return found


def _cut(name: str, info: TensorInfo, parts: int) -> list[TensorInfo]:
    """The rows of each Linear that a fused matrix or bias holds: q, k, v and, as a fourth, the MLP."""
    if parts == 1:
        return [info]
    shares = [1, 1, 1, _MLP_SHARE][:parts]
    unit, rest = divmod(info.shape[0], sum(shares))
    if rest:
        raise ConfigError(f"{info.file}: {name} {info.shape} is not {parts} parts: fetch it again")
    starts = [unit * sum(shares[:i]) for i in range(parts)]
    return [info.rows(start, start + unit * share) for start, share in zip(starts, shares, strict=True)]


def _vae_names(infos: Infos) -> dict[str, TensorInfo]:
    found = {_substituted(_LDM, name): info for name, info in infos.items()}
    if any(name.startswith("decoder.up.") for name in infos):  # Black Forest Labs counts them from the end
        last = max(_indices(found, r"decoder\.up_blocks\.(\d+)\."))
        found = {
            re.sub(r"^(decoder\.up_blocks\.)(\d+)", lambda m: f"{m[1]}{last - int(m[2])}", name): info
            for name, info in found.items()
        }
    for name, info in found.items():  # a convolution of one pixel is a Linear
        if ".attentions.0.to_" in name and info.shape[2:] == [1, 1]:
            found[name] = info._replace(shape=info.shape[:2])
    return found


def _t5_names(infos: Infos) -> dict[str, TensorInfo]:
    found = {_substituted(_LLAMA, name): info for name, info in infos.items()}
    if "shared.weight" not in found and "encoder.embed_tokens.weight" in found:
        found["shared.weight"] = found.pop("encoder.embed_tokens.weight")
    return found


def _transformer_config(infos: Infos) -> ToldConfig:
    width, inputs = infos["x_embedder.weight"].shape
    file, head = infos["x_embedder.weight"].file, infos["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    if inputs in _OTHER_INPUTS:
        raise ConfigError(
            f"{file} is {_OTHER_INPUTS[inputs]} ({inputs} inputs a token, wanted 64): not drawn with or "
            "trained yet; take FLUX.1-dev or FLUX.1-schnell"
        )
    told = {
        "in_channels": inputs,
        "num_layers": _count(infos, r"transformer_blocks\.(\d+)\."),
        "num_single_layers": _count(infos, r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": infos["context_embedder.weight"].shape[1],
        "pooled_projection_dim": infos["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in infos,
    }
    outputs = infos["proj_out.weight"].shape[0] if "proj_out.weight" in infos else inputs
    if outputs != inputs:
        told["out_channels"] = outputs
    sides = 7 * head // 16 // 2 * 2  # 56 of 128, even
    published = {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "axes_dims_rope": [head - 2 * sides, sides, sides],
    }
    axes = f"the rotary axes {published['axes_dims_rope']}"
    return ToldConfig(told, published, "" if head == 128 else axes)


def _vae_config(infos: Infos) -> ToldConfig:
    stages = _count(infos, r"encoder\.down_blocks\.(\d+)\.")
    channels = [
        infos[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(stages)
    ]  # fmt: skip
    told = {
        "block_out_channels": channels,
        "layers_per_block": _count(infos, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": infos["decoder.conv_in.weight"].shape[1],
        "in_channels": infos["encoder.conv_in.weight"].shape[1],
        "out_channels": infos["decoder.conv_out.weight"].shape[0],
        "use_quant_conv": "quant_conv.weight" in infos,
        "use_post_quant_conv": "post_quant_conv.weight" in infos,
    }
    published = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "force_upcast": True,
        "norm_num_groups": math.gcd(32, *channels),
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    }
    return ToldConfig(told, published, "" if channels[0] == 128 else "32 groups of the norms")


def _clip_config(infos: Infos) -> ToldConfig:
    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    vocabulary, width = infos[f"{embeddings}.token_embedding.weight"].shape
    told = {
        "hidden_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": infos[f"{embeddings}.position_embedding.weight"].shape[0],
        "intermediate_size": infos[f"{layers}.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(infos, rf"{re.escape(layers)}\.(\d+)\."),
    }
    published = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "num_attention_heads": max(1, width // 64),
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,  # of the files before transformers 4.30: the pooled token is the highest, the last
        "pad_token_id": 1,
    }
    return ToldConfig(told, published, "" if width % 64 == 0 else f"{max(1, width // 64)} heads")


def _t5_config(infos: Infos) -> ToldConfig:
    first = "encoder.block.0.layer"
    buckets, heads = infos[f"{first}.0.SelfAttention.relative_attention_bias.weight"].shape
    vocabulary, width = infos["shared.weight"].shape
    told = {
        "d_model": width,
        "vocab_size": vocabulary,
        "d_ff": infos[f"{first}.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": infos[f"{first}.0.SelfAttention.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "num_layers": _count(infos, r"encoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": buckets,
    }
    published = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06,
        "relative_attention_max_distance": 128,
        "num_decoder_layers": told["num_layers"],
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return ToldConfig(told, published)


def _substituted(table: list[tuple[str, str]], name: str) -> str:
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def _indices(names: Mapping[str, object], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _count(names: Mapping[str, object], pattern: str) -> int:
    return len(_indices(names, pattern))


# Block list of Black Forest Labs, "" outside of them -> {module: diffusers' paths of its rows, from the top}.
_TABLES = {
    bfl: ATTENTION_AND_MLP[blocks] | MODULATION[blocks] | NORMS[blocks] for bfl, blocks in _BLOCKS.items()
} | {"": OUTSIDE_BLOCKS}
_PARTS = {
    "transformer": _Part(
        r"(img_in\.|double_blocks\.0\.img_attn\.|transformer_blocks\.0\.attn\.add_q_proj\.)",
        _transformer_names,
        _transformer_config,
    ),
    "vae": _Part(r"(en|de)coder\.conv_in\.", _vae_names, _vae_config),
    "text_encoder": _Part(
        r"text_model\.embeddings\.token_embedding\.",
        dict,
        _clip_config,
        ("logit_scale", "text_projection.weight", "transformer.text_projection.weight"),
    ),
    "text_encoder_2": _Part(
        r"(encoder\.block\.0\.layer\.0\.SelfAttention\.|enc\.blk\.0\.attn_q\.)",
        _t5_names,
        _t5_config,
        ("logit_scale", "spiece_model"),
    ),
}
