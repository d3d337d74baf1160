"""LoRA files: write and read safetensors with diffusers' keys.

A file holds `transformer.<path>.lora_A.weight` [rank, in] and `.lora_B.weight` [out, rank] (torch order). We
fold alpha / rank into B and say alpha = rank in the header, so that every loader comes to the same scale of
1. On reading, the scale is alpha / rank with alpha from a `.alpha` tensor, else from the header, else rank
(folded).

Other key formats are further rows of the tables below. Pickle files are refused: reading one can run code.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import paddle
from paddle import nn
from safetensors import SafetensorError, safe_open
from safetensors.paddle import save_file

from ppcoat.errors import ConfigError
from ppcoat.nn.convert import set_sublayer
from ppcoat.nn.linear import LoRALinear

from .header import make_header, scale_from_header, step_from_header
from .layer import linear_paths, lora_layers, lora_parameters, remove_lora

# What may stand before a path; stripped again and again, so that `base_model.model.transformer.` goes too.
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "module.")
# What stands after it -> the role of the tensor.
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".alpha": "alpha",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")
SAVE_DTYPES = ("float32", "bfloat16", "float16")


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
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write the LoRA of `model` to `path` (.safetensors), whole or not at all. `scale_multiplier` is not
    written.

    The header has rank, alpha (= rank), original_alpha, trigger_word, step, base_model, diffusers' adapter
    metadata and ai-toolkit's training_info; `extra` adds text fields. Raises ConfigError for a wrong path or
    dtype, or if there is no LoRA.
    """
    path, layers = Path(path), lora_layers(model)
    if path.suffix != ".safetensors":
        raise ConfigError(f"a LoRA is saved as .safetensors, got {path.name}")
    if dtype not in SAVE_DTYPES:
        raise ConfigError(f"LoRA dtype must be one of {', '.join(SAVE_DTYPES)}, got {dtype!r}")
    if not layers:
        raise ConfigError("the model has no LoRA to save")
    tensors = {}
    with paddle.no_grad():
        for name, layer in layers.items():
            folded = layer.lora_B * (layer.alpha / layer.rank)
            tensors[f"transformer.{name}.lora_A.weight"] = layer.lora_A.t().contiguous().astype(dtype)
            tensors[f"transformer.{name}.lora_B.weight"] = folded.t().contiguous().astype(dtype)
    header = make_header(layers, trigger_word, step, base_model)
    _write_atomically(path, tensors, {**dict(extra or {}), **header})


def load_lora(
    model: nn.Layer,
    source: str | Path | Mapping[str, paddle.Tensor],
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
) -> LoRAInfo:
    """Put the LoRA of a file (or of a dict of its tensors, with its header as `metadata`) into `model`.

    Linears become LoRALinears without gradient, their scale times `scale`; ranks may differ from one to the
    next. A LoRA that was loaded before is replaced. A LoRA in training is filled instead, and must cover the
    same Linears with the same ranks. Keys that fit no Linear are listed in a warning and in the result.
    Raises ConfigError, and changes nothing, for a pickle, a damaged file, a wrong shape, or a file that fits
    no Linear at all.
    """
    if isinstance(source, Mapping):
        tensors, header = dict(source), dict(metadata or {})
    else:
        tensors, header = read_lora_file(source)
    linears = dict(model.named_sublayers())
    paths = linear_paths(model)
    modules, unmatched = _collect(tensors, set(paths))
    if not modules:
        raise ConfigError(
            f"this LoRA fits no layer of the model: its keys are like {', '.join(list(tensors)[:3])}, "
            f"the model's Linears like {', '.join(paths[:3])}"
        )
    updates = {}
    for path in paths:
        if path in modules:
            updates[path] = _update(path, modules[path], linears[path], header)
    in_training = any(not param.stop_gradient for param in lora_parameters(model))
    if in_training:
        _check_same_shape(lora_layers(model), updates)
    if unmatched:
        warnings.warn(
            f"{len(unmatched)} LoRA keys fit no layer and are left out: {', '.join(unmatched[:5])}",
            stacklevel=2,
        )
    if in_training:
        for path, update in updates.items():
            _fill(linears[path], update, scale)
    else:
        remove_lora(model)
        for path, update in updates.items():
            base = linears[path].base if isinstance(linears[path], LoRALinear) else linears[path]
            set_sublayer(model, path, _make_layer(base, update, scale))
    ranks = {path: update.a.shape[1] for path, update in updates.items()}
    scales = {path: update.scale * scale for path, update in updates.items()}
    return LoRAInfo(
        ranks, scales, unmatched, header.get("trigger_word", ""), step_from_header(header), header
    )


def unload_lora(model: nn.Layer) -> None:
    """Take a loaded LoRA out again: the model computes exactly as before `load_lora`."""
    remove_lora(model)


