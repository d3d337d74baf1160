"""Writes the parts of a FLUX pipeline as a folder that diffusers (PyTorch) loads: its names, its [out, in]
layout.

The mirror of loading.py. Configs and tokenizer files that came from a folder are written as they were found.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn
from safetensors.paddle import save_file

from ppcoat.errors import ConfigError
from ppcoat.models.loading import TIED, linear_weights
from ppcoat.nn.fp8_weight import FP8Weight

SHARD_BYTES = 10_000_000_000
DIFFUSERS_VERSION = "0.32.2"  # the version whose folder layout is written
TRANSFORMERS_VERSION = "4.46.3"

MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

# Keys of ppdiffusers' AutoencoderKL that diffusers does not know; they are null in every FLUX folder.
_PPDIFFUSERS_KEYS = ("down_block_out_channels", "up_block_out_channels")
_CLIP_KEYS = [
    "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "pad_token_id",
    "projection_dim", "vocab_size",
]  # fmt: skip
_T5_KEYS = [
    "d_ff", "d_kv", "d_model", "decoder_start_token_id", "dense_act_fn", "dropout_rate",
    "eos_token_id", "feed_forward_proj", "initializer_factor", "is_encoder_decoder", "is_gated_act",
    "layer_norm_epsilon", "num_decoder_layers", "num_heads", "num_layers", "pad_token_id",
    "relative_attention_max_distance", "relative_attention_num_buckets", "tie_word_embeddings",
    "vocab_size",
]  # fmt: skip


def save_diffusers_model(model: nn.Layer, folder: Path, dtype: str | None = None) -> None:
    """A transformer or VAE as config.json and diffusion_pytorch_model*.safetensors."""
    config = getattr(model, "source_config", None) or _diffusers_config(model)
    write_json(folder / "config.json", config)
    save_weights(model, folder, "diffusion_pytorch_model", dtype)


def save_text_encoder(model: nn.Layer, folder: Path, dtype: str | None = None) -> None:
    """A CLIP or T5 encoder as config.json (transformers' keys) and model*.safetensors."""
    config = dict(getattr(model, "source_config", None) or _transformers_config(model))
    config["torch_dtype"] = dtype or _dtype_name(next(iter(model.parameters())))
    write_json(folder / "config.json", config)
    save_weights(model, folder, "model", dtype)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """scheduler_config.json with diffusers' class name."""
    write_json(folder / "scheduler_config.json", _diffusers_config(scheduler))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Copies the tokenizer's files from where it was loaded; one made in memory writes its own."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(tokenizer.init_kwargs.get("name_or_path") or "")
    if source.name and source.is_dir():
        for file in source.iterdir():
            if file.is_file() and file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        return
    tokenizer.save_pretrained(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("name_or_path", "special_tokens_map_file"):  # paths of this machine
        config.pop(key, None)
    write_json(folder / "tokenizer_config.json", config)


def save_weights(model: nn.Layer, folder: Path, stem: str, dtype: str | None = None) -> None:
    """The parameters of `model` in torch's layout: one safetensors file, or shards of 10 GB and an index.

    dtype: float32, bfloat16 or float16 (None: as they are). Raises ConfigError for another dtype, and if the
    model carries adapters or FP8 weights, which have no place in such a folder.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} cannot be saved: choose float32, bfloat16 or float16")
    adapted = [name for name, layer in model.named_sublayers() if hasattr(layer, "scale_multiplier")]
    if adapted:
        raise ConfigError(f"{adapted[0]} carries an adapter: unload or merge the LoRA before saving")
    quantised = [name for name, layer in model.named_sublayers() if isinstance(layer, FP8Weight)]
    if quantised:
        raise ConfigError(f"{quantised[0]} is stored in FP8: load the model unquantised to save it")
    folder.mkdir(parents=True, exist_ok=True)
    linears = linear_weights(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
    sizes = {name: t.size * paddle.empty([0], dtype or t.dtype).element_size() for name, t in tensors.items()}
    shards = cut_into_shards(sizes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        saved = {name: _as_saved(tensors[name], name in linears, dtype) for name in names}
        file = folder / f"{stem}{part}.safetensors"
        save_file(saved, str(file), metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes files that only their owner can read
        weight_map.update(dict.fromkeys(names, f"{stem}{part}.safetensors"))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(file: Path, content: dict) -> None:
    """Indented and with sorted keys, as diffusers writes them; makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def cut_into_shards(sizes: dict[str, int]) -> list[list[str]]:
    """Name -> bytes, in order -> the names of each shard: a new one before SHARD_BYTES would be passed."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _as_saved(tensor: paddle.Tensor, transpose: bool, dtype: str | None) -> paddle.Tensor:
    tensor = tensor.detach().cpu()
    tensor = tensor.t().contiguous() if transpose else tensor
    return tensor if dtype is None else tensor.astype(dtype)


def _diffusers_config(part: Any) -> dict:
    config = {k: v for k, v in part.config.items() if not k.startswith("_") and k not in _PPDIFFUSERS_KEYS}
    return {"_class_name": type(part).__name__, "_diffusers_version": DIFFUSERS_VERSION, **config}


def _transformers_config(model: nn.Layer) -> dict:
    """The config of an encoder made in memory, in transformers' keys."""
    clip = type(model).__name__ == "CLIPTextModel"
    config = {key: getattr(model.config, key) for key in (_CLIP_KEYS if clip else _T5_KEYS)}
    return {
        "architectures": [type(model).__name__],
        "model_type": "clip_text_model" if clip else "t5",
        "transformers_version": TRANSFORMERS_VERSION,
        **config,
    }


def _dtype_name(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]
