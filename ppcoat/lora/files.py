"""LoRA files of the FLUX programs, read: their tensors and their header. Knows no model.

    diffusers   transformer.<path>.lora_A.weight [rank, in], .lora_B.weight [out, rank]
    kohya       lora_unet_<BFL name with _>.lora_down.weight, .lora_up.weight (as above), .alpha
    paddle      <path>.lora_A [in, rank], <path>.lora_B [rank, out]: our state_dict; header: format "pd"

writing.py writes these three. Also read: BFL names with dots (ComfyUI), XLabs', OneTrainer's and LyCORIS'
LoRAs with underscores, PEFT's prefixes, and ppdiffusers' transposed files. The scale is alpha / rank with
alpha from a `.alpha` tensor, else from the header, else rank. Pickle files are refused: reading one can run
code.

A header is text in every value and comes from anywhere: numbers are checked, patterns are never run as
regular expressions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import paddle
from safetensors import SafetensorError, safe_open

from ppcoat.errors import ConfigError

from . import flux_names
from .delta import LoRAModule

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of an adapter directory
# What may stand before a module's name, stripped again and again, -> the program that is known by it.
PREFIXES = {
    "base_model.model.": "PEFT",
    "transformer.": "diffusers",
    "diffusion_model.": "ComfyUI",
    "module.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
# What stands after it -> the role of the tensor. The more specific stands first.
SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".down.weight": "A",
    ".up.weight": "B",
    ".lora_A": "A",
    ".lora_B": "B",
    ".alpha": "alpha",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pdparams")
ADAPTER_METADATA = "lora_adapter_metadata"
# Fields that speak of the tensors in a file. Whoever writes other tensors writes these anew or not at all.
OF_TENSORS = (
    *("format", "layout", "rank", "alpha", "software", ADAPTER_METADATA),
    *("adapter_type", "lora_rank", "lora_alpha"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
)


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA read from a file. format: the program whose keys these are; modules: {diffusers path:
    LoRAModule}; unknown: keys that name no module; dtypes: of A and B as stored; incomplete: modules that
    lack A or B, and what they have."""

    format: str
    modules: dict[str, LoRAModule]
    unknown: list[str]
    header: dict[str, str]
    dtypes: tuple[str, ...]
    incomplete: dict[str, str] = field(default_factory=dict)


