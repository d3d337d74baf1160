"""Adapter files on the disk: a file or a folder -> its tensors, its header and PEFT's config beside it.

What they mean is in parse.py. Pickle files are refused: reading one can run code. So are integers, which no
LoRA is made of. What is no safetensors file at all is named as what its first bytes say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from pathlib import Path

import numpy as np
import paddle
from safetensors import safe_open

from ppcoat.errors import ConfigError
from ppcoat.models.headers import read_entries
from ppcoat.models.tensor_files import PICKLES
from ppcoat.reading import CONFIG_BYTES, json_value, regular_bytes

from .header import ADAPTER_METADATA, ROTATIONS
from .keys import clean, whole_model
from .parse import LoRAFile, parse_lora

SHOWN_KEYS = 5
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of an adapter directory
_USUAL_NAMES = (WEIGHTS, "pytorch_lora_weights.safetensors", "paddle_lora_weights.safetensors")
_PEFT_TYPES = ("LORA", "LOKR", "LOHA", "LYCORIS")  # peft_type of kinds with an alpha; NewBie's trainer's last
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # of LoRAs, as safetensors names them


def read_lora_file(
    path: str | Path,
    paths: Set[str] | None = None,
    incomplete_too: bool = False,
    weight_name: str | None = None,
) -> LoRAFile:
    """A .safetensors file, or a folder with one -> LoRAFile; `paths` and `incomplete_too` as in `parse_lora`.

    weight_name: the file in the folder. PEFT's adapter_config.json beside the file is read too. Raises
    ConfigError for pickles, for missing or damaged files, and as `parse_lora` does.
    """
    file = adapter_file(path, weight_name)
    tensors, header = read_tensors_and_header(file)
    header |= _config_beside(file, tensors)
    try:
        return parse_lora(tensors, header, paths, incomplete_too)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_known(
    file: LoRAFile,
    name: str,
    ignore_unknown: bool = False,
    advice: str = "--ignore_unknown (ignore_unknown=True) applies the rest",
) -> None:
    """Raises ConfigError for a file of another model, for one that does nothing here, and, unless they are to
    be ignored, for keys that name nothing. name: of the file, advice: what ignores such keys, for messages.
    """
    listed = ", ".join(clean(key) for key in file.unknown[:SHOWN_KEYS])
    listed += f" and {len(file.unknown) - SHOWN_KEYS} more" if len(file.unknown) > SHOWN_KEYS else ""
    if file.foreign:
        raise ConfigError(
            f"{name} is {file.foreign}, and fits no layer of this model: its keys are like {listed}; use one "
            "that was made for it"
        )
    if not file.changes:
        has = f"its keys are like {listed}" if listed else "it has no tensors"
        raise ConfigError(f"{name} fits no layer of the model: {has}; use one that was made for it")
    if file.unknown and not ignore_unknown:
        raise ConfigError(
            f"{len(file.unknown)} keys of {name} name nothing that this model has, {advice}: {listed}"
        )


def adapter_file(path: str | Path, weight_name: str | None = None) -> Path:
    """The file of an adapter that is given as a file or as a folder. Raises ConfigError unless there is one
    to choose."""
    path = Path(path)
    if not path.is_dir():
        return path
    if weight_name is not None:
        return path / weight_name
    found = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", *PICKLES))
    usual = [name for name in _USUAL_NAMES if name in found]
    tensors = usual[:1] or [name for name in found if name.endswith(".safetensors")] or found
    if len(tensors) != 1:
        has = f"it has {', '.join(found[:6])}" if found else f"it has no {WEIGHTS} and no other .safetensors"
        raise ConfigError(f"{path} is a folder, wanted one LoRA file: {has}; name the file")
    return path / tensors[0]


def read_tensors_and_header(file: Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """`tensors_and_header` of a file that comes from anywhere: each tensor in the dtype that it
    has there; any shape. Raises ConfigError for a pickle, which is not read, and for a missing or damaged
    file."""
    if file.suffix in PICKLES:
        raise ConfigError(f"{file.name} is a pickle, and reading it can run code: convert it to .safetensors")
    if not file.is_file():
        raise ConfigError(f"no LoRA file at {file}: check the path")
    if file.suffix not in (".safetensors", ".sft"):
        raise ConfigError(f"a LoRA file is a .safetensors, got {file}: rename it if it is one")
    return tensors_and_header(file)


def tensors_and_header(file: Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """What a safetensors file holds, whatever its name: each tensor in the dtype that it has there, any
    shape; and the header. Raises ConfigError for a missing or damaged one, for a whole model, for tensors
    without numbers and for dtypes that no LoRA has."""
    read_entries(file)
    with safe_open(str(file), framework="paddle") as content:
        keys = list(content.keys())
        whole = whole_model(keys)
        if whole:
            raise ConfigError(
                f"{file} is {whole}: its keys are like {clean(keys[0])}; give the file of a LoRA"
            )
        slices = {key: content.get_slice(key) for key in keys}
        odd = {key: part.get_dtype() for key, part in slices.items()
               if part.get_dtype() not in FLOATS and int(np.prod(part.get_shape())) != 1}  # fmt: skip
        if odd:
            key, dtype = next(iter(odd.items()))
            raise ConfigError(
                f"{file}: {len(odd)} tensors are {dtype}, e.g. {key!r}: no dtype of a LoRA, wanted one of "
                f"{', '.join(FLOATS)}"
            )
        empty = [key for key, part in slices.items() if 0 in part.get_shape()]
        if empty:
            raise ConfigError(
                f"{file}: {empty[0]!r} is {slices[empty[0]].get_shape()}, a LoRA of rank 0: it holds "
                "nothing; fetch another"
            )
        return {key: content.get_tensor(key) for key in keys}, dict(content.metadata() or {})


def _config_beside(file: Path, keys: Iterable[str]) -> dict[str, str]:
    """What PEFT's config beside a file adds to its header; {} for a file that is not PEFT's."""
    config = file.parent / CONFIG
    of_peft = file.name == WEIGHTS or any(key.startswith("base_model.model.") for key in keys)
    if not (of_peft and config.is_file()):
        return {}
    said = _read_config(config)
    if said.get("peft_type") in ROTATIONS:
        return {ADAPTER_METADATA: json.dumps(said)}
    alpha = said["lora_alpha"] if "lora_alpha" in said else said["alpha"]
    return {"lora_rank": str(said["r"]), "lora_alpha": str(alpha), ADAPTER_METADATA: json.dumps(said)}


def _read_config(file: Path) -> dict:
    try:
        config = json_value(regular_bytes(file, CONFIG_BYTES).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}): fetch it again, it belongs beside {WEIGHTS}"
        ) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind in ROTATIONS:
        return config
    if kind is not None and kind not in _PEFT_TYPES:
        raise ConfigError(
            f"{file.parent} is an adapter of PEFT's kind {str(kind)[:40]!r}, which is not known here, only "
            f"{', '.join((*_PEFT_TYPES, *ROTATIONS))}"
        )
    if not isinstance(config, dict) or "r" not in config or not {"alpha", "lora_alpha"} & config.keys():
        raise ConfigError(
            f"{file} lacks r and lora_alpha, without which the strength is unknown: fetch it again"
        )
    return config
