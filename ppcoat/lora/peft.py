"""The adapter directory of NewBie's trainer, and a file for ComfyUI, written. files.py reads them.

    adapter_model.safetensors   LoRA: base_model.model.<path>.lora_A.weight [rank, in], .lora_B.weight
                                LoKr: lycoris_<path with _>.lokr_w1, .lokr_w2 (or _a, _b), .alpha
    adapter_config.json         rank, alpha and targets, in PEFT's keys or LyCORIS'

The tensors' rank and alpha also stand in the header (lora_rank, lora_alpha), from where ComfyUI's NewBie
nodes take the strength. A single file for ComfyUI itself has the scale folded in, because that program reads
neither: diffusion_model.<path>.lora_down.weight and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors.paddle import save

from ppcoat.atomic import whole_file, write_text
from ppcoat.errors import ConfigError
from ppcoat.reading import CONFIG_BYTES, regular_bytes

from .delta import LoRASummary
from .files import CONFIG, WEIGHTS, tensors_and_header
from .layer import adapter_layers, adapter_summary
from .lokr import LoKrLinear


def save_peft(
    folder: str | Path,
    model: nn.Layer,
    targets: Sequence[str],
    dropout: float = 0.0,
    dtype: str = "float32",
    extra: Mapping[str, str] | None = None,
) -> LoRASummary:
    """Write the LoRA or LoKr of `model` as a directory with WEIGHTS and CONFIG, each whole or not at all.

    targets: name endings for adapter_config.json. extra: more fields of the header. Returns norms of the
    updates. Raises ConfigError where the model has no adapter, OSError where the file does not hold what was
    written.
    """
    layers = adapter_layers(model)
    if not layers:
        raise ConfigError("the model has no LoRA or LoKr to save")
    first = next(iter(layers.values()))
    tensors = _lokr_tensors(layers) if _is_lokr(layers) else _peft_tensors(layers)
    header = _header("lyco_lokr" if _is_lokr(layers) else "lora", first.rank, first.alpha)
    config = _lokr_config(first) if _is_lokr(layers) else _lora_config(first, targets, dropout)
    file, text = Path(folder) / CONFIG, json.dumps(config, indent=2, sort_keys=not _is_lokr(layers))
    with suppress(FileNotFoundError):
        if regular_bytes(file, CONFIG_BYTES) != text.encode():
            file.unlink()  # beside the new weights it would tell another strength; their header tells it, too
    _write(file.with_name(WEIGHTS), tensors, {**(extra or {}), **header}, dtype)
    write_text(file, text)
    return adapter_summary(model)


def save_comfyui(
    path: str | Path, model: nn.Layer, dtype: str = "float32", extra: Mapping[str, str] | None = None
) -> LoRASummary:
    """Write the LoRA or LoKr of `model` as one .safetensors that ComfyUI loads by itself, at its full
    strength. extra: more fields of the header. Raises as `save_peft` does."""
    layers = adapter_layers(model)
    if not layers:
        raise ConfigError("the model has no LoRA or LoKr to save")
    first, tensors = next(iter(layers.values())), {}
    for path_in_model, layer in layers.items():
        name = f"diffusion_model.{path_in_model}"
        if isinstance(layer, LoKrLinear):
            factors = {each: getattr(layer, each).numpy() for each in layer.factors}
            last = "lokr_w2" if "lokr_w2" in factors else "lokr_w2_a"
            factors[last] = factors[last] * np.float32(layer.own_scale)
            tensors |= {f"{name}.{each}": value for each, value in factors.items()}
            tensors[f"{name}.alpha"] = np.array(layer.rank, "float32")
        else:
            tensors[f"{name}.lora_down.weight"] = layer.lora_A.numpy().T
            tensors[f"{name}.lora_up.weight"] = layer.lora_B.numpy().T * np.float32(layer.alpha / layer.rank)
    header = _header("lokr" if _is_lokr(layers) else "lora", first.rank, first.rank)
    _write(Path(path), tensors, {**(extra or {}), **header}, dtype)
    return adapter_summary(model)


def _is_lokr(layers: Mapping[str, nn.Layer]) -> bool:
    return any(isinstance(layer, LoKrLinear) for layer in layers.values())


def _peft_tensors(layers: Mapping[str, nn.Layer]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A.numpy().T
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B.numpy().T
    return tensors


def _lokr_tensors(layers: Mapping[str, LoKrLinear]) -> dict[str, np.ndarray]:
    tensors = {}
    for path, layer in layers.items():
        name = f"lycoris_{path.replace('.', '_')}"
        # LyCORIS writes alpha = rank where both matrices are full
        tensors[f"{name}.alpha"] = np.array(layer.rank if layer.is_full else layer.alpha, "float32")
        tensors |= {f"{name}.{each}": getattr(layer, each).numpy() for each in layer.factors}
    return tensors


def _header(kind: str, rank: int, alpha: float) -> dict[str, str]:
    return {"format": "pt", "adapter_type": kind, "lora_rank": str(rank), "lora_alpha": f"{alpha:g}"}


def _lora_config(layer: nn.Layer, targets: Sequence[str], dropout: float) -> dict:
    """PEFT's fields, as the original trainer leaves them."""
    alpha = int(layer.alpha) if float(layer.alpha).is_integer() else layer.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": {"base_model_class": "NextDiT_CLIP", "parent_library": "models.model"},
        "base_model_name_or_path": None,
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": layer.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "target_parameters": None,
        "task_type": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }


def _lokr_config(layer: LoKrLinear) -> dict:
    return {
        "adapter_type": "lyco_lokr",
        "peft_type": "LYCORIS",
        "lycoris_type": "lokr",
        "r": layer.rank,
        "network_dim": layer.rank,
        "lora_alpha": float(layer.alpha),
        "network_alpha": float(layer.alpha),
    }


def _write(path: Path, tensors: Mapping[str, np.ndarray], header: dict[str, str], dtype: str) -> None:
    """Write, read back and compare, then give it its name."""
    whole = {name: paddle.to_tensor(np.array(value, order="C"), place=paddle.CPUPlace()).astype(dtype)
             for name, value in tensors.items()}  # fmt: skip
    with whole_file(path) as draft:
        draft.write_bytes(save(whole, header))
        found, _ = tensors_and_header(draft)
        for name, tensor in whole.items():
            if name not in found or found[name].numpy().tobytes() != tensor.numpy().tobytes():
                raise OSError(f"{path.name}: {name} is not in the file as it was written; nothing was saved")
