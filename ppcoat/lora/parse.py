"""Tensors of an adapter file, by key, and its header -> `LoRAFile`: what is done to each Linear, bias and
norm of the model, in diffusers' names. Knows no model and no disk.

    diffusers   transformer.<path>.lora_A.weight [rank, in], .lora_B.weight [out, rank]
    kohya       lora_unet_<BFL name with _>.lora_down.weight, .lora_up.weight (as above), .alpha
    paddle      <path>.lora_A [in, rank], <path>.lora_B [rank, out]: our state_dict; header: format "pd"

writing.py writes these three. What other keys mean is in keys.py, the strength in header_.py, kinds beside
LoRA in kinds.py. The rule of a DoRA is that of the program that wrote it. Numbers that are not finite are
refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import paddle

from ppcoat.device import dtype_name
from ppcoat.errors import ConfigError

from . import flux_names, keys
from . import header as header_
from .delta import LoRAModule
from .keys import PART_NAMES, TRANSFORMER, KeyReader, clean
from .kinds import (
    DORA_RULES,
    Absolute,
    Difference,
    DoRA,
    Kind,
    check_factor,
    check_shapes,
    is_factor,
    is_zero,
    kind_of,
)
from .rotations import STRENGTH_OF_PEFT, PeftRotation


@dataclass(frozen=True, eq=False)
class Change:
    """What a file does to one parameter of the model.

    part: of the pipeline (keys.py). paths: of the modules whose rows, from the top, are this one's: several
    for a fused one. parameter: "weight" or "bias". name: of the module in the file. swapped: the file has
    shift before scale, BFL's order, the model scale before shift.
    """

    part: str
    paths: tuple[str, ...]
    parameter: str
    kind: Kind
    name: str
    swapped: bool = False

    def deltas(self, weights: Sequence[np.ndarray], by: float) -> list[np.ndarray]:
        """W' - W of each path at strength `by`; weights: of the paths, [out, in] or [n], float."""
        whole = weights[0] if len(weights) == 1 else np.concatenate(weights)
        if self.swapped:
            whole = _halves_swapped(whole)
        delta = self.kind.delta(whole, by)
        if self.swapped:
            delta = _halves_swapped(delta)
        return np.split(delta, np.cumsum([len(weight) for weight in weights])[:-1])


@dataclass(frozen=True)
class LoRAFile:
    """An adapter read from a file. format: the programs whose keys these are; changes: all that it does;
    unknown: keys that name no module, or that mean nothing there; dtypes: of the tensors as stored;
    incomplete: modules that lack a factor, and what they have; foreign: of which other model it is; notes:
    what its user should know; states_alpha: whether it says its strength anywhere."""

    format: str
    changes: list[Change]
    unknown: list[str]
    header: dict[str, str]
    dtypes: tuple[str, ...]
    incomplete: dict[str, str] = field(default_factory=dict)
    foreign: str | None = None
    notes: tuple[str, ...] = ()
    states_alpha: bool = True

    @property
    def modules(self) -> dict[str, LoRAModule]:
        """{diffusers path: LoRAModule} of the plain LoRAs of the transformer."""
        return self.modules_of(TRANSFORMER)

    def modules_of(self, part: str) -> dict[str, LoRAModule]:
        """{path: LoRAModule} of the plain LoRAs of a part."""
        return {each.paths[0]: each.kind for each in self.changes if each.part == part and is_plain(each)}

    @property
    def others(self) -> list[Change]:
        """What is no plain LoRA of the transformer."""
        return [each for each in self.changes if each.part != TRANSFORMER or not is_plain(each)]

    @property
    def what(self) -> str:
        """Kinds and parts with their numbers: "LoRA on 14 layers, bias on 6, CLIP: LoRA on 18"."""
        return described(self.changes)


def is_plain(change: Change) -> bool:
    """Whether it is a plain LoRA of one Linear."""
    return isinstance(change.kind, LoRAModule)


