"""What the adapter of a run starts from, if that is not a new one: the values of a file
(network.pretrained_lora_path), or the checkpoint of an earlier start, with the settings that it had."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle

from ppcoat.coat import chosen_modules, lokr_settings
from ppcoat.config.newbie import load_run_config
from ppcoat.config.schema import NetworkConfig, RunConfig
from ppcoat.errors import ConfigError
from ppcoat.lora import (
    DoRALinear,
    LoRAFile,
    LoRAModule,
    flux_names,
    inputs_of,
    read_fitting,
    read_lora_file,
)
from ppcoat.lora.arithmetic import Loss, combined, fitted_lokr, rank_of, told
from ppcoat.lora.files import check_known
from ppcoat.lora.header import step_from_header
from ppcoat.lora.keys import TRANSFORMER
from ppcoat.lora.kinds import DoRA, Kind, LoKr
from ppcoat.lora.loading import SHAPE_OF_INPUTS, shapes_of
from ppcoat.lora.lokr import new_factors
from ppcoat.lora.parse import Change, described
from ppcoat.train.checkpoint import has_checkpoint

START, PARTLY = "network.pretrained_lora_path", "network.pretrained_lora_partly"
_LENGTHS = "lora_magnitude_vector"  # a DoRALinear's


@dataclass(frozen=True)
class AdapterStart:
    """The first values of an adapter. factors: {path: {name of a parameter there: float32 in the parameter's
    order}}, of a smaller rank where the file's is smaller. told: lines for the user."""

    factors: dict[str, dict[str, np.ndarray]]
    told: str

    @paddle.no_grad()
    def put(self, modules: Mapping[str, paddle.nn.Layer]) -> None:
        """Give them to the adapter layers at these paths, and forget them. What a smaller rank leaves of a
        parameter keeps its own first values, whose product is zero."""
        while self.factors:
            path, factors = self.factors.popitem()
            for name, values in factors.items():
                parameter = getattr(modules[path], name)
                whole = parameter.numpy()
                whole[tuple(map(slice, values.shape))] = values
                parameter.set_value(whole)
            if isinstance(modules[path], DoRALinear) and _LENGTHS not in factors:
                modules[path].keep_lengths()  # a LoRA's delta-W is then what it was


def adapter_start(config: RunConfig, unfilled: Callable[[RunConfig], paddle.nn.Layer]) -> AdapterStart | None:
    """What network.pretrained_lora_path gives the adapter of a run: each delta-W as the file means it, cut to
    the run's rank where that is smaller. None without such a path; a run that goes on from a checkpoint does
    not read the file again.

    unfilled: gives the transformer, whose parameters need no memory. Raises ConfigError for a file that
    cannot be read, that fits another model, whose kind is not what the run trains, and, without
    network.pretrained_lora_partly, for one that has more than what the run trains.
    """
    network, path = config.network, config.network.pretrained_lora_path
    if path is None:
        return None
    if has_checkpoint(config.run_dir):
        return AdapterStart({}, f"{START} is read at the start of a run only: this one goes on where it was")
    transformer = unfilled(config)
    shapes, chosen = shapes_of(transformer), chosen_modules(network, transformer)
    try:
        file = read_lora_file(path, {name.rpartition(".")[0] for name in shapes})
        check_known(file, "it", network.pretrained_lora_partly, f"{PARTLY}: true leaves them out")
        file = replace(file, changes=[part for each in file.changes for part in _by_layer(each, shapes)])
        taken = _taken(file, network, chosen, shapes)
        read_fitting(replace(file, changes=taken, unknown=[]), {TRANSFORMER: shapes})
        fitted = {each.paths[0]: _fitted(each, network, shapes) for each in taken}
    except ConfigError as error:
        reason = str(error).removeprefix(str(path)).removeprefix(":").strip()
        raise ConfigError(f"{START} {path}: {reason}") from None
    factors = {path: values for path, (values, _) in fitted.items() if values}
    losses = {path: loss for path, (_, loss) in fitted.items()}
    return AdapterStart(factors, _account(file, network, taken, losses, len(chosen) - len(factors)))