def read_lora_file(path: str | Path, paths: Set[str] | None = None, incomplete_too: bool = False) -> LoRAFile:
    """A .safetensors file -> LoRAFile; `paths` and `incomplete_too` as in `parse_lora`.

    Raises ConfigError for pickles, for missing or damaged files, and as `parse_lora` does.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLES):
        raise ConfigError(f"a LoRA file is a .safetensors, got {path}")
    return parse_lora(*read_tensors_and_header(path), paths, incomplete_too)


def read_tensors_and_header(file: Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """`tensors_and_header` of a file that comes from anywhere: each tensor in the dtype that it
    has there; any shape. Raises ConfigError for a pickle, which is not read, and for a missing or damaged
    file."""
    if file.suffix in PICKLES:
        raise ConfigError(f"{file.name} is a pickle, and reading it can run code: convert it to .safetensors")
    if not file.is_file():
        raise ConfigError(f"no LoRA file at {file}: check the path")
    try:
        return tensors_and_header(file)
    except SafetensorError as error:
        raise ConfigError(f"{file} is not a whole safetensors file: {error}: fetch it again") from error


def parse_lora(
    tensors: Mapping[str, paddle.Tensor],
    header: Mapping[str, str],
    paths: Set[str] | None = None,
    incomplete_too: bool = False,
) -> LoRAFile:
    """Tensors of a file, by key, and its header -> LoRAFile.

    tensors: A [rank, in] and B [out, rank], transposed where the file is in Paddle's layout, and alpha, a
    scalar; any floating dtype. paths: the Linears of a model, to which names are held; None: all of FLUX's.
    incomplete_too: list modules that lack A or B instead of raising. Raises ConfigError for such a module,
    for one that comes twice or whose shapes do not fit each other, and for an alpha that is no number.
    """
    stems, unknown = _group(tensors, paths)
    halves = {_shown_name(stem): ", ".join(sorted(stem.tensors)) for stem in stems if not stem.is_whole}
    if halves and not incomplete_too:
        (name, has), *_ = halves.items()
        listed = ", ".join(repr(key) for key in unknown[:5])  # repr: a file may hold control characters
        missed = f"; {len(unknown)} unknown keys: {listed}{', ...' * (len(unknown) > 5)}" if unknown else ""
        raise ConfigError(f"LoRA of {name} is incomplete: it has {has}, wanted A and B{missed}")
    stems = [stem for stem in stems if stem.is_whole]
    in_out = _is_in_out(stems, tensors, header)
    modules: dict[str, LoRAModule] = {}
    for stem in stems:
        for path, module in flux_names.split_fused(stem.module, _read_module(stem, in_out, header)).items():
            if path in modules:
                raise ConfigError(f"the LoRA has {path} twice, the second time as {stem.name}")
            modules[path] = module
    programs = {"paddle"} if in_out else {stem.program for stem in stems}
    dtypes = {_dtype(stem.tensors[role]) for stem in stems for role in "AB"}
    return LoRAFile(
        " + ".join(sorted(programs)), modules, unknown, dict(header), tuple(sorted(dtypes)), halves
    )


def without_prefixes(name: str) -> Iterator[tuple[str, str]]:
    """`name`, then what is left of it as one of PREFIXES after the other goes; with each the program by whose
    prefix it began, "" for none."""
    program = ""
    while True:
        yield name, program
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return
        program = program or PREFIXES[prefix]
        name = name.removeprefix(prefix)


@dataclass(frozen=True)
class _Stem:
    """The tensors of one module of a file, by role, and what its name means."""

    name: str
    module: flux_names.FluxName
    program: str
    tensors: dict[str, paddle.Tensor] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return {"A", "B"} <= self.tensors.keys()


def _group(tensors: Mapping[str, paddle.Tensor], paths: Set[str] | None) -> tuple[list[_Stem], list[str]]:
    """Keys -> the modules they name, in their order, and the keys that name none."""
    stems: dict[str, _Stem] = {}
    unknown = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), "")
        stem = _find(key.removesuffix(suffix), paths) if suffix else None
        if stem is None:
            unknown.append(key)
            continue
        stem = stems.setdefault(stem.name, stem)
        if SUFFIXES[suffix] in stem.tensors:
            raise ConfigError(
                f"the LoRA has {SUFFIXES[suffix]} of {stem.name} twice, the second time as {key}"
            )
        stem.tensors[SUFFIXES[suffix]] = tensor
    return list(stems.values()), unknown


def _find(key: str, paths: Set[str] | None) -> _Stem | None:
    """A key without its suffix -> the module, once so many prefixes are gone that the rest is a name."""
    for name, program in without_prefixes(key):
        if paths is not None and name in paths:
            return _Stem(name, flux_names.FluxName((name,), False), program or "diffusers")
        module = flux_names.find(name)
        if module is not None and (paths is None or set(module.paths) <= paths):
            bare = "XLabs" if ".processor." in name else "BFL" if module.of_bfl else "diffusers"
            return _Stem(name, module, program or bare)
    return None


def _shown_name(stem: _Stem) -> str:
    """diffusers' path where it is one, else the file's own name."""
    return stem.module.paths[0] if len(stem.module.paths) == 1 else stem.name


def _is_in_out(stems: list[_Stem], keys: Iterable[str], header: Mapping[str, str]) -> bool:
    """Whether A is [in, rank], Paddle's way: by the header or our names, else by where the rank stands.

    A square Linear's shapes allow both; then the rank is the smaller number.
    """
    if header.get("format") == "pd" or any(key.endswith((".lora_A", ".lora_B")) for key in keys):
        return True
    shapes = [(stem.tensors["A"].shape, stem.tensors["B"].shape) for stem in stems]
    if header.get("format") == "pt" or not shapes or any(len(a) != 2 or len(b) != 2 for a, b in shapes):
        return False
    if not all(a[1] == b[0] for a, b in shapes):
        return False
    return not all(a[0] == b[1] for a, b in shapes) or all(a[0] > a[1] for a, _ in shapes)


def _read_module(stem: _Stem, in_out: bool, header: Mapping[str, str]) -> LoRAModule:
    """One module's tensors, checked against each other, in torch's order and float32, with its alpha."""
    tensors, name = stem.tensors, _shown_name(stem)
    a, b = (tensors[role].astype("float32").numpy() for role in "AB")
    a, b = (a.T, b.T) if in_out else (a, b)
    if not (a.ndim == b.ndim == 2 and len(a) == b.shape[-1] > 0):
        raise ConfigError(
            f"LoRA of {name}: A {list(a.shape)} and B {list(b.shape)} do not fit each other, wanted "
            "A [rank, in] and B [out, rank]"
        )
    rank = len(a)
    if "alpha" not in tensors:
        alpha = scale_from_header(header, name, rank) * rank
    elif tensors["alpha"].size != 1:
        raise ConfigError(f"LoRA of {name}: alpha is {list(tensors['alpha'].shape)}, wanted one number")
    else:
        alpha = float(tensors["alpha"].astype("float32"))
    if not math.isfinite(alpha):
        raise ConfigError(f"LoRA of {name}: alpha is not a finite number")
    return LoRAModule(a, b, alpha)


def tensors_and_header(file: Path) -> tuple[dict[str, paddle.Tensor], dict[str, str]]:
    """What a safetensors file holds, whatever its name: each tensor in the dtype that it has there, any
    shape; and the header. Raises SafetensorError for a damaged one."""
    with safe_open(str(file), framework="paddle") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        return tensors, dict(content.metadata() or {})


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]


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