def described(changes: Iterable[Change]) -> str:
    """As `LoRAFile.what`, of any changes."""
    found = Counter()
    for each in changes:
        name = each.kind.name if each.parameter == "weight" else "bias"
        name = "norm" if each.parameter == "weight" and flux_names.is_norm(each.paths[0]) else name
        found[("" if each.part == TRANSFORMER else f"{PART_NAMES[each.part]}: ") + name] += len(each.paths)
    said = [f"{name} on {count}" for name, count in found.items()]
    layers = "layer" if said and said[0].endswith(" 1") else "layers"
    return ", ".join([f"{text} {layers}" if i == 0 else text for i, text in enumerate(said)]) or "nothing"


def parse_lora(
    tensors: Mapping[str, paddle.Tensor],
    header: Mapping[str, str],
    paths: Set[str] | None = None,
    incomplete_too: bool = False,
) -> LoRAFile:
    """Tensors of a file, by key, and its header -> LoRAFile.

    tensors: A [rank, in] and B [out, rank], transposed where the file is in Paddle's layout, and alpha, a
    scalar; other kinds as in kinds.py; any floating dtype. paths: the modules of a model, to which names are
    held; None: all of FLUX's. incomplete_too: list modules that lack a factor instead of raising. Raises
    ConfigError for such a module, for one that comes twice or whose shapes do not fit each other, for an
    alpha that is no number, and for NaN and infinities.
    """
    reader = KeyReader(paths)
    modules, unknown = _group(tensors, reader)
    of_other = _foreign(modules, unknown, header) if reader.is_flux or not modules else None
    if of_other is not None:
        modules, unknown = [], list(tensors)
    reading = _Reading(header, _is_in_out(modules, header))
    changes = [change for module in modules for change in reading.changes(module)]
    if reading.halves and not incomplete_too:
        _refuse_halves(reading.halves, unknown)
    _check_once(changes)
    changes, unknown, notes = _without_zeros(changes, [*unknown, *reading.unused], tensors)
    stated = header_.states_alpha(header) or any("alpha" in module.tensors for module in modules)
    if not stated and any(module.program == "PEFT" for module in modules):
        notes.append("adapter_config.json is not beside it: alpha = rank is assumed (scale 1)")
    programs = {"paddle"} if reading.in_out else {module.program for module in modules}
    dtypes = {dtype_name(tensor.dtype) for tensor in tensors.values() if tensor.size > 1}
    return LoRAFile(
        format=" + ".join(sorted(programs)),
        changes=changes,
        unknown=unknown,
        header=dict(header),
        dtypes=tuple(sorted(dtypes)),
        incomplete=reading.halves,
        foreign=of_other,
        notes=(*reading.notes, *notes),
        states_alpha=stated,
    )


def _refuse_halves(halves: Mapping[str, str], unknown: list[str]) -> None:
    """Raise ConfigError that names the first module which lacks a factor."""
    name, has = next(iter(halves.items()))
    listed = ", ".join(repr(key) for key in unknown[:5])  # repr: a file may hold control characters
    missed = f"; {len(unknown)} unknown keys: {listed}{', ...' * (len(unknown) > 5)}" if unknown else ""
    raise ConfigError(
        f"LoRA of {name} is incomplete: it has {has}, wanted A and B or all factors of its kind{missed}; "
        "fetch the whole file"
    )


@dataclass(frozen=True)
class _Module:
    """The tensors of one module of a file, by role, with their keys, and what its name means."""

    part: str
    name: str
    target: flux_names.FluxName
    program: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """diffusers' path where it is one, else the file's own name."""
        return self.target.paths[0] if len(self.target.paths) == 1 else self.name


def _group(tensors: Mapping[str, paddle.Tensor], reader: KeyReader) -> tuple[list[_Module], list[str]]:
    """Keys -> the modules they name, in their order, and the keys that name none."""
    modules, unknown = {}, []
    for key, tensor in tensors.items():
        found = reader.read(key)
        if found is None:
            unknown.append(key)
            continue
        new = _Module(found.part, found.name, found.target, found.program)
        module = modules.setdefault((found.part, found.name), new)
        if found.role in module.tensors:
            raise ConfigError(
                f"the LoRA has {found.role} of {module.name} twice, as "
                f"{clean(module.keys[found.role])} and as {clean(key)}: keep one of them"
            )
        module.tensors[found.role] = values = tensor.astype("float32").numpy()
        check_factor(found.role, values, clean(key))
        module.keys[found.role] = key
    return list(modules.values()), unknown