def settings_before(config: RunConfig) -> RunConfig | None:
    """The settings of a run that this one goes on from; None for a new run, and, told, where they cannot be
    read."""
    settings = config.run_dir / "config.yaml"
    if not (settings.is_file() and has_checkpoint(config.run_dir)):
        return None
    try:
        return load_run_config(str(settings))
    except ConfigError as error:  # of another version
        print(f"the settings with which this run began cannot be read: {error}")
        return None


def as_it_started(config: RunConfig) -> RunConfig:
    """The config, in which a run that goes on from a checkpoint says what it did start from: that is what its
    files tell."""
    before = settings_before(config)
    if before is None or before.network.pretrained_lora_path == config.network.pretrained_lora_path:
        return config
    own = {name: getattr(before.network, name) for name in ("pretrained_lora_path", "pretrained_lora_partly")}
    return config.model_copy(update={"network": config.network.model_copy(update=own)})


def fields_of_start(config: RunConfig) -> dict[str, str]:
    """The header fields of a run's LoRA that say what it started from."""
    path = config.network.pretrained_lora_path
    return {} if path is None else {"pretrained_lora": Path(path).name}


def _by_layer(change: Change, shapes: Mapping[str, Sequence[int]]) -> list[Change]:
    """A DoRA of rows on a fused module (q, k and v in one) as those of its layers, whose rows they are; any
    other change as it is."""
    kind, paths = change.kind, change.paths
    if not (_is_fused(change) and isinstance(kind, DoRA) and isinstance(kind.update, LoRAModule)):
        return [change]
    if kind.magnitude.shape[1] != 1 or not all(f"{path}.weight" in shapes for path in paths):
        return [change]
    updates = flux_names.split_fused(flux_names.FluxName(paths, True), kind.update)
    lengths = np.concatenate(np.split(kind.magnitude, 2)[::-1]) if change.swapped else kind.magnitude
    sizes = [shapes[f"{path}.weight"][:2] for path in paths]
    parts = zip(paths, sizes, np.split(lengths, np.cumsum([rows for rows, _ in sizes])[:-1]), strict=True)
    found = []
    for path, (rows, columns), own in parts:
        nothing = LoRAModule(np.zeros([1, columns], "float32"), np.zeros([rows, 1], "float32"), 1.0)
        part = DoRA(updates.get(path, nothing), own, kind.rule)
        found.append(replace(change, paths=(path,), kind=part, swapped=False))
    return found


def _taken(
    file: LoRAFile, network: NetworkConfig, chosen: Collection[str], shapes: Mapping[str, Sequence[int]]
) -> list[Change]:
    """The changes of a file that the run trains. Raises ConfigError for none, and for others where they may
    not be left out."""
    sees_more = inputs_of(file) > shapes.get(f"{SHAPE_OF_INPUTS}.weight", [0, math.inf])[1]
    too_wide = SHAPE_OF_INPUTS if sees_more else None  # what a control or Fill LoRA changes
    taken = [each for each in file.changes
             if _is_trained(each.kind, network) and each.part == TRANSFORMER and each.parameter == "weight"
             and not _is_fused(each) and each.paths[0] in chosen and each.paths[0] != too_wide]  # fmt: skip
    left = [each for each in file.changes if each not in taken]
    if not left or (taken and network.pretrained_lora_partly):
        return taken
    odd = [each for each in left if each.parameter == "weight" and not _is_trained(each.kind, network)]
    if odd:
        of_rows = network.type == "dora" and any(isinstance(each.kind, DoRA) for each in odd)
        own = "DoRA of rows by PEFT's rule" if of_rows else network.type
        raise ConfigError(f"it has {described(odd)}, and {own} is what this run trains: {_way(odd, network)}")
    leave = f"{PARTLY}: true leaves that out" if taken else "start from another file"
    of_model = [each for each in left if each.part == TRANSFORMER and each.parameter == "weight"]
    first = (of_model or left)[0]
    if not of_model:
        way = f"no run trains biases or text encoders; {leave}"
    elif _is_fused(first):
        way = f"it is of several layers in one, which cannot be divided; {leave}"
    elif first.paths[0] == too_wide:
        way = f"a control or Fill LoRA sees a picture there, too; {leave}"
    else:
        way = "choose its layers with network.targets" + (f", or {leave}" if taken else "")
    raise ConfigError(
        f"it has {described(left)}, e.g. {first.paths[0]}.{first.parameter}, which this run does not "
        f"train: {way}"
    )


