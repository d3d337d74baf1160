"""The LoRA of a model written to a file, in three formats (see files.py), and read back before the file takes
its name. What is no plain LoRA of the transformer is written where the format has a place for it, see
`_place`, and refused by name where it has none.

alpha / rank is folded into B, so that every loader comes to a scale of 1. The header has our own fields,
diffusers' `lora_adapter_metadata` (a PEFT config as JSON, keys prefixed `transformer.`) or kohya's
`ss_network_*`, and ai-toolkit's `training_info`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.paddle import save

from ppcoat.atomic import whole_file
from ppcoat.errors import ConfigError

from . import flux_names
from .delta import LoRAModule, LoRASummary, relative_difference, worst
from .dora import comfyui_doras, lycoris_doras
from .files import tensors_and_header
from .header import ADAPTER_METADATA, DORA_RULE
from .keys import CLIP, TRANSFORMER
from .kinds import Absolute, Difference, DoRA, Kind, LoKr, lycoris_tensors
from .layer import adapter_kinds, adapter_layers, adapter_summary
from .lokr import lokr_difference
from .parse import Change, LoRAFile, described, parse_lora

FORMATS = ("diffusers", "kohya", "paddle")
LYCORIS = "lycoris"  # of a trained LoKr: LyCORIS' tensors of diffusers' paths, as ai-toolkit names them
# Rounding a length to 16 bits would change its row as much as training does.
IN_FLOAT32 = (".alpha", ".lora_magnitude_vector", ".dora_scale")
LORA_DTYPES = ("float32", "bfloat16", "float16")
READ_BACK_ERROR = 1e-6  # of delta-W, relative
ROUNDED_READ_BACK_ERROR = 0.05  # of kinds that are no LoRA, in a 16-bit dtype
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
    kinds = adapter_kinds(model)
    if not kinds:
        raise ConfigError("the model has no LoRA to save")
    modules = {path: kind for path, kind in kinds.items() if isinstance(kind, LoRAModule)}
    others = [Change(TRANSFORMER, (path,), "weight", kind, path)
              for path, kind in kinds.items() if path not in modules]  # fmt: skip
    if any(isinstance(kind, LoKr) for kind in kinds.values()):
        file_format = LYCORIS
    if file_format == "kohya" and any(isinstance(kind, DoRA) for kind in kinds.values()):
        others = comfyui_doras(model)
    alphas = [layer.alpha for layer in adapter_layers(model).values()]
    fields = {**dict(extra or {}), **_header_of_training(trigger_word, step, base_model, alphas)}
    error = write_lora_file(path, modules, fields, file_format, dtype, others)
    return replace(adapter_summary(model), error=error)


def lora_modules(model: nn.Layer) -> dict[str, LoRAModule]:
    """The plain LoRAs of `model` as {path: LoRAModule}, without `scale_multiplier`."""
    return {path: kind for path, kind in adapter_kinds(model).items() if isinstance(kind, LoRAModule)}


def write_lora_file(
    path: str | Path,
    modules: Mapping[str, LoRAModule],
    fields: Mapping[str, str],
    file_format: str = "diffusers",
    dtype: str = "float32",
    others: Sequence[Change] = (),
) -> float:
    """Write `modules` {diffusers path: LoRAModule} whole or not at all; `fields` goes into the header,
    `others` are written beside them.

    The file is read again before it takes its name, and every delta-W compared: one that differs by more than
    1e-6 from what was to be written raises OSError. Returns the largest relative error of a delta-W, which is
    that of the rounding to `dtype`. Raises ConfigError for a wrong path, format or dtype, if there is
    nothing to write, for what the format has no place for, and for numbers that `dtype` cannot hold.
    """
    path = Path(path)
    _check_target(path, [*modules, *others], file_format, dtype)
    for each, module in modules.items():
        _check_numbers(each, module, dtype)
    named = _named(modules, file_format)
    others = lycoris_doras(others) if file_format == "kohya" else others
    beside = _placed(others, modules, file_format)
    header = {**fields, **_header_of_tensors(named, file_format, beside, others)}
    tensors = _to_tensors(named, file_format, dtype)
    tensors |= {
        key: _tensor(values, "float32" if key.endswith(IN_FLOAT32) else dtype)
        for key, values in beside.items()
    }
    with whole_file(path) as draft:
        draft.write_bytes(save(tensors, header))
        # kohya's fused modules have names beside those in `modules`, but only FLUX's have them
        paths = None if file_format == "kohya" else modules.keys()
        found = parse_lora(*tensors_and_header(draft), None if others else paths)
        return max(
            _compare(found, modules, path.name, dtype),
            _compare_others(found, others, modules, path.name, dtype),
        )


def _check_target(path: Path, modules: Sized, file_format: str, dtype: str) -> None:
    if path.suffix != ".safetensors":
        raise ConfigError(f"a LoRA is saved as .safetensors, got {path.name}")
    if file_format not in (*FORMATS, LYCORIS):
        raise ConfigError(f"LoRA format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    if dtype not in LORA_DTYPES:
        raise ConfigError(f"LoRA dtype must be one of {', '.join(LORA_DTYPES)}, got {dtype!r}")
    if not modules:
        raise ConfigError("there is no LoRA to save")


def _check_numbers(path: str, module: LoRAModule, dtype: str) -> None:
    """Raises ConfigError for a LoRA that is not finite, or would not be in `dtype`."""
    if not math.isfinite(module.norm()):
        raise ConfigError(f"delta-W of {path} holds NaN or infinity: nothing was saved")
    if not all(np.isfinite(part).all() for part in (_rounded(module, dtype).a, _rounded(module, dtype).b)):
        raise ConfigError(f"delta-W of {path} does not fit into {dtype}: save as bfloat16 or float32")


def _named(modules: Mapping[str, LoRAModule], file_format: str) -> dict[str, LoRAModule]:
    """Names in the file, without suffix -> modules with alpha = rank."""
    if file_format == "kohya":
        fused = flux_names.fuse(modules)
        return {f"lora_unet_{name.replace('.', '_')}": module for name, module in fused.items()}
    return {path: module.folded() for path, module in modules.items()}


def _header_of_tensors(
    modules: Mapping[str, LoRAModule],
    file_format: str,
    beside: Mapping[str, np.ndarray],
    others: Sequence[Change],
) -> dict[str, str]:
    """The fields that speak of the tensors. `modules`: as they are written, names and all, alpha = rank
    because the weights are folded. others: what else is written; beside: that by key.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    of_dora = re.compile(r"transformer\.(.*)\.lora_A\.weight")
    ranks |= {found[1]: len(values) for key, values in beside.items() if (found := of_dora.fullmatch(key))}
    inner = [each.kind.update if isinstance(each.kind, DoRA) else each.kind for each in others]
    counted = [*ranks.values()] or [kind.rank for kind in inner if isinstance(kind, LoRAModule | LoKr)]
    rank = Counter(counted).most_common(1)[0][0] if counted else 1
    header = {
        "format": "pt",
        "rank": str(rank),
        "alpha": str(rank),
        "software": json.dumps({"name": "ppcoat"}),
    }
    rules = {each.kind.rule for each in others if isinstance(each.kind, DoRA)}
    if file_format == "kohya" and "ComfyUI" in rules:  # else its magnitudes are LyCORIS'
        header |= {DORA_RULE: "ComfyUI"}
    if file_format == "paddle":
        header |= {"format": "pd", "layout": IN_OUT}
    elif file_format == "kohya":
        header |= {
            "ss_network_module": "networks.lora_flux",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
        }
    elif file_format == "diffusers":
        header[ADAPTER_METADATA] = _adapter_text(ranks, rank, beside)
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


