"""The components of FLUX that one file holds.

    flux1-dev.safetensors         Black Forest Labs' names; also in FP8, with scales or without; GGUF
    flux1-dev-fp8.safetensors     ComfyUI's checkpoints: model.diffusion_model., text_encoders., vae.
    clip_l, t5xxl, ae             encoders and autoencoder, each a file

Only headers and scales are read here; original_names.py knows the names, tensor_files.py reads the values,
flux/files.py says where the other components are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.models.flux.original_names import part_of, renamed, told_config
from ppcoat.models.gguf_files import PLAIN, is_gguf, read_gguf
from ppcoat.models.tensor_files import (
    FLOATS,
    FP8,
    PICKLES,
    FilePart,
    TensorInfo,
    check_not_quantised,
    map_tensor,
    read_header_and_metadata,
    warn_once,
)
from ppcoat.reading import json_object, read_json, shown

Tensors = dict[str, TensorInfo]

# What ComfyUI puts before a component's names -> the component; the longest that fits counts.
_PREFIXES = {
    "text_encoders.clip_l.transformer.": "text_encoders.clip_l",
    "text_encoders.clip_l.": "text_encoders.clip_l",
    "text_encoders.t5xxl.transformer.": "text_encoders.t5xxl",
    "text_encoders.t5xxl.": "text_encoders.t5xxl",
    "model.diffusion_model.": "model.diffusion_model",
    "diffusion_model.": "model.diffusion_model",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "transformer.": "transformer",
}
_FOREIGN = [  # whose names these are
    (r"lora_[AB]\b|lora[._](?:up|down)\b|lokr_w|hada_w|\.oft_|\.lora\.",
     "a LoRA, not a base model: give a model here, and this file where a LoRA is asked for"),
    (r"controlnet_(?:blocks|single_blocks|x_embedder)", "a ControlNet, wanted a FLUX.1 model"),
    (r"(?:double|single)_stream_modulation", "a FLUX.2 model, wanted FLUX.1"),
    (r"distilled_guidance_layer", "a Chroma model, wanted FLUX.1"),
    (r"joint_blocks\.\d|^(?:transformer\.)?pos_embed\.", "a Stable Diffusion 3 model, wanted FLUX.1"),
    (r"(?:input_blocks|output_blocks)\.\d|conditioner\.embedders|cond_stage_model\.",
     "a Stable Diffusion 1, 2 or XL model, wanted FLUX.1"),
    (r"transformer_blocks\.\d+\.(?:img|txt)_m(?:lp\.net|od\.1)", "a Qwen-Image model, wanted FLUX.1"),
    (r"individual_token_refiner", "a HunyuanVideo model, wanted FLUX.1"),
    (r"(?:^|\.)blocks\.\d+\.(?:self_attn|cross_attn)\.", "a Wan model, wanted FLUX.1"),
    (r"(?:noise|context)_refiner\.|layers\.\d+\.adaLN_modulation",
     "a Lumina, Z-Image or NewBie model, wanted FLUX.1"),
]  # fmt: skip
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of ComfyUI
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def components_in(file: Path, configs: Iterable[Path] = ()) -> dict[str, FilePart]:
    """The components that one file holds, by their folders' names.

    configs: folders whose config.json files count for what tensors do not tell, the first that fits. Raises
    ConfigError for a file that is no model of FLUX, is damaged, or is quantised in another way than FP8 with
    one scale a tensor or GGUF.
    """
    found, left = {}, []
    for tensors in _by_component(file).values():
        part = part_of(tensors)
        if part is None:
            left += tensors
            continue
        infos = renamed(part, tensors)
        found[part] = FilePart(file, part, _config(part, infos, file, configs), infos)
    if not found:
        raise ConfigError(
            f"{file} is no model of FLUX.1: its tensors are like {', '.join(sorted(left)[:3])}; take FLUX.1's"
        )
    left = [name for name in left if name not in ("logit_scale", "scaled_fp8")]
    if left:
        warn_once(f"{file}: {len(left)} tensors of no component of FLUX are left out, e.g. {left[0]}")
    return found


def _by_component(file: Path) -> dict[str, Tensors]:
    """The tensors of a file by the component that their prefixes name ("" without), the prefix taken off and
    scales put into the tensors that they are for."""
    if file.suffix in PICKLES:
        raise ConfigError(f"{file} is a pickle, and reading it can run code: convert it to .safetensors")
    if _SHARD.search(file.stem):
        raise ConfigError(f"{file} is one of several shards: give the folder that holds them all")
    if is_gguf(file):
        architecture, blocks = read_gguf(file)
        tensors = {
            name: TensorInfo(file, each.shape, True, each.type, each.start)
            if each.type in PLAIN
            else TensorInfo(file, each.shape, True, "F32", each.start, each.type)
            for name, each in blocks.items()
        }
        formats: Mapping[str, dict] = {}
        if architecture not in ("", "flux", "t5", "t5encoder"):
            raise ConfigError(f"{file} is a GGUF file of {architecture!r}, wanted flux: take FLUX.1's")
    else:
        tensors, metadata = read_header_and_metadata(file)
        formats = _formats(file, metadata)
    for pattern, what in _FOREIGN:
        if any(re.search(pattern, name) for name in tensors):
            raise ConfigError(f"{file} is {what}")
    check_not_quantised(file, tensors)
    found: dict[str, Tensors] = {}
    for name, info in _with_scales(file, tensors, formats).items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        found.setdefault(_PREFIXES.get(prefix, ""), {})[name.removeprefix(prefix)] = info
    return found


def _formats(file: Path, metadata: Mapping[str, str]) -> dict[str, dict]:
    """ComfyUI's table of quantised layers in the header, by their names."""
    what = f"{file}: _quantization_metadata in the header"
    try:
        said = json_object(metadata.get("_quantization_metadata", "{}").encode("utf-8", "replace"), what)
        return dict(said.get("layers", {}))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what} is damaged ({shown(error)})") from error