def _is_fused(change: Change) -> bool:
    """Whether it is of several layers in one, or of one whose halves the file has the other way round."""
    return len(change.paths) > 1 or change.swapped


def _is_trained(kind: Kind, network: NetworkConfig) -> bool:
    """Whether an adapter of the run can begin as this kind. A DoRA measures rows of the changed weight."""
    if isinstance(kind, DoRA) and network.type == "dora":
        measures_alike = kind.magnitude.shape[1] == 1 and kind.rule != "ComfyUI"
        return measures_alike and isinstance(kind.update, LoRAModule)
    return isinstance(kind, LoKr if network.type == "lokr" else LoRAModule)


def _way(odd: Sequence[Change], network: NetworkConfig) -> str:
    """What to do with kinds that a run does not train."""
    if network.type == "lokr":
        return "set network.type: lora" if all(isinstance(each.kind, LoRAModule) for each in odd) else (
            "start from a LoKr")  # fmt: skip
    if network.type == "lora" and all(isinstance(each.kind, DoRA) for each in odd):
        return "set network.type: dora, or merge it into a model and take a LoRA out with `lora extract`"
    if any(rank_of(each.kind) is None for each in odd):
        return "merge it into a model and take a LoRA out with `python -m ppcoat lora extract`"
    return "make a LoRA of it with `python -m ppcoat lora resize IN OUT --rank N`"


def _fitted(
    change: Change, network: NetworkConfig, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, np.ndarray], Loss]:
    """The change as parameters of the run's adapter layer there, which its own alpha / rank multiplies."""
    kind, path = change.kind, change.paths[0]
    own_scale = network.linear_alpha / network.linear
    if network.type != "lokr":
        lengths = {_LENGTHS: kind.magnitude.reshape([-1])} if isinstance(kind, DoRA) else {}
        module, loss = combined([(kind.update if lengths else kind, 1 / own_scale)], network.linear)
        return lengths | ({"lora_A": module.a.T, "lora_B": module.b.T} if loss.norm else {}), loss
    settings = lokr_settings(network)
    rows, columns = shapes[f"{path}.weight"]
    wanted = {name: values.shape for name, values in new_factors(columns, rows, settings, 0).items()}
    found = fitted_lokr(kind, wanted, 1.0 if {"lokr_w1", "lokr_w2"} == wanted.keys() else own_scale)
    if found is None:
        raise ConfigError(
            f"the LoKr of {path} divides its {rows} x {columns} otherwise than network.lokr_factor "
            f"{network.lokr_factor}: set that to the factor with which it was trained"
        )
    return found if found[1].norm else ({}, found[1])


def _account(
    file: LoRAFile, network: NetworkConfig, taken: Sequence[Change], losses: Mapping[str, Loss], at_zero: int
) -> str:
    """What was taken, what that lost, what was left out, in one line, and the file's notes."""
    step = step_from_header(file.header)
    ranks = [rank_of(each.kind.update if isinstance(each.kind, DoRA) else each.kind) for each in taken]
    said = [f"starting from {network.pretrained_lora_path}" + (f", step {step}" if step else "")]
    said[0] += f": {described(taken)}"
    cut = [rank for rank in ranks if rank > network.linear]
    if network.type == "lokr":
        said.append(told(losses))
    elif cut:
        before = f"{min(cut)}" if min(cut) == max(cut) else f"{min(cut)} to {max(cut)}"
        said.append(f"rank {before} cut to {network.linear} on {len(cut)} layers: {told(losses)}")
    else:
        said.append("each delta-W as it is there")
    if at_zero:
        said.append(f"{at_zero} more layers of this run start at zero")
    left = [each for each in file.changes if each not in taken]
    if left or file.unknown:
        unknown = f"{len(file.unknown)} unknown keys" if file.unknown else ""
        said.append("left out: " + ", ".join(filter(None, (left and described(left), unknown))))
    return "\n".join(["; ".join(said), *(f"note: {note}" for note in file.notes)])
