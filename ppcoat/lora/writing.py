"""The LoRA of a model written to a file, in three formats (see files.py), and read back before the file takes
its name.

alpha / rank is folded into B, so that every loader comes to a scale of 1. The header has our own fields,
diffusers' `lora_adapter_metadata` (a PEFT config as JSON, keys prefixed `transformer.`) or kohya's
`ss_network_*`, and ai-toolkit's `training_info`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.paddle import save

from ppcoat.atomic import whole_file
from ppcoat.errors import ConfigError

from . import flux_names
from .delta import LoRAModule, LoRASummary, relative_difference, summarize, worst
from .files import ADAPTER_METADATA, LoRAFile, parse_lora, tensors_and_header
from .layer import lora_layers

FORMATS = ("diffusers", "kohya", "paddle")
LORA_DTYPES = ("float32", "bfloat16", "float16")
READ_BACK_ERROR = 1e-6  # of delta-W, relative
IN_OUT = "lora_A [in, rank], lora_B [rank, out]"  # the field `layout` of a file in Paddle's layout


def save_lora(
    path: str | Path,
    model: nn.Layer,
    *,
    trigger_word: str = "",
    step: int | None = None,
    base_model: str = "",
    dtype: str = "float32",
    file_format: str = "diffusers",
    extra: Mapping[str, str] | None = None,
) -> LoRASummary:
    """Write the LoRA of `model` to `path` (.safetensors), whole or not at all, and read it back.
    `scale_multiplier` is not written.

    file_format: "diffusers", "kohya" or "paddle". The header has rank, alpha (= rank), original_alpha,
    trigger_word, step, base_model, the format's own fields and ai-toolkit's training_info; `extra` adds text
    fields. Returns norms of delta-W. Raises ConfigError for a wrong path, dtype or format, or if there is no
    LoRA; OSError if the file does not hold what was written.
    """
    modules = lora_modules(model)
    if not modules:
        raise ConfigError("the model has no LoRA to save")
    alphas = [module.alpha for module in modules.values()]
    fields = {**dict(extra or {}), **_header_of_training(trigger_word, step, base_model, alphas)}
    error = write_lora_file(path, modules, fields, file_format, dtype)
    return replace(summarize(modules), error=error)


def lora_modules(model: nn.Layer) -> dict[str, LoRAModule]:
    """The LoRA of `model` as {path: LoRAModule}, without `scale_multiplier`."""
    return {
        path: LoRAModule(_transposed(layer.lora_A), _transposed(layer.lora_B), layer.alpha)
        for path, layer in lora_layers(model).items()
    }


def write_lora_file(
    path: str | Path,
    modules: Mapping[str, LoRAModule],
    fields: Mapping[str, str],
    file_format: str = "diffusers",
    dtype: str = "float32",
) -> float:
    """Write `modules` {diffusers path: LoRAModule} whole or not at all; `fields` goes into the header.

    The file is read again before it takes its name, and every delta-W compared: one that differs by more than
    1e-6 from what was to be written raises OSError. Returns the largest relative error of a delta-W, which is
    that of the rounding to `dtype`. Raises ConfigError for a wrong path, format or dtype, if there is no
    module, and for numbers that `dtype` cannot hold.
    """
    path = Path(path)
    _check_target(path, modules, file_format, dtype)
    named = _named(modules, file_format)
    header = {**fields, **_header_of_tensors(named, file_format)}
    with whole_file(path) as draft:
        draft.write_bytes(save(_to_tensors(named, file_format, dtype), header))
        # kohya's fused modules have names beside those in `modules`, but only FLUX's have them
        paths = None if file_format == "kohya" else modules.keys()
        found = parse_lora(*tensors_and_header(draft), paths)
        return _compare(found, modules, path.name, dtype)


def _check_target(path: Path, modules: Mapping[str, LoRAModule], file_format: str, dtype: str) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(f"a LoRA is saved as .safetensors, got {path.name}")
    if file_format not in FORMATS:
        raise ConfigError(f"LoRA format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    if dtype not in LORA_DTYPES:
        raise ConfigError(f"LoRA dtype must be one of {', '.join(LORA_DTYPES)}, got {dtype!r}")
    if not modules:
        raise ConfigError("there is no LoRA to save")


def _named(modules: Mapping[str, LoRAModule], file_format: str) -> dict[str, LoRAModule]:
    """Names in the file, without suffix -> modules with alpha = rank."""
    if file_format == "kohya":
        fused = flux_names.fuse(modules)
        return {f"lora_unet_{name.replace('.', '_')}": module for name, module in fused.items()}
    return {path: module.folded() for path, module in modules.items()}


def _header_of_tensors(modules: Mapping[str, LoRAModule], file_format: str) -> dict[str, str]:
    """The fields that speak of the tensors. `modules`: as they are written, names and all, alpha = rank
    because the weights are folded.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    header = {
        "format": "pt",
        "rank": str(rank),
        "alpha": str(rank),
        "software": json.dumps({"name": "ppcoat"}),
    }
    if file_format == "paddle":
        header |= {"format": "pd", "layout": IN_OUT}
    elif file_format == "kohya":
        header |= {
            "ss_network_module": "networks.lora_flux",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
        }
    else:
        header[ADAPTER_METADATA] = _adapter_text(ranks, rank)
    return header


