"""The header of a LoRA file: what we say about a LoRA, and what other programs say. All values are text.

Written: our own fields, diffusers' `lora_adapter_metadata` (a PEFT config as JSON, keys prefixed
`transformer.`), kohya's `ss_network_*` and ai-toolkit's `training_info`. A header comes from anywhere:
numbers are checked, patterns are never run as regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ppcoat.errors import ConfigError

from .delta import LoRAModule

ADAPTER_METADATA = "lora_adapter_metadata"
IN_OUT = "lora_A [in, rank], lora_B [rank, out]"  # the field `layout` of a file in Paddle's layout
# Fields that speak of the tensors in a file. Whoever writes other tensors writes these anew or not at all.
OF_TENSORS = (
    *("format", "layout", "rank", "alpha", "software", ADAPTER_METADATA),
    *("adapter_type", "lora_rank", "lora_alpha"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
)


def make_header(modules: Mapping[str, LoRAModule], file_format: str) -> dict[str, str]:
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


def run_fields(
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


def step_from_header(header: Mapping[str, str]) -> int | None:
    """The training step from `step` or ai-toolkit's training_info; None where there is none that can be
    read.
    """
    text = header.get("step")
    if text is None:
        try:
            info = json.loads(header.get("training_info", "null"))
        except json.JSONDecodeError:
            return None
        text = str(info.get("step")) if isinstance(info, dict) else None
    return int(text) if text is not None and text.isdecimal() else None


def scale_from_header(header: Mapping[str, str], path: str, rank: int) -> float:
    """alpha / rank as the header says it: diffusers' adapter metadata, else `alpha` or `lora_alpha`, else 1
    (folded into the weights).
    """
    adapter = _adapter_metadata(header)
    if "lora_alpha" in adapter:
        alpha = _number(_pattern(adapter.get("alpha_pattern"), path, adapter["lora_alpha"]), "lora_alpha")
        return alpha / (math.sqrt(rank) if adapter.get("use_rslora") is True else rank)
    for name in ("", "lora_"):  # ours, NewBie's
        if f"{name}alpha" in header:
            # The header's rank belongs to its alpha; without it, this module's own rank is meant.
            own = _number(header.get(f"{name}rank", rank), "rank")
            return _number(header[f"{name}alpha"], "alpha") / own
    return 1.0


def _adapter_metadata(header: Mapping[str, str]) -> dict:
    """The PEFT config of the transformer from diffusers' JSON header, without its `transformer.` prefix; {}
    if none.
    """
    if ADAPTER_METADATA not in header:
        return {}
    try:
        values = json.loads(header[ADAPTER_METADATA])
    except json.JSONDecodeError as error:
        raise ConfigError(f"LoRA header {ADAPTER_METADATA} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"LoRA header {ADAPTER_METADATA} must be a JSON object")
    return {key.removeprefix("transformer."): value for key, value in values.items()}


def _pattern(patterns: object, path: str, default: object) -> object:
    """PEFT's per-module values: the first key that the path ends with, or equals if the key starts with "^".

    PEFT reads keys as regular expressions. Those that diffusers writes are plain paths, at most anchored and
    with escaped dots; anything else raises ConfigError, because ignoring it would give a wrong scale.
    """
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ConfigError(f"LoRA header: the pattern {key!r} is no module path; fold alpha into the file")
        if path == name or (not key.startswith("^") and path.endswith("." + name)):
            return value
    return default


def _number(value: object, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (name == "rank" and number <= 0):
        raise ConfigError(f"LoRA header {name} must be a finite number, got {value!r}")
    return number


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
