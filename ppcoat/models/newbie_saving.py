"""Writes a NewBie-image folder from its four parts, as the original converter does: names and layout stay.
One tensor is in memory at a time.

transformer/ text_encoder/ clip_model/ vae/ model_index.json
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.loading import TensorInfo, in_file_order, map_tensor, read_header, read_json, tensor_infos
from ppcoat.models.newbie_checkpoint import tensor_infos_of_pth
from ppcoat.models.newbie_loading import check_newbie_folder, check_newbie_vae
from ppcoat.models.saving import write_json
from ppcoat.models.streaming import STEM, Layout, check_room, layout_bytes, write_file

# Name on the command line -> Paddle's, safetensors'.
DTYPES = {"bf16": ("bfloat16", "BF16"), "fp16": ("float16", "F16"), "fp32": ("float32", "F32")}
TRANSFORMER_CLASS = "NextDiT_3B_GQA_patch2_Adaln_Refiner_WHIT_CLIP"
MODEL_INDEX = {
    "_class_name": "NewbiePipeline",
    "_diffusers_version": "0.30.0",
    "transformer": ["transformer", TRANSFORMER_CLASS],
    "text_encoder": ["text_encoder", "Gemma3ForConditionalGeneration"],
    "tokenizer": ["text_encoder", "AutoTokenizer"],
    "clip_model": ["clip_model", "JinaCLIPModel"],
    "clip_tokenizer": ["clip_model", "AutoTokenizer"],
    "vae": ["vae", "AutoencoderKL"],
}
# The 3B model's, in the original converter's keys; a checkpoint does not tell them all.
CONFIG_3B = {
    "model_type": "nextdit_clip",
    "patch_size": 2,
    "dim": 2304,
    "n_layers": 36,
    "n_heads": 24,
    "n_kv_heads": 8,
    "in_channels": 16,
    "axes_dims": [32, 32, 32],
    "axes_lens": [1024, 512, 512],
    "clip_text_dim": 1024,
    "clip_img_dim": 1024,
    "_class_name": TRANSFORMER_CLASS,
}
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".py")  # configs, tokenizers, and code that nothing here runs
_FLOATS = ("F64", "F32", "F16", "BF16")


def write_newbie_folder(
    output: Path,
    transformer: dict[str, TensorInfo],
    parts: dict[str, Path],
    dtype: str,
    config: dict | None = None,
) -> None:
    """transformer: where its tensors lie; parts: "text_encoder", "clip_model" and "vae" -> folder. dtype: one
    of DTYPES, for all weights. config: transformer/config.json (None: CONFIG_3B and Gemma's width).

    Written whole or not at all, and checked as a model that is loaded is. Raises ConfigError for parts that
    do not fit, and, before anything is written, for a disk that has not enough room.
    """
    check_newbie_vae(parts["vae"])
    files = {Path("transformer") / f"{STEM}.safetensors": transformer}
    for name, folder in parts.items():
        tensor_infos(folder)  # raises for a folder without whole weights
        files |= {Path(name) / file.name: read_header(file) for file in sorted(folder.glob("*.safetensors"))}
    wanted = sum(layout_bytes(_layout(infos, dtype)) for infos in files.values())
    check_room(output.parent, wanted, f"{output.name} takes", "make room there, or choose another output")
    draft = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        for file, infos in files.items():
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            write_file(draft / file, _layout(infos, dtype), _values(infos, dtype), {"format": "pt"})
        if config is None:
            gemma = read_json(parts["text_encoder"] / "config.json")
            config = CONFIG_3B | {"cap_feat_dim": gemma.get("text_config", gemma).get("hidden_size", 2560)}
        write_json(draft / "transformer" / "config.json", config)
        for name, folder in parts.items():
            for file in folder.iterdir():
                if file.suffix in _TEXT_SUFFIXES and file.is_file():
                    shutil.copyfile(file, draft / name / file.name)
        write_json(draft / "model_index.json", MODEL_INDEX)
        check_newbie_folder(draft)
        draft.rename(output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def checkpoint_infos(file: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a .safetensors or .pth checkpoint lie. Raises ConfigError for other files."""
    if not file.is_file():
        raise ConfigError(f"no checkpoint at {file}; check the path")
    if file.suffix == ".safetensors":
        return read_header(file)
    if file.suffix in (".pth", ".pt"):
        return tensor_infos_of_pth(file)
    raise ConfigError(f"checkpoint {file}: came the ending '{file.suffix}', wanted .safetensors or .pth")


def _layout(infos: dict[str, TensorInfo], dtype: str) -> Layout:
    """Floats in another dtype, all else as it lies."""
    return {
        name: (DTYPES[dtype][1] if info.dtype in _FLOATS else info.dtype, info.shape)
        for name, info in in_file_order(infos)
    }


def _values(infos: dict[str, TensorInfo], dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """What `_layout` says, in its order."""
    for name, info in in_file_order(infos):
        values = map_tensor(info)
        if info.dtype in _FLOATS and info.dtype != DTYPES[dtype][1]:
            values = paddle.to_tensor(values).astype(DTYPES[dtype][0]).numpy()
        yield name, values