class _Reading:
    """Modules of one file -> Changes; and what came up on the way: halves of LoRAs, keys that are not used,
    notes for the user."""

    def __init__(self, header: Mapping[str, str], in_out: bool) -> None:
        self.header, self.in_out = header, in_out
        self.halves: dict[str, str] = {}
        self.unused: list[str] = []
        self.notes: list[str] = []

    def changes(self, module: _Module) -> list[Change]:
        """What the tensors of one module do to its weight and to its bias."""
        tensors, name = module.tensors, module.shown
        weight, used = self._weight(module)
        found = [] if weight is None else [self._change(module, "weight", weight)]
        biases = {"B.bias": lambda values: Difference(values * self._scale(module)), "diff_b": Difference,
                  "=bias": Absolute}  # fmt: skip
        for role, make in biases.items():
            if role in tensors and (role != "B.bias" or "B" in used):
                found.append(self._change(module, "bias", make(tensors[role])))
                used = used | {role}
        left = tensors.keys() - used - {"alpha", "shape"}
        of_factors = not flux_names.is_norm(module.target.paths[0]) and any(map(is_factor, left))
        if weight is None and not used and (of_factors or not left):
            self.halves[name] = ", ".join(sorted(tensors))
            return []
        self.unused += [module.keys[role] for role in tensors if role in left]
        for change in found:
            check_shapes(change.kind, name)
        if weight is not None and isinstance(weight, LoRAModule):
            parts = flux_names.split_fused(module.target, weight)
            found[:1] = [self._change(module, "weight", kind, (path,)) for path, kind in parts.items()]
        return found

    @staticmethod
    def _change(module: _Module, parameter: str, kind: Kind, paths: tuple[str, ...] = ()) -> Change:
        """paths: of a plain LoRA after flux_names split it and put its halves in order."""
        target = module.target
        swapped = not paths and target.of_bfl and target.paths == (flux_names.HALVES_SWAPPED,)
        return Change(module.part, paths or target.paths, parameter, kind, module.name, swapped)

    def _weight(self, module: _Module) -> tuple[Kind | None, set[str]]:
        """The kind that the tensors of a weight make, and their roles."""
        tensors, kind, used = module.tensors, None, set()
        config = header_.adapter_config(self.header, module.part)
        if flux_names.is_norm(module.target.paths[0]) and module.part == TRANSFORMER:
            tensors = {role: values for role, values in tensors.items() if role in ("diff", "=weight")}
        if {"A", "B"} <= tensors.keys():
            kind, used = self._lora(module), {"A", "B"}
        else:
            full_lokr = partial(header_.full_lokr, self.header, module.part, self._names(module))
            kind, used = kind_of(tensors, lambda dim: self._alpha(module, dim), full_lokr, config)
        role = next((role for role in ("magnitude", "dora_scale") if role in tensors), None)
        if kind is None or role is None:
            if isinstance(kind, PeftRotation):
                self._note(STRENGTH_OF_PEFT)
            if role is None and config.get("use_dora") and used:
                raise ConfigError(
                    f"LoRA of {module.shown}: its config says DoRA, and the file has no magnitudes; fetch "
                    "the whole file"
                )
            return kind, used
        rule = "PEFT" if role == "magnitude" else self._dora_rule(module.program)
        magnitude = tensors[role] if tensors[role].ndim == 2 else tensors[role].reshape([-1, 1])
        self._note(f"DoRA by the rule of {rule}: {DORA_RULES[rule]}")
        return DoRA(kind, magnitude, rule), used | {role}

    def _dora_rule(self, program: str) -> str:
        if self.header.get(header_.DORA_RULE) in DORA_RULES:
            return self.header[header_.DORA_RULE]
        if any(field.startswith("ot_") for field in self.header):
            return "OneTrainer"
        return program if program in DORA_RULES and program != "PEFT" else "LyCORIS"

    def _lora(self, module: _Module) -> LoRAModule:
        """A and B, checked against each other, in torch's order and float32, with their alpha."""
        a, b = (module.tensors[role].T if self.in_out else module.tensors[role] for role in "AB")
        if len(a) != b.shape[-1]:
            raise ConfigError(
                f"LoRA of {module.shown}: A {list(a.shape)} and B {list(b.shape)} do not fit each "
                "other, wanted "
                "A [rank, in] and B [out, rank]"
            )
        return LoRAModule(a, b, self._alpha(module, len(a)))

    def _scale(self, module: _Module) -> float:
        rank = module.tensors["A"].shape[1 if self.in_out else 0]
        return self._alpha(module, rank) / rank

    def _alpha(self, module: _Module, rank: int) -> float:
        """alpha of a module of `rank`: its own tensor, the header, or the rank."""
        own = module.tensors.get("alpha")
        if own is None:
            said = header_.alpha_of(self.header, module.part, self._names(module), rank)
            if said is not None and header_.is_kohyas(self.header, module.part):
                self._note("the strength is that of the header field ss_network_alpha: no .alpha tensors")
            return float(rank) if said is None else said
        return float(own.reshape([]))

    def _note(self, text: str) -> None:
        """Once, however many modules it is true of."""
        if text not in self.notes:
            self.notes.append(text)

    @staticmethod
    def _names(module: _Module) -> tuple[str, ...]:
        return module.name, *module.target.paths