def read_lora_file(path: str | Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """A .safetensors file -> its tensors and its header. Raises ConfigError for pickles and for missing or
    damaged files.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise ConfigError(f"{path.name} is a pickle, and reading it can run code: convert it to .safetensors")
    if path.suffix != ".safetensors":
        raise ConfigError(f"a LoRA file is a .safetensors, got {path}")
    if not path.is_file():
        raise ConfigError(f"no LoRA file at {path}")
    try:
        with safe_open(str(path), framework="paddle") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a whole safetensors file: {error}") from error


@dataclass(frozen=True)
class _Update:
    """One module of a file in Paddle's layout: a [in, rank] and b [rank, out] float32, and the scale alpha /
    rank.
    """

    a: paddle.Tensor
    b: paddle.Tensor
    scale: float


def _collect(
    tensors: Mapping[str, paddle.Tensor], paths: set[str]
) -> tuple[dict[str, dict[str, paddle.Tensor]], list[str]]:
    """Keys -> {path: {"A" | "B" | "alpha": tensor}} for paths that exist, and the keys that fit nothing."""
    modules: dict[str, dict[str, paddle.Tensor]] = {}
    unmatched = []
    for key, tensor in tensors.items():
        path, role = _parse_key(key, paths)
        if role is None:
            unmatched.append(key)
        else:
            modules.setdefault(path, {})[role] = tensor
    return modules, unmatched


def _parse_key(key: str, paths: set[str]) -> tuple[str, str | None]:
    for suffix, role in SUFFIXES.items():
        if not key.endswith(suffix):
            continue
        path = key.removesuffix(suffix)
        while path not in paths:
            prefix = next((prefix for prefix in PREFIXES if path.startswith(prefix)), None)
            if prefix is None:
                return key, None
            path = path.removeprefix(prefix)
        return path, role
    return key, None


def _update(
    path: str, parts: dict[str, paddle.Tensor], linear: nn.Layer, header: Mapping[str, str]
) -> _Update:
    """Check one module's tensors against its Linear and find its scale."""
    if "A" not in parts or "B" not in parts:
        raise ConfigError(f"LoRA of {path} is incomplete: it has {', '.join(sorted(parts))}, wanted A and B")
    width_in, width_out = linear.weight.shape
    a, b = parts["A"], parts["B"]
    fits = a.ndim == b.ndim == 2 and a.shape[1] == width_in and b.shape[0] == width_out
    if not fits or a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"LoRA of {path}: A {list(a.shape)} and B {list(b.shape)} do not fit a Linear "
            f"{width_in} -> {width_out}, which wants A [rank, {width_in}] and B [{width_out}, rank]"
        )
    rank = a.shape[0]
    if "alpha" in parts:
        scale = float(parts["alpha"].astype("float32")) / rank
    else:
        scale = scale_from_header(header, path, rank)
    if not math.isfinite(scale):
        raise ConfigError(f"LoRA of {path}: alpha is not a finite number")
    return _Update(a.astype("float32").t().contiguous(), b.astype("float32").t().contiguous(), scale)


def _check_same_shape(existing: Mapping[str, LoRALinear], updates: Mapping[str, _Update]) -> None:
    """A LoRA in training takes only a file of the same modules and ranks."""
    different = sorted(set(existing) ^ set(updates))
    if different:
        raise ConfigError(
            f"the LoRA in training is on other layers than this file, e.g. {different[0]}; "
            "call unload_lora first"
        )
    for path, layer in existing.items():
        rank = updates[path].a.shape[1]
        if rank != layer.rank:
            raise ConfigError(
                f"the LoRA in training has rank {layer.rank} at {path}, the file {rank}; "
                "call unload_lora first"
            )


def _fill(layer: LoRALinear, update: _Update, scale: float) -> None:
    """The layer keeps its own alpha; B takes what is left, so that the product is the file's."""
    layer.lora_A.set_value(update.a)
    layer.lora_B.set_value(update.b * (update.scale * scale * layer.rank / layer.alpha))


def _make_layer(base: nn.Layer, update: _Update, scale: float) -> LoRALinear:
    """A LoRALinear on `base` with the file's tensors, for inference."""
    rank = update.a.shape[1]
    layer = LoRALinear(base, rank, alpha=update.scale * scale * rank)
    layer.training = base.training
    layer.lora_A.set_value(update.a)
    layer.lora_B.set_value(update.b)
    layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    return layer


def _write_atomically(path: Path, tensors: Mapping[str, paddle.Tensor], header: dict[str, str]) -> None:
    """Write beside the target, flush to disk, rename: a reader sees the old file or the new one, never half
    of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        save_file(tensors, str(temporary), metadata=header)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
