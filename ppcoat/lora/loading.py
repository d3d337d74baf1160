"""The LoRA or LoKr of a file put into a model. writing.py and peft.py are the way back.

Read are LoRA files of every format of files.py, which says what a delta-W is under each; the adapter
directory of NewBie's trainer; and LoKr files. Names may have any prefix that files.py knows. The scale of a
LoKr is decided module by module: 1 where both matrices are full, whatever the file says of alpha and rank,
else its own alpha / rank.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.convert import set_sublayer
from ppcoat.nn.linear import LoRALinear

from .delta import LoRAModule
from .files import (
    ADAPTER_METADATA,
    CONFIG,
    WEIGHTS,
    parse_lora,
    read_lora_file,
    read_tensors_and_header,
    step_from_header,
    without_prefixes,
)
from .layer import linear_paths, lora_parameters, remove_lora
from .lokr import FACTORS, LoKrLinear, LoKrSettings

_LOKR_NAMES = (*FACTORS, *(part for parts in FACTORS.values() for part in parts))


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


def load_lora(
    model: nn.Layer,
    source: str | Path | Mapping[str, paddle.Tensor],
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> LoRAInfo:
    """Put the LoRA of a file (or of a dict of its tensors, with its header as `metadata`) into `model`.

    The file may have any format that files.py reads. Linears become LoRALinears without gradient, their scale
    times `scale`; ranks may differ from one to the next. A LoRA that was loaded before is replaced. Tensors:
    A [rank, in] and B [out, rank] in most formats, any floating dtype. Keys that fit no Linear are listed in
    a warning and in the result. Raises ConfigError, and changes nothing, for a pickle, a damaged file, a
    wrong shape, a file that fits no Linear at all, or a model whose LoRA is in training.
    """
    if any(not param.stop_gradient for param in lora_parameters(model)):
        raise ConfigError("the model has a LoRA in training: save it, then call remove_lora before load_lora")
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
    if file.unknown:
        warnings.warn(
            f"{len(file.unknown)} LoRA keys fit no layer and are left out: {', '.join(file.unknown[:5])}",
            stacklevel=2,
        )
    remove_lora(model)
    for path, module in modules.items():
        base = getattr(linears[path], "base", linears[path])  # of an adapter that was loaded before
        set_sublayer(model, path, _make_layer(base, module, scale))
    ranks = {path: module.rank for path, module in modules.items()}
    scales = {path: module.scale * scale for path, module in modules.items()}
    trigger_word, step = file.header.get("trigger_word", ""), step_from_header(file.header)
    return LoRAInfo(ranks, scales, file.unknown, trigger_word, step, file.header)


def _check_fits(path: str, module: LoRAModule, linear: nn.Layer) -> None:
    width_in, width_out = linear.weight.shape
    if module.a.shape[1] != width_in or module.b.shape[0] != width_out:
        raise ConfigError(
            f"LoRA of {path}: A {list(module.a.shape)} and B {list(module.b.shape)} do not fit a Linear "
            f"{width_in} -> {width_out}, which wants A [rank, {width_in}] and B [{width_out}, rank]"
        )


def _make_layer(base: nn.Layer, module: LoRAModule, scale: float) -> LoRALinear:
    """A LoRALinear on `base` with the file's tensors, for inference."""
    layer = LoRALinear(base, module.rank, alpha=module.alpha * scale)
    layer.training = base.training
    layer.lora_A.set_value(_paddle_order(module.a))
    layer.lora_B.set_value(_paddle_order(module.b))
    layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    return layer


def _paddle_order(matrix: np.ndarray) -> np.ndarray:
    """Torch's [out, in] -> Paddle's [in, out]."""
    return np.ascontiguousarray(matrix.T)


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
    """Tensors (any shape, in the dtype they have there) and header of an adapter directory or file; of a
    directory, the header also has what CONFIG says. Raises ConfigError for what is missing, damaged or a
    pickle."""
    path = Path(path)
    tensors, header = read_tensors_and_header(path / WEIGHTS if path.is_dir() else path)
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
        path = next((by_name[bare] for bare, _ in without_prefixes(name) if bare in by_name), None)
        if path is not None and role in (*_LOKR_NAMES, "alpha"):
            modules.setdefault(path, {})[role] = tensor
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