def _foreign(modules: list[_Module], unknown: list[str], header: Mapping[str, str]) -> str | None:
    """Of which other model the file is; None where nothing says so."""
    pairs = {m.name: (m.tensors["A"], m.tensors["B"]) for m in modules if {"A", "B"} <= m.tensors.keys()}
    widths = {name: (a.shape[-1], len(b)) for name, (a, b) in pairs.items()}
    every = [*unknown, *(key for module in modules for key in module.keys.values())]
    return keys.foreign_model(every, unknown, widths, header)


def _is_in_out(modules: list[_Module], header: Mapping[str, str]) -> bool:
    """Whether A is [in, rank], Paddle's way: by the header, else by where the rank stands.

    A square Linear's shapes allow both; then the rank is the smaller number.
    """
    if header.get("format") == "pd":
        return True
    pairs = [(m.tensors["A"].shape, m.tensors["B"].shape) for m in modules if {"A", "B"} <= m.tensors.keys()]
    if header.get("format") == "pt" or not pairs:
        return False
    if not all(a[1] == b[0] for a, b in pairs):
        return False
    return not all(a[0] == b[1] for a, b in pairs) or all(a[0] > a[1] for a, _ in pairs)


def _is_idle(change: Change) -> bool:
    """Whether it does nothing and stands beside the LoRA proper: programs write text encoders and differences
    that were not trained as zeros."""
    if isinstance(change.kind, LoRAModule):
        return change.part != TRANSFORMER and not change.kind.norm()
    return isinstance(change.kind, Difference) and not change.kind.values.any()


def _without_zeros(
    changes: list[Change], unknown: list[str], tensors: Mapping[str, paddle.Tensor]
) -> tuple[list[Change], list[str], list[str]]:
    """changes and unknown keys without those that are all zero, and notes that say so."""
    notes = []
    zero = {key for key in unknown if changes and not tensors[key].astype("float32").numpy().any()}
    if zero:
        notes.append(f"{len(zero)} tensors that name nothing here are all zero: left out")
    kept = [change for change in changes if not _is_idle(change)]
    if kept and len(kept) < len(changes):
        notes.append(f"all zero, left out: {described(filter(_is_idle, changes))}")
    kept = kept or changes
    if kept and all(is_zero(each.kind) for each in kept):
        notes.append("this LoRA changes nothing: its factors (every A or B, say) or alpha are zero")
    return kept, [key for key in unknown if key not in zero], notes


def _check_once(changes: list[Change]) -> None:
    """Raise ConfigError for a parameter that two modules of the file speak of."""
    said: dict[tuple[str, str, str], str] = {}
    for change in changes:
        for path in change.paths:
            first = said.setdefault((change.part, path, change.parameter), change.name)
            if first != change.name:
                raise ConfigError(
                    f"the LoRA has {path} twice, as {first} and as {change.name}: keep one of them"
                )


def _halves_swapped(values: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(values, 2)[::-1])