def _with_scales(file: Path, tensors: Tensors, formats: Mapping[str, dict]) -> Tensors:
    """The tensors without those that only say how others are stored, which do so now by themselves."""
    found, scales, formats = {}, {}, dict(formats)
    for name, info in tensors.items():
        layer, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale"):
            scales[f"{layer}.weight"] = _scale(name, info)
        elif last == "comfy_quant":
            formats[layer] = _json(name, info)
        elif last not in ("scale_input", "input_scale", "scaled_fp8"):  # activations' scales; a mark
            found[name] = info
    for layer, said in formats.items():
        kind = said.get("format") if isinstance(said, dict) else said
        if kind not in _FP8_FORMATS:
            wanted = ", ".join(_FP8_FORMATS)
            raise ConfigError(
                f"{file}: {layer} is quantised as {kind!r}, wanted {wanted}: take the file in FP8 or bfloat16"
            )
    for name, scale in scales.items():
        if scale == 1:
            continue  # also beside weights that are not in FP8
        if name not in found or found[name].stored not in FP8:
            raise ConfigError(f"{file}: there is a scale for {name}, which is not in FP8: fetch it again")
        found[name] = found[name]._replace(scale=scale)
    return found


def _scale(name: str, info: TensorInfo) -> float:
    """The one number of a scale."""
    if math.prod(info.shape) != 1 or info.dtype not in FLOATS:
        raise ConfigError(
            f"{info.file}: {name} is {info.dtype} {info.shape}, wanted one scale a tensor: take the file in "
            "bfloat16"
        )
    value = map_tensor(info).reshape(-1)
    if info.dtype == "BF16":
        value = (value.astype(np.uint32) << 16).view(np.float32)
    if not math.isfinite(value[0]):
        raise ConfigError(f"{info.file}: {name} is {value[0]}, wanted a finite scale: fetch it again")
    return float(value[0])


def _json(name: str, info: TensorInfo) -> dict:
    return json_object(bytes(map_tensor(info)), f"{info.file}: {name}")


def _config(part: str, infos: Tensors, file: Path, configs: Iterable[Path]) -> dict:
    """The config of a component of a file: what its tensors tell, and the rest from the first config.json
    that does not contradict them, or as FLUX.1 has it."""
    told, published, unsure = told_config(part, infos)
    for place in (file.parent / "config.json", *(folder / part / "config.json" for folder in configs)):
        if place.is_file():
            config = read_json(place)
            is_its = isinstance(config, dict) and component_kind(config) == part
            if is_its and all(config.get(key, value) == value for key, value in told.items()):
                return config | told
    if unsure:
        warn_once(
            f"{file}: {unsure} of its {part}, which is not of FLUX.1's size, are a guess: a folder with "
            f"{part}/config.json beside it would tell them"
        )
    return published | told


def component_kind(config: Mapping[str, object]) -> str | None:
    """The component of FLUX whose config.json this is, by its folder's name; None for another model."""
    names = [config.get("_class_name"), config.get("model_type"), *(config.get("architectures") or ())]
    return next((_KINDS[name] for name in names if isinstance(name, str) and name in _KINDS), None)


_KINDS = {
    "FluxTransformer2DModel": "transformer",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "clip_text_model": "text_encoder",
    "T5EncoderModel": "text_encoder_2",
    "t5": "text_encoder_2",
}
