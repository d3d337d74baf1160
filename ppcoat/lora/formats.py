"""LoRA files and models: a model's LoRA into a file, a file's LoRA into a model.

The formats themselves, and what a delta-W is under each, are in files.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.convert import set_sublayer
from ppcoat.nn.linear import LoRALinear

from .delta import LoRAModule, LoRASummary, summarize
from .files import parse_lora, read_lora_file
from .header import run_fields, step_from_header
from .layer import linear_paths, lora_layers, lora_parameters, remove_lora
from .writing import write_lora_file


@dataclass(frozen=True)
class LoRAInfo:
    """What `load_lora` found: the paths with their ranks and scales, keys that fit nothing, and the header's
    facts.
    """

    ranks: dict[str, int]
    scales: dict[str, float]
    unmatched: list[str]
    trigger_word: str = ""
    step: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)


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
    fields = {**dict(extra or {}), **run_fields(trigger_word, step, base_model, alphas)}
    error = write_lora_file(path, modules, fields, file_format, dtype)
    return replace(summarize(modules), error=error)


def lora_modules(model: nn.Layer) -> dict[str, LoRAModule]:
    """The LoRA of `model` as {path: LoRAModule}, without `scale_multiplier`."""
    return {
        path: LoRAModule(_transposed(layer.lora_A), _transposed(layer.lora_B), layer.alpha)
        for path, layer in lora_layers(model).items()
    }


def load_lora(
    model: nn.Layer,
    source: str | Path | Mapping[str, paddle.Tensor],
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> LoRAInfo:
    """Put the LoRA of a file (or of a dict of its tensors, with its header as `metadata`) into `model`.

    The file may have any format that files.py reads. Linears become LoRALinears without gradient, their scale
    times `scale`; ranks may differ from one to the next. A LoRA that was loaded before is replaced. A LoRA in
    training is filled instead, and must cover the same Linears with the same ranks. Keys that fit no Linear
    are listed in a warning and in the result. Raises ConfigError, and changes nothing, for a pickle, a
    damaged file, a wrong shape, or a file that fits no Linear at all.
    """
    paths = linear_paths(model)
    if isinstance(source, Mapping):
        file = parse_lora(source, metadata or {}, set(paths))
    else:
        file = read_lora_file(source, set(paths))
    if not file.modules:
        raise ConfigError(
            f"this LoRA fits no layer of the model: its keys are like {', '.join(file.unknown[:3])}, "
            f"the model's Linears like {', '.join(paths[:3])}"
        )
    linears = dict(model.named_sublayers())
    modules = {path: file.modules[path] for path in paths if path in file.modules}
    for path, module in modules.items():
        _check_fits(path, module, linears[path])
    in_training = any(not param.stop_gradient for param in lora_parameters(model))
    if in_training:
        _check_same_shape(lora_layers(model), modules)
    if file.unknown:
        warnings.warn(
            f"{len(file.unknown)} LoRA keys fit no layer and are left out: {', '.join(file.unknown[:5])}",
            stacklevel=2,
        )
    if in_training:
        for path, module in modules.items():
            _fill(linears[path], module, scale)
    else:
        remove_lora(model)
        for path, module in modules.items():
            base = getattr(linears[path], "base", linears[path])  # of an adapter that was loaded before
            set_sublayer(model, path, _make_layer(base, module, scale))
    ranks = {path: module.rank for path, module in modules.items()}
    scales = {path: module.scale * scale for path, module in modules.items()}
    trigger_word, step = file.header.get("trigger_word", ""), step_from_header(file.header)
    return LoRAInfo(ranks, scales, file.unknown, trigger_word, step, file.header)


def unload_lora(model: nn.Layer) -> None:
    """Take a loaded LoRA out again: the model computes exactly as before `load_lora`."""
    remove_lora(model)


def _check_fits(path: str, module: LoRAModule, linear: nn.Layer) -> None:
    width_in, width_out = linear.weight.shape
    if module.a.shape[1] != width_in or module.b.shape[0] != width_out:
        raise ConfigError(
            f"LoRA of {path}: A {list(module.a.shape)} and B {list(module.b.shape)} do not fit a Linear "
            f"{width_in} -> {width_out}, which wants A [rank, {width_in}] and B [{width_out}, rank]"
        )


def _check_same_shape(existing: Mapping[str, LoRALinear], modules: Mapping[str, LoRAModule]) -> None:
    """A LoRA in training takes only a file of the same modules and ranks."""
    different = sorted(set(existing) ^ set(modules))
    if different:
        raise ConfigError(
            f"the LoRA in training is on other layers than this file, e.g. {different[0]}; "
            "call unload_lora first"
        )
    for path, layer in existing.items():
        if modules[path].rank != layer.rank:
            raise ConfigError(
                f"the LoRA in training has rank {layer.rank} at {path}, the file {modules[path].rank}; "
                "call unload_lora first"
            )


def _fill(layer: LoRALinear, module: LoRAModule, scale: float) -> None:
    """The layer keeps its own alpha; B takes what is left, so that the product is the file's."""
    layer.lora_A.set_value(_paddle_order(module.a))
    layer.lora_B.set_value(
        _paddle_order(module.b * np.float32(module.scale * scale * layer.rank / layer.alpha))
    )


def _make_layer(base: nn.Layer, module: LoRAModule, scale: float) -> LoRALinear:
    """A LoRALinear on `base` with the file's tensors, for inference."""
    layer = LoRALinear(base, module.rank, alpha=module.alpha * scale)
    layer.training = base.training
    layer.lora_A.set_value(_paddle_order(module.a))
    layer.lora_B.set_value(_paddle_order(module.b))
    layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    return layer


def _transposed(parameter: paddle.Tensor) -> np.ndarray:
    return np.ascontiguousarray(parameter.numpy().T)


def _paddle_order(matrix: np.ndarray) -> np.ndarray:
    """Torch's [out, in] -> Paddle's [in, out]."""
    return np.ascontiguousarray(matrix.T)
