"""Adapters of files put into models, for drawing and for merging. writing.py and peft.py are the way back.

A LoRA becomes a LoRALinear, several on one Linear become one with their factors side by side, a LoKr or a
DoRA by PEFT's rule, alone on one Linear, a LoKrLinear or DoRALinear; all work on FP8 weights as they are.
What is left (other DoRAs, LoHa, OFT, a LoKr of a fused module or beside others, biases, norms, ...) becomes a
ChangedLayer, whose weight is made from the base's. Several adapters at once: each difference is
taken from the base weight, and they are added.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.base_weight import BaseWeight
from ppcoat.nn.linear import LoRALinear

from .delta import LoRAModule
from .dora import DoRALinear
from .files import check_known, read_lora_file
from .header import step_from_header
from .keys import PART_NAMES, TRANSFORMER, clean
from .kinds import DoRA, LoKr
from .layer import (
    ChangedLayer,
    base_of,
    linear_paths,
    norm_paths,
    original_of,
    put_layers,
    values_of,
    with_inputs,
)
from .lokr import LoKrLinear, LoKrSettings
from .parse import Change, LoRAFile, described, is_plain, parse_lora
from .rotations import PeftRotation

_log = logging.getLogger(__name__)

Source = str | Path | Mapping[str, paddle.Tensor] | LoRAFile
Shapes = Mapping[str, Mapping[str, Sequence[int]]]
Active = Sequence[tuple[LoRAFile, float]]  # files and their strengths
SHAPE_OF_INPUTS = "x_embedder"  # the Linear that tells a control or Fill LoRA
LEAVES_OUT = "--ignore_unknown (ignore_unknown=True) leaves that out"
NOTE_OF_CONTROL = "a control LoRA: the model now draws after a picture (control_image)"


@dataclass(frozen=True)
class LoRAInfo:
    """What `load_lora` found: kinds and counts in words; the transformer's LoRAs and LoKrs with their ranks
    and scales; keys that fit nothing; notes for the user; the header's facts; and the strength that was asked
    for.
    """

    what: str
    ranks: dict[str, int]
    scales: dict[str, float]
    unmatched: list[str]
    notes: tuple[str, ...] = ()
    trigger_word: str = ""
    step: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    strength: float = 1.0

    def line(self) -> str:
        """One line for a user."""
        left = (
            f", {len(self.unmatched)} keys left out, e.g. {clean(self.unmatched[0])}"
            if self.unmatched
            else ""
        )
        trigger = f", trigger word {clean(self.trigger_word)}" if self.trigger_word else ""
        return f"{self.what} at scale {self.strength:g}{trigger}{left}"


def read_fitting(
    source: Source,
    shapes: Shapes,
    metadata: Mapping[str, str] | None = None,
    ignore_unknown: bool = False,
    weight_name: str | None = None,
) -> LoRAFile:
    """Read an adapter and hold it to the models that `shapes` describes: {part: {parameter of a Linear or
    norm: its shape in torch's order}}. One that was read already is held to them only. With ignore_unknown,
    what they lack is left out and listed in `unknown`. Raises ConfigError as `load_lora` does."""
    name = str(source) if isinstance(source, str | Path) else "this LoRA"
    if isinstance(source, LoRAFile):
        file = source
    else:
        paths = {parameter.rpartition(".")[0] for parameter in shapes[TRANSFORMER]}
        if isinstance(source, Mapping):
            file = parse_lora(source, metadata or {}, paths)
        else:
            file = read_lora_file(source, paths, weight_name=weight_name)
    check_known(file, name, ignore_unknown)
    return _fitted(file, shapes, name, ignore_unknown)


def shapes_of(model: nn.Layer) -> dict[str, list[int]]:
    """{name of a parameter of a Linear or norm: its shape in torch's order}."""
    layers = dict(model.named_sublayers())
    found = {}
    for path in (*linear_paths(model), *norm_paths(model)):
        layer = original_of(layers[path])
        for name in ("weight", "bias"):
            parameter = getattr(layer, name, None)
            if parameter is not None:
                found[f"{path}.{name}"] = list(parameter.shape)[::-1]
    return found


def _fitted(file: LoRAFile, shapes: Shapes, name: str, ignore_unknown: bool) -> LoRAFile:
    """`file`, or with ignore_unknown without what is not in the models. Raises ConfigError for a part or
    parameter that is missing, and for another shape."""

    def is_there(each: Change) -> bool:
        """Of a text encoder of another size, too, it is not."""
        own = shapes.get(each.part, {})
        if not all(f"{path}.{each.parameter}" in own for path in each.paths):
            return False
        if each.part == TRANSFORMER or not ignore_unknown:
            return True
        return _came_and_wanted(each, own)[0] == _came_and_wanted(each, own)[1]

    absent = [each for each in file.changes if not is_there(each)]
    if absent and not ignore_unknown:
        first = absent[0]
        raise ConfigError(
            f"{name} has {described(absent)}, e.g. {first.paths[0]}.{first.parameter} of "
            f"{PART_NAMES[first.part]}, which the model lacks; {LEAVES_OUT}"
        )
    kept = [each for each in file.changes if is_there(each)]
    if not kept:
        raise ConfigError(f"{name} fits no layer of the model: it has {described(absent)}")
    for change in kept:
        _check_shape(change, shapes[change.part], name)
    is_told = NOTE_OF_CONTROL in file.notes  # to one who read it before
    if not is_told and any(_is_of_control(change, shapes[change.part]) for change in kept):
        file = replace(file, notes=(*file.notes, NOTE_OF_CONTROL))
    if not absent:
        return file
    left = [f"{each.paths[0]}.{each.parameter}" for each in absent]
    return replace(file, changes=kept, unknown=[*file.unknown, *left])


def inputs_of(file: LoRAFile) -> int:
    """How many inputs its change of the tokens' embedder (x_embedder) is for: 128 of a control LoRA of
    FLUX.1; 0 where it has none."""
    shapes = [each.kind.shape for each in file.changes if each.paths == (SHAPE_OF_INPUTS,)]
    return max((shape[1] or 0 for shape in shapes if len(shape) == 2), default=0)


def _is_of_control(change: Change, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether it is for twice the inputs that FLUX.1's x_embedder has: those of a control picture, too."""
    return _inputs_by(change, shapes) in ((2, 1), (2, 2))


def _inputs_by(change: Change, shapes: Mapping[str, Sequence[int]]) -> tuple[float, float]:
    """How many times FLUX.1's inputs, which are as many as its outputs, a change of x_embedder is for, and
    how many times as many the model has; zeros for what is no such change, and for other models."""
    came, wanted = _came_and_wanted(change, shapes)
    of_embedder = change.paths == (SHAPE_OF_INPUTS,) and any("transformer_blocks" in name for name in shapes)
    if not of_embedder or len(came) != 2 or came[0] != wanted[0]:
        return 0, 0
    outputs = shapes.get("proj_out.weight", wanted[1:])[0]
    return came[1] / outputs, wanted[1] / outputs


def _came_and_wanted(change: Change, shapes: Mapping[str, Sequence[int]]) -> tuple[list[int], list[int]]:
    """The shape that a change is for, and that of the model's parameter."""
    whole = [shapes[f"{path}.{change.parameter}"] for path in change.paths]
    wanted = [sum(shape[0] for shape in whole), *whole[0][1:]]
    came = list(change.kind.shape)
    if len(came) == len(wanted):
        came = [had if size is None else size for size, had in zip(came, wanted, strict=True)]
    if isinstance(change.kind, PeftRotation) and len(came) == 2 and came[1] % change.kind.block:
        came[1] = change.kind.block  # one block that turns all columns, which it does not divide
    return came, wanted


def _check_shape(change: Change, shapes: Mapping[str, Sequence[int]], name: str) -> None:
    came, wanted = _came_and_wanted(change, shapes)
    times, own = _inputs_by(change, shapes)
    if came == wanted or {times, own} == {1, 2}:  # the one is FLUX.1, the other sees a control picture
        return
    path = ", ".join(change.paths)
    if times > own:
        kind = "a Fill LoRA" if times == 6 else "of another FLUX"
        raise ConfigError(
            f"{name} is {kind}: its {path} takes {came[1]} inputs, that of this model {wanted[1]}; use a "
            "LoRA of FLUX.1-dev or a control LoRA"
        )
    factors = ""
    if is_plain(change):
        factors = f": A {list(change.kind.a.shape)} and B {list(change.kind.b.shape)} do not fit a Linear " \
                  f"{wanted[1]} -> {wanted[0]}"  # fmt: skip
    is_main = change.part == TRANSFORMER
    whose, use = ("the model", "use one of this model") if is_main else (PART_NAMES[change.part], LEAVES_OUT)
    raise ConfigError(
        f"{change.kind.name} of {path} in {name} is for {change.parameter} {came} [out, in], "
        f"{whose} has {wanted}: they are not of one model{factors}; {use}"
    )


def info_of(file: LoRAFile, scale: float) -> LoRAInfo:
    """What to tell of a file that is put into models with strength `scale`."""
    plain, lokr = (
        file.modules,
        {each.paths[0]: each.kind for each in file.changes if isinstance(each.kind, LoKr)},
    )
    ranks = {path: module.rank for path, module in plain.items()}
    ranks |= {path: kind.rank for path, kind in lokr.items()}
    scales = {path: kind.scale * scale for path, kind in (plain | lokr).items()}
    trigger_word, step = file.header.get("trigger_word", ""), step_from_header(file.header)
    return LoRAInfo(
        file.what, ranks, scales, file.unknown, file.notes, trigger_word, step, file.header, scale
    )


def tell(info: LoRAInfo, before: str = "") -> None:
    """Print what a LoRA does, after the text `before`, and what its user should know."""
    print(before + info.line())
    for note in info.notes:
        print(f"note: {note}")


def put_adapters(models: Mapping[str, nn.Layer], active: Active) -> None:
    """Put adapters, each with its strength, into the models by part, in the place of all that is there.

    Raises ConfigError, and changes nothing, for a strength that is no finite number.
    """
    for file, by in active:
        if not math.isfinite(by):
            raise ConfigError(f"the strength of {file.what} must be a finite number, got {by}")
    built = {part: _adapter_layers(model, active, part) for part, model in models.items()}
    for part, model in models.items():
        put_layers(model, built[part])


def _adapter_layers(model: nn.Layer, active: Active, part: str) -> dict[str, nn.Layer]:
    """{path: what is to stand there}, made from the layers under the adapters that are in `model` now."""
    bases = {path: base_of(layer) for path, layer in model.named_sublayers()}
    embedder = bases.get(SHAPE_OF_INPUTS) if part == TRANSFORMER else None
    if embedder is not None:
        bases[SHAPE_OF_INPUTS] = with_inputs(
            embedder, max((inputs_of(file) for file, _ in active), default=0)
        )
    by_path = _by_path(active, part, lambda path, name: values_of(bases[path], name))
    built = {path: _layer(base, path, by_path[path]) for path, base in bases.items() if path in by_path}
    for path, new in built.items():
        new.training = bases[path].training
    if embedder is not None and bases[SHAPE_OF_INPUTS] is not embedder:
        built.setdefault(SHAPE_OF_INPUTS, bases[SHAPE_OF_INPUTS])
    dense = [
        path
        for path, new in built.items()
        if isinstance(new, ChangedLayer)
        and isinstance(getattr(new, "weight", None), BaseWeight)
        and any(each.change.parameter == "weight" for each in by_path[path])
    ]
    if dense:
        _log.warning(
            "%d quantised weights, e.g. %s, are held unquantised beside them while this adapter is on: "
            "on these Linears it is no LoRA, LoKr or DoRA of PEFT's rule alone",
            *(len(dense), dense[0]),
        )
    return built


def added(
    active: Active, part: str, base: Callable[[str], np.ndarray]
) -> dict[str, Callable[[], np.ndarray]]:
    """{parameter: function that gives what the adapters add to it}, float32 in torch's order, [out, in] or
    [n].

    base(name): the parameter without them, likewise. For checking what was merged, one parameter at a time.
    """
    by_path = _by_path(active, part, lambda path, name: base(f"{path}.{name}"))
    found: dict[str, list[_Differences]] = {}
    for path, each_of in by_path.items():
        for each in each_of:
            found.setdefault(f"{path}.{each.change.parameter}", []).append(each)

    def total(name: str) -> np.ndarray:
        return sum(each.take(name.rpartition(".")[0]) for each in found[name])

    return {name: partial(total, name) for name in found}


class _Differences:
    """W' - W of the layers of one change at its strength. A fused module's are of one piece: they are made
    when the first is wanted, and each is handed out once. base(path, parameter): float32 in torch's order."""

    def __init__(self, change: Change, by: float, base: Callable[[str, str], np.ndarray]) -> None:
        self.change, self.by, self._base = change, by, base
        self._left: dict[str, np.ndarray] = {}
        self._factor = 1.0

    def take(self, path: str, factor: float = 1.0) -> np.ndarray:
        """That of the layer at `path`, at `factor` times the strength."""
        if path not in self._left or self._factor != factor:
            paths, self._factor = self.change.paths, factor
            whole = [self._base(each, self.change.parameter) for each in paths]
            self._left = dict(zip(paths, self._deltas(whole, self.by * factor), strict=True))
        return self._left.pop(path)

    def _deltas(self, whole: list[np.ndarray], by: float) -> list[np.ndarray]:
        """Of weights that have more columns than the change is for, the first are meant."""
        columns = None if whole[0].ndim == 1 else self.change.kind.shape[1]
        if columns is None or columns == whole[0].shape[1]:
            return self.change.deltas(whole, by)
        deltas = self.change.deltas([weight[:, :columns] for weight in whole], by)
        return [np.pad(delta, [(0, 0), (0, whole[0].shape[1] - columns)]) for delta in deltas]


def _by_path(
    active: Active, part: str, base: Callable[[str, str], np.ndarray]
) -> dict[str, list[_Differences]]:
    """{path of a layer: what is done to it}; the layers of a fused module share theirs."""
    found: dict[str, list[_Differences]] = {}
    for file, by in active:
        for change in (each for each in file.changes if each.part == part):
            shared = _Differences(change, by, base)
            for path in change.paths:
                found.setdefault(path, []).append(shared)
    return found


def _layer(base: nn.Layer, path: str, differences: list[_Differences]) -> nn.Layer:
    """What stands in the place of the layer at `path`."""
    weights = [(each.change.kind, each.by) for each in differences if each.change.parameter == "weight"]
    only_weights = len(weights) == len(differences)
    if only_weights and all(isinstance(kind, LoRAModule) for kind, _ in weights):
        inputs = base.weight.shape[0]
        return _lora_linear(base, [(kind.with_inputs(inputs), by) for kind, by in weights])
    if only_weights and len(weights) == len(differences[0].change.paths) == 1:
        kind, by = weights[0]
        if isinstance(kind, LoKr) and kind.shape[1] == base.weight.shape[0]:
            return _lokr_linear(base, kind, by)
        if isinstance(kind, DoRA) and kind.rule == "PEFT" and isinstance(kind.update, LoRAModule):
            return _dora_linear(base, kind, by)
    return ChangedLayer(base, partial(_deltas, path, differences))


def _deltas(path: str, differences: list[_Differences], factor: float) -> dict[str, np.ndarray]:
    """{"weight" or "bias": sum of the differences at `factor` times their strengths} of one layer."""
    found: dict[str, np.ndarray] = {}
    for each in differences:
        name = each.change.parameter
        found[name] = found.get(name, 0.0) + each.take(path, factor)
    return found


def _lora_linear(base: nn.Layer, modules: list[tuple[LoRAModule, float]]) -> LoRALinear:
    """A LoRALinear on `base` with the files' tensors, side by side if there are several, for drawing."""
    (module, by), *more = modules
    if more:
        b = np.concatenate([each.b * np.float32(each.scale * by) for each, by in modules], axis=1)
        module, by = LoRAModule(np.concatenate([each.a for each, _ in modules]), b, b.shape[1]), 1.0
    layer = LoRALinear(base, module.rank, alpha=module.alpha * by)
    layer.lora_A.set_value(_paddle_order(module.a))
    layer.lora_B.set_value(_paddle_order(module.b))
    layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    return layer


def _dora_linear(base: nn.Layer, kind: DoRA, by: float) -> DoRALinear:
    """As it is trained: the strength weakens its LoRA, before lengths are set."""
    module = kind.update
    layer = DoRALinear(base, module.rank, module.alpha)
    layer.scale_multiplier = by
    values = (_paddle_order(module.a), _paddle_order(module.b), kind.magnitude.reshape([-1]))
    for name, value in zip(layer.factors, values, strict=True):
        getattr(layer, name).set_value(value)
        getattr(layer, name).stop_gradient = True
    return layer


def _lokr_linear(base: nn.Layer, kind: LoKr, by: float) -> LoKrLinear:
    layer = LoKrLinear(base, kind.factors, LoKrSettings(kind.rank, kind.alpha))
    layer.scale_multiplier = by * kind.scale / layer.own_scale
    for name in layer.factors:
        getattr(layer, name).stop_gradient = True
    return layer


def _paddle_order(matrix: np.ndarray) -> np.ndarray:
    """Torch's [out, in] -> Paddle's [in, out]."""
    return np.ascontiguousarray(matrix.T)
