"""Writes the parts of a FLUX pipeline as a folder that diffusers (PyTorch) loads: its names, its [out, in]
layout.

The mirror of loading.py. Configs and tokenizer files that came from a folder are written as they were found.

Below that: safetensors files, alone or as a component folder of shards, written tensor by tensor, so that one
is in memory at a time. The whole layout is known before the first byte, so that the room on the disk is
checked first and every shard's header can be written before its tensors.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import paddle
import paddle.nn as nn
from safetensors.paddle import save_file

from ppcoat.atomic import remove_dead_drafts, whole_file, whole_folder, write_text
from ppcoat.device import dtype_name
from ppcoat.errors import ConfigError
from ppcoat.models.flux.files import FLUX_CLASSES, INPUTS_OF_CLASS
from ppcoat.models.loading import TIED, linear_weights
from ppcoat.nn.base_weight import BaseWeight

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
_log = logging.getLogger(__name__)

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
_ALIGNMENT = 64  # of the first byte of data in a shard

Layout = dict[str, tuple[str, list[int]]]  # name -> dtype as safetensors names it, shape


def save_component(part: Any, folder: Path, dtype: str | None = None) -> None:
    """A component of a FLUX pipeline as the folder that is named after it; dtype is that of weights. One that
    is there is replaced: of its files, those without a successor would still be read."""
    with whole_folder(folder, replace=True) as target:
        if folder.name in ("transformer", "vae"):
            save_diffusers_model(part, target, dtype)
        elif folder.name.startswith("text_encoder"):
            save_text_encoder(part, target, dtype)
        elif folder.name == "scheduler":
            save_scheduler(part, target)
        else:
            save_tokenizer(part, target)


def save_diffusers_model(model: nn.Layer, folder: Path, dtype: str | None = None) -> None:
    """A transformer or VAE as config.json and diffusion_pytorch_model*.safetensors."""
    config = dict(getattr(model, "source_config", None) or _diffusers_config(model))
    own = model.config
    if own.get("in_channels") != config.get("in_channels", own.get("in_channels")):
        config |= {"in_channels": own["in_channels"], "out_channels": own["out_channels"]}
    write_json(folder / "config.json", config)
    save_weights(model, folder, "diffusion_pytorch_model", dtype)


def class_that_draws(transformer: nn.Layer, said: str) -> str:
    """diffusers' class that draws with a FLUX transformer: by what it sees beside the noise, and if that is
    nothing, the class that was `said`."""
    times = transformer.config.in_channels // transformer.out_channels
    by_inputs = {INPUTS_OF_CLASS.get(name, 1): name for name in FLUX_CLASSES}
    if times in by_inputs and times > 1:
        return by_inputs[times]
    return said if said in FLUX_CLASSES and said not in INPUTS_OF_CLASS else "FluxPipeline"


def save_text_encoder(model: nn.Layer, folder: Path, dtype: str | None = None) -> None:
    """A CLIP or T5 encoder as config.json (transformers' keys) and model*.safetensors."""
    config = dict(getattr(model, "source_config", None) or _transformers_config(model))
    config["torch_dtype"] = dtype or dtype_name(next(iter(model.parameters())).dtype)
    write_json(folder / "config.json", config)
    save_weights(model, folder, "model", dtype)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """scheduler_config.json with diffusers' class name."""
    write_json(folder / "scheduler_config.json", _diffusers_config(scheduler))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Copies the tokenizer's files from where it was loaded; one made in memory writes its own."""
    source = Path(tokenizer.init_kwargs.get("name_or_path") or "")
    if source.name and source.is_dir():
        for file in source.iterdir():
            if file.is_file():
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
    model carries adapters or quantised weights, which have no place in such a folder.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} cannot be saved: choose float32, bfloat16 or float16")
    adapted = [name for name, layer in model.named_sublayers() if hasattr(layer, "scale_multiplier")]
    if adapted:
        raise ConfigError(f"{adapted[0]} carries an adapter: unload or merge the LoRA before saving")
    quantised = [(name, layer) for name, layer in model.named_sublayers() if isinstance(layer, BaseWeight)]
    for name, weight in quantised[:1]:
        raise ConfigError(f"{name} is stored in {weight.name}: load the model unquantised to save it")
    folder.mkdir(parents=True, exist_ok=True)
    linears = linear_weights(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
    sizes = {name: t.size * paddle.empty([0], dtype or t.dtype).element_size() for name, t in tensors.items()}
    shards = cut_into_shards(sizes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        saved = {name: _as_saved(tensors[name], name in linears, dtype) for name in names}
        with whole_file(folder / f"{stem}{part}.safetensors") as draft:
            save_file(saved, str(draft), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, f"{stem}{part}.safetensors"))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(file: Path, content: dict) -> None:
    """Indented and with sorted keys, as diffusers writes them; makes the folder."""
    write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


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


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout. Raises ConfigError for a dtype that cannot be written."""
    return sum(_nbytes(entry) for entry in layout.values())


def check_room(place: Path, wanted: int, what: str, advice: str) -> None:
    """Raise ConfigError with both numbers unless the disk of the folder `place`, which is made, has `wanted`
    bytes free. what: "the copy takes". advice: what to do."""
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ConfigError(f"{what} {wanted / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free: {advice}")


def write_component(
    folder: Path,
    config: dict,
    layout: Layout,
    tensors: Iterable[tuple[str, np.ndarray]],
    metadata: dict[str, str],
) -> None:
    """`folder`, replaced if it is there: config.json, shards, and an index with the CRC-32 of each tensor.

    tensors: (name, values) in the order of `layout`, bfloat16 as uint16. metadata goes into the header of
    every shard. Raises OSError (disk full) with an earlier folder untouched.
    """
    for left in remove_dead_drafts(folder.parent, folder.name):  # perhaps many GB
        _log.warning("removing %s, which a stopped process left unfinished", left)
    with whole_folder(folder, replace=True) as part:
        write_json(part / "config.json", config)
        shards = cut_into_shards({name: _nbytes(entry) for name, entry in layout.items()})
        stream, sums, weight_map = iter(tensors), {}, {}
        for number, names in enumerate(shards, 1):
            file = part / f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
            sums |= write_file(file, {name: layout[name] for name in names}, stream, metadata)
            weight_map |= dict.fromkeys(names, file.name)
        said = {"total_size": layout_bytes(layout), "crc32": sums}
        write_json(part / INDEX, {"metadata": said, "weight_map": weight_map})


def shard_metadata(file: Path) -> dict[str, str]:
    """What a shard's header says beside its tensors. Raises ValueError for a file without a header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, file.stat().st_size)))
    return header.get("__metadata__", {})


def write_file(
    file: Path, layout: Layout, stream: Iterator[tuple[str, np.ndarray]], metadata: dict[str, str]
) -> dict[str, int]:
    """The next tensors of the stream, (name, values) in the order of `layout`, bfloat16 as uint16, as one
    safetensors file in a draft -> name -> CRC-32. Raises OSError (disk full)."""
    header: dict = {"__metadata__": metadata}
    end = 0
    for name, entry in layout.items():
        start, end = end, end + _nbytes(entry)
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    sums = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for wanted in layout:
            # no name is bound here, or this tensor would still be there while the next one is made
            sums[wanted] = _write_tensor(out, (wanted, _nbytes(layout[wanted])), *next(stream))
    return sums


def _write_tensor(out: BinaryIO, wanted: tuple[str, int], name: str, values: np.ndarray) -> int:
    """-> CRC-32. wanted: the name and number of bytes that the header speaks of."""
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    assert (name, data.size) == wanted, (name, data.size, wanted)
    out.write(data)
    return zlib.crc32(data)


def _nbytes(entry: tuple[str, list[int]]) -> int:
    if entry[0] not in _BYTES:
        raise ConfigError(f"{entry[0]} numbers cannot be written; wanted one of {', '.join(_BYTES)}")
    return _BYTES[entry[0]] * int(np.prod(entry[1]))
