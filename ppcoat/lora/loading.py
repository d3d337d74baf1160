"""Adapters of files held to the models that they are for, and what to tell of them. adapters.py puts them
into models; writing.py and peft.py are the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import paddle
from paddle import nn

from ppcoat.errors import ConfigError

from .files import check_known, read_lora_file
from .header import step_from_header
from .keys import PART_NAMES, TRANSFORMER, clean
from .kinds import LoKr
from .layer import linear_paths, norm_paths, original_of
from .parse import Change, LoRAFile, described, is_plain, parse_lora
from .rotations import PeftRotation

Source = str | Path | Mapping[str, paddle.Tensor] | LoRAFile
Shapes = Mapping[str, Mapping[str, Sequence[int]]]
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