def _adapter_text(ranks: Mapping[str, int], rank: int, beside: Collection[str]) -> str:
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
    # older PEFTs do not know these: said only where they are true
    for field, suffix in (("use_dora", ".lora_magnitude_vector"), ("lora_bias", ".lora_B.bias")):
        if any(key.endswith(suffix) for key in beside):
            adapter[field] = True
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


def _placed(
    others: Sequence[Change], modules: Mapping[str, LoRAModule], file_format: str
) -> dict[str, np.ndarray]:
    """{key: array} of what is no plain LoRA of the transformer. Raises ConfigError for what has no place."""
    placed = [(change, _place(change, modules, file_format)) for change in others]
    refused = [change for change, tensors in placed if tensors is None]
    if refused:
        first = refused[0]
        raise ConfigError(
            f"the format of {file_format} has no place for {described(refused)}, e.g. "
            f"{first.paths[0]}.{first.parameter}: draw with the file as it is, or choose another --format"
        )
    tensors = {key: values for _, each in placed for key, values in each.items()}
    if len({each.kind.rule for each in others if isinstance(each.kind, DoRA)}) > 1:
        raise ConfigError("DoRAs by several rules have no place in one file: convert them one by one")
    if any(key.endswith(".lora_magnitude_vector") for key in tensors) and modules:
        raise ConfigError("diffusers' format has no place for LoRA and DoRA in one file")
    if any(key.endswith(".lora_B.bias") for key in tensors):  # PEFT wants one for each LoRA, or none
        zeros = {
            f"transformer.{path}.lora_B.bias": np.zeros(len(each.b), "float32")
            for path, each in modules.items()
        }
        tensors = zeros | tensors
    return tensors