def _header_of_training(
    trigger_word: str, step: int | None, base_model: str, alphas: Iterable[float]
) -> dict[str, str]:
    """The fields that speak of the training. `alphas`: as trained, before they were folded."""
    alphas = sorted(set(alphas))
    header = {
        "original_alpha": f"{alphas[0]:g}" if len(alphas) == 1 else json.dumps(alphas),
        "trigger_word": trigger_word,
        "base_model": base_model,
    }
    if step is not None:
        header |= {"step": str(step), "training_info": json.dumps({"step": step})}
    return header


def _adapter_text(ranks: Mapping[str, int], rank: int) -> str:
    """diffusers' adapter metadata for ranks per path, `rank` being the usual one."""
    # "^": the whole path; PEFT would take "proj_out" for the proj_out of every block too
    anchored = {f"^{path}": own for path, own in ranks.items() if own != rank}
    adapter = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": anchored,
        "alpha_pattern": anchored,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return json.dumps({f"transformer.{key}": value for key, value in adapter.items()}, indent=2)


def _to_tensors(named: Mapping[str, LoRAModule], file_format: str, dtype: str) -> dict[str, paddle.Tensor]:
    tensors = {}
    for name, module in named.items():
        if file_format == "diffusers":
            tensors[f"transformer.{name}.lora_A.weight"] = _tensor(module.a, dtype)
            tensors[f"transformer.{name}.lora_B.weight"] = _tensor(module.b, dtype)
        elif file_format == "kohya":
            tensors[f"{name}.lora_down.weight"] = _tensor(module.a, dtype)
            tensors[f"{name}.lora_up.weight"] = _tensor(module.b, dtype)
            tensors[f"{name}.alpha"] = _tensor(np.array(module.alpha), "float32")  # exact for every rank
        else:
            tensors[f"{name}.lora_A"] = _tensor(module.a.T, dtype)
            tensors[f"{name}.lora_B"] = _tensor(module.b.T, dtype)
    return tensors


def _compare(found: LoRAFile, modules: Mapping[str, LoRAModule], name: str, dtype: str) -> float:
    """Compare what lies on the disk with `modules`. Returns the largest relative error of a delta-W."""
    errors = []
    for path, module in modules.items():
        written = found.modules.get(path)
        if not relative_difference(written, _rounded(module, dtype)) <= READ_BACK_ERROR:
            raise OSError(
                f"{name}: delta-W of {path} is not in the file as it was written; nothing was saved"
            )
        errors.append(relative_difference(written, module))
        if not math.isfinite(errors[-1]) and math.isfinite(module.norm()):
            raise ConfigError(f"delta-W of {path} does not fit into {dtype}: save as bfloat16 or float32")
    # Only all-zero filler modules, which stand for absent parts of a fused module, may be extra.
    extra = [path for path in found.modules if path not in modules and found.modules[path].norm() != 0]
    if extra or found.unknown:
        raise OSError(
            f"{name}: the file has {(extra + found.unknown)[0]}, which was not written; nothing saved"
        )
    return worst(errors)


def _rounded(module: LoRAModule, dtype: str) -> LoRAModule:
    folded = module.folded()
    a, b = (_tensor(part, dtype).astype("float32").numpy() for part in (folded.a, folded.b))
    return LoRAModule(a, b, folded.alpha)


def _tensor(values: np.ndarray, dtype: str) -> paddle.Tensor:
    return paddle.to_tensor(np.array(values, order="C"), place=paddle.CPUPlace()).astype(dtype)


def _transposed(parameter: paddle.Tensor) -> np.ndarray:
    return np.ascontiguousarray(parameter.numpy().T)
