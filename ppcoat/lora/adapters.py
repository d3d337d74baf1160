"""LoRA and LoKr files read into a model: the adapter directory of NewBie's trainer, or a file alone.

Names may have any prefix that files.py knows. The scale of a LoKr is decided module by module: 1 where both
matrices are full, whatever the file says of alpha and rank, else its own alpha / rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import paddle
from paddle import nn
from safetensors import SafetensorError

from ppcoat.errors import ConfigError
from ppcoat.nn.convert import set_sublayer

from .files import PICKLES, PREFIXES, tensors_and_header
from .formats import LoRAInfo, load_lora
from .header import ADAPTER_METADATA
from .layer import linear_paths, remove_lora
from .lokr import FACTORS, LoKrLinear, LoKrSettings
from .peft import CONFIG, WEIGHTS

_LOKR_NAMES = (*FACTORS, *(part for parts in FACTORS.values() for part in parts))


def load_adapter(model: nn.Layer, path: str | Path, scale: float = 1.0) -> LoRAInfo:
    """Put a LoRA or LoKr into `model` for inference: a directory with WEIGHTS and CONFIG, or a file.

    Its strength is multiplied by `scale`; an adapter that was loaded before is replaced. Raises ConfigError,
    and changes nothing, for a missing, damaged or pickled file and for tensors that fit no Linear.
    """
    tensors, header = read_adapter(path)
    if not any(name.rpartition(".")[2] in _LOKR_NAMES for name in tensors):
        return load_lora(model, tensors, scale, header)
    named = _lokr_modules(tensors, linear_paths(model))
    linears = dict(model.named_sublayers())
    bases = {path: getattr(linears[path], "base", linears[path]) for path in named}
    layers = {path: _lokr_layer(path, bases[path], named[path], header, scale) for path in named}
    remove_lora(model)
    for each, layer in layers.items():
        layer.training = bases[each].training
        set_sublayer(model, each, layer)
    scales = {each: layer.scale for each, layer in layers.items()}
    return LoRAInfo({each: layer.rank for each, layer in layers.items()}, scales, [], metadata=header)


def read_adapter(path: str | Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """Tensors and header of an adapter directory or file; of a directory, the header also has what CONFIG
    says. Raises ConfigError for what is missing, damaged or a pickle."""
    path = Path(path)
    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix in PICKLES:
        raise ConfigError(f"{file.name} is a pickle, and reading it can run code: convert it to .safetensors")
    if not file.is_file():
        raise ConfigError(f"no LoRA at {file}: give a .safetensors file or a directory with {WEIGHTS}")
    try:
        tensors, header = tensors_and_header(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}") from error
    if path.is_dir():
        config = _read_config(path / CONFIG)
        header |= {"lora_rank": str(config["r"]), "lora_alpha": str(config["lora_alpha"])}
        header[ADAPTER_METADATA] = json.dumps(config)
    return tensors, header


def _read_config(file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): it belongs beside {WEIGHTS}") from None
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise ConfigError(f"{file} lacks r and lora_alpha, without which the strength is unknown")
    if config.get("use_dora"):
        raise ConfigError(f"{file}: use_dora is true, but DoRA is not known here; train without it")
    return config


def _lokr_modules(
    tensors: Mapping[str, paddle.Tensor], paths: list[str]
) -> dict[str, dict[str, paddle.Tensor]]:
    """File tensors -> {path: {factor or "alpha": tensor}}. Raises ConfigError for keys that fit nothing."""
    by_name = {path.replace(".", "_"): path for path in paths} | {path: path for path in paths}
    modules: dict[str, dict[str, paddle.Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(".")
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name in by_name and role in (*_LOKR_NAMES, "alpha"):
            modules.setdefault(by_name[name], {})[role] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise ConfigError(
            f"{len(unknown)} LoKr keys fit no layer of the model, e.g. {', '.join(unknown[:3])}; its Linears "
            f"are like {', '.join(paths[:3])}"
        )
    return modules


def _lokr_layer(
    path: str, base: nn.Layer, parts: Mapping[str, paddle.Tensor], header: Mapping[str, str], scale: float
) -> LoKrLinear:
    factors = {name: part.astype("float32").numpy() for name, part in parts.items() if name != "alpha"}
    low = next((factors[right] for _, right in FACTORS.values() if right in factors), None)
    try:
        alpha = _finite(parts["alpha"].astype("float32").item()) if "alpha" in parts else None
        if low is None:  # LyCORIS then writes alpha = rank
            rank, alpha = max(1, round(alpha or 1)), _finite(header.get("lora_alpha", 1))
        else:
            rank = len(low)
            alpha = _finite(header.get("lora_alpha", rank)) if alpha is None else alpha
        layer = LoKrLinear(base, factors, LoKrSettings(rank, alpha))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    layer.scale_multiplier = scale
    for name in layer.factors:
        getattr(layer, name).stop_gradient = True
    return layer


def _finite(value: object) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"alpha is {value!r}, wanted a finite number")
    return number