def _place(
    change: Change, modules: Mapping[str, LoRAModule], file_format: str
) -> dict[str, np.ndarray] | None:
    """The tensors of one change in a format, None if it has no place there. All formats hold LoRAs of the
    text encoders; diffusers' PEFT's DoRA, biases, and norms that are given whole; kohya's what LyCORIS
    knows, on BFL's modules."""
    kind, path, part = change.kind, change.paths[0], change.part
    if isinstance(kind, LoRAModule):
        module = kind.folded()
        if file_format == "diffusers":
            return {f"{part}.{path}.lora_A.weight": module.a, f"{part}.{path}.lora_B.weight": module.b}
        if file_format == "paddle":
            return {f"{part}.{path}.lora_A": module.a.T, f"{part}.{path}.lora_B": module.b.T}
        stem = f"lora_te{1 if part == CLIP else 3}_{path.replace('.', '_')}"
        return {f"{stem}.{role}": values for role, values in lycoris_tensors(module, "weight").items()}
    if part != TRANSFORMER or file_format == "paddle":
        return None
    if file_format == LYCORIS:
        tensors = lycoris_tensors(kind, change.parameter)
        return tensors and {f"transformer.{path}.{role}": values for role, values in tensors.items()}
    if file_format == "diffusers":
        return _place_in_diffusers(change, modules)
    try:
        name, paths = flux_names.bfl_name(path)
    except ConfigError:
        return None
    whole = paths == change.paths and change.swapped == (paths == (flux_names.HALVES_SWAPPED,))
    tensors = lycoris_tensors(kind, change.parameter) if whole else None
    stem = f"lora_unet_{name.replace('.', '_')}"
    return tensors and {f"{stem}.{role}": values for role, values in tensors.items()}


def _place_in_diffusers(change: Change, modules: Mapping[str, LoRAModule]) -> dict[str, np.ndarray] | None:
    kind, (path, *more) = change.kind, change.paths
    if isinstance(kind, DoRA) and kind.rule == "PEFT" and isinstance(kind.update, LoRAModule) and not more:
        module, stem = kind.update.folded(), f"transformer.{path}"
        return {f"{stem}.lora_A.weight": module.a, f"{stem}.lora_B.weight": module.b,
                f"{stem}.lora_magnitude_vector": kind.magnitude.reshape([-1])}  # fmt: skip
    if change.parameter == "weight":
        is_norm = isinstance(kind, Absolute) and flux_names.is_norm(path)
        return {f"transformer.{path}.weight": kind.values} if is_norm else None
    if any(each not in modules for each in change.paths) or not isinstance(kind, Absolute | Difference):
        return None
    rows = [len(modules[each].b) for each in change.paths]
    values = np.concatenate(np.split(kind.values, 2)[::-1]) if change.swapped else kind.values
    role = "lora_B.bias" if isinstance(kind, Difference) else "base_layer.bias"
    parts = np.split(values, np.cumsum(rows)[:-1])
    return {f"transformer.{each}.{role}": part for each, part in zip(change.paths, parts, strict=True)}


def _compare_others(
    found: LoRAFile, others: Sequence[Change], modules: Mapping[str, LoRAModule], name: str, dtype: str
) -> float:
    """As `_compare`, for what is no plain LoRA of the transformer: by its factors where they tell, else by
    what it does to a weight of random numbers."""
    written = {(each.part, each.paths, each.parameter): each.kind for each in found.others}
    by_factors = [_difference(written.get((each.part, each.paths, each.parameter)), each.kind)
                  for each in others]  # fmt: skip
    others = [each for each, error in zip(others, by_factors, strict=True) if error is None]

    def done(changes: Iterable[Change]) -> dict[tuple[str, str, str], np.ndarray]:
        deltas = {}
        for change in changes:
            rows, *columns = (size or 8 for size in change.kind.shape)
            first = [len(modules[path].b) if path in modules else rows // len(change.paths)
                     for path in change.paths[:-1]]  # fmt: skip
            rows = [*first, rows - sum(first)]
            rng = np.random.default_rng(0)
            whole = [rng.standard_normal([count, *columns]).astype("float32") for count in rows]
            values = change.deltas(whole, 1.0)
            for path, delta in zip(change.paths, values, strict=True):
                deltas[(change.part, path, change.parameter)] = delta
        return deltas

    errors = [0.0, *(error for error in by_factors if error is not None)]
    want, got = (done(others), done(found.others)) if others else ({}, {})
    for key, delta in want.items():
        if key not in got or got[key].shape != delta.shape:
            raise OSError(
                f"{name}: {key[1]}.{key[2]} is not in the file as it was written; nothing was saved"
            )
        size = float(np.linalg.norm(delta))
        errors.append(float(np.linalg.norm(got[key] - delta)) / size if size else 0.0)
    limit = READ_BACK_ERROR if dtype == "float32" else ROUNDED_READ_BACK_ERROR
    if not max(errors) <= limit:
        raise OSError(f"{name}: what is no LoRA reads back within {max(errors):.1g} only; nothing was saved")
    return max(errors)


def _difference(found: Kind | None, want: Kind) -> float | None:
    """Relative error of what `found` adds, where factors tell it; None where only weights do."""
    if isinstance(found, LoRAModule) and isinstance(want, LoRAModule):
        return relative_difference(found, want)
    if isinstance(found, DoRA) and isinstance(want, DoRA) and found.rule == want.rule:
        inner, lengths = _difference(found.update, want.update), (found.magnitude, want.magnitude)
        return inner if inner is None or np.array_equal(*lengths) else float("inf")
    if isinstance(found, LoKr) and isinstance(want, LoKr):
        return lokr_difference(found, want)
    return None


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
