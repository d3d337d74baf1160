"""The adapters of a pipeline: several by name, some of them active, each with its strength; one file put into
one transformer; and how adapters of files are put into models, for drawing and for merging.

A LoRA becomes a LoRALinear, several on one Linear become one with their factors side by side, a LoKr or a
DoRA by PEFT's rule, alone on one Linear, a LoKrLinear or DoRALinear; all work on FP8 weights as they are.
What is left (other DoRAs, LoHa, OFT, a LoKr of a fused module or beside others, biases, norms, ...) becomes a
ChangedLayer, whose weight is made from the base's. Several adapters at once: each difference is
taken from the base weight, and they are added.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.base_weight import BaseWeight
from ppcoat.nn.linear import AdaptedLinear, LoRALinear

from .delta import LoRAModule
from .dora import DoRALinear
from .keys import TRANSFORMER
from .kinds import DoRA, LoKr
from .layer import ChangedLayer, adapter_layers, base_of, merge_lora, put_layers, values_of, with_inputs
from .loading import SHAPE_OF_INPUTS, LoRAInfo, Source, info_of, inputs_of, read_fitting, shapes_of
from .lokr import LoKrLinear, LoKrSettings
from .parse import Change, LoRAFile

_log = logging.getLogger(__name__)

Active = Sequence[tuple[LoRAFile, float]]  # files and their strengths


class Adapters:
    """The adapters that were loaded into the models of a pipeline, by name, and those that are active, with
    their strengths. A call that raises has changed nothing."""

    def __init__(self, models: Callable[[], Mapping[str, nn.Layer]]) -> None:
        self._models = models
        self.files: dict[str, LoRAFile] = {}
        self.strengths: dict[str, float] = {}  # of those that are active
        # of each part that is fused: its parameters, and what they were
        self._fused: dict[str, list[tuple[paddle.Tensor, paddle.Tensor]]] = {}
        self._narrow: list[tuple[nn.Layer, nn.Layer]] = []  # Linears that were widened, and what they were

    def load(self, source: Source, name: str | None, scale: float, weight_name: str | None = None,
             ignore_unknown: bool = False) -> LoRAInfo:  # fmt: skip
        """Load one and make it the only active one. Without a name it replaces all that are there; a name
        that is there is refused with ConfigError."""
        if name in self.files:
            raise ConfigError(
                f"an adapter {name!r} is loaded already: choose another adapter_name, or delete it"
            )
        self._check_not_fused()
        models = self._models()
        for model in models.values():
            check_not_training(model)
        shapes = {part: shapes_of(model) for part, model in models.items()}
        file = read_fitting(source, shapes, None, ignore_unknown, weight_name)
        others = {} if name is None else self.files
        self._put(others | {name or "default_0": file}, {name or "default_0": scale})
        return info_of(file, scale)

    def set_active(self, names: Sequence[str], strengths: Sequence[float]) -> None:
        """Make these the active ones. Raises ConfigError for a name that is not loaded."""
        self._check_loaded(names)
        if len(strengths) != len(names):
            raise ConfigError(f"{len(names)} adapters want as many strengths, came {list(strengths)}")
        self._check_not_fused()
        self._put(self.files, dict(zip(names, map(float, strengths), strict=True)))

    def delete(self, names: Sequence[str]) -> None:
        """Forget these. Raises ConfigError for a name that is not loaded."""
        self._check_loaded(names)
        kept = {name: file for name, file in self.files.items() if name not in names}
        self._put(kept, {name: by for name, by in self.strengths.items() if name in kept})

    def fuse(self, names: Sequence[str] | None, factor: float, parts: Collection[str]) -> None:
        """Add the active ones (or these, which are then active), at `factor` times their strengths, to the
        weights of these parts; in the others they stay beside them. Raises ConfigError where that is nothing,
        and for quantised weights."""
        self._check_not_fused()
        self._check_loaded(names or ())
        active = self.strengths if names is None else {name: self.strengths.get(name, 1.0) for name in names}
        if not active:
            raise ConfigError("no adapter is active: load one first, and then fuse it")
        changed = {change.part for name in active for change in self.files[name].changes}
        if not changed & set(parts):
            raise ConfigError(
                f"the active adapters change {', '.join(sorted(changed))} only: nothing to fuse in "
                f"{', '.join(parts) or 'no part'}"
            )
        chosen = {part: model for part, model in self._models().items() if part in parts}
        before = [(model, _layers_of(model)) for model in self._models().values()]
        with ExitStack() as undoing:
            undoing.callback(self._undo, before)
            put_adapters(chosen, [(self.files[name], by * factor) for name, by in active.items()])
            for part, model in chosen.items():
                weights = [
                    p for layer in _adapted(model) for p in layer._parameters.values() if p is not None
                ]
                kept = {id(p): (p, p.clone().cpu()) for p in weights}
                self._fused[part] = list(kept.values())
                self._narrow += [(base, base.narrow) for base in _adapted(model) if hasattr(base, "narrow")]
                merge_lora(model)
            self._put(self.files, active)
            undoing.pop_all()  # all went well

    def unfuse(self) -> None:
        """The weights are bit for bit what they were before `fuse`, and the active adapters beside them."""
        if not self._fused:
            raise ConfigError("nothing is fused: call fuse_lora first")
        self._restore()
        self._put(self.files, self.strengths)

    def _put(self, files: Mapping[str, LoRAFile], strengths: Mapping[str, float]) -> None:
        """Put the adapters with `strengths` into the models that are not fused; then these are the loaded and
        the active ones."""
        free = {part: model for part, model in self._models().items() if part not in self._fused}
        put_adapters(free, [(files[name], by) for name, by in strengths.items()])
        self.files, self.strengths = dict(files), dict(strengths)

    def _restore(self) -> None:
        with paddle.no_grad():
            for parameter, before in (pair for pairs in self._fused.values() for pair in pairs):
                parameter.set_value(before)
        for layer, narrow in self._narrow:
            layer.__dict__["narrow"] = narrow
        self._fused, self._narrow = {}, []

    def _undo(self, before: Sequence[tuple[nn.Layer, Mapping[str, nn.Layer]]]) -> None:
        """Weights and adapters are those of before a fuse that stopped."""
        self._restore()
        for model, layers in before:
            put_layers(model, layers)

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.files:
                raise ConfigError(
                    f"no adapter {name!r} is loaded; there are {', '.join(self.files) or 'none'}"
                )

    def _check_not_fused(self) -> None:
        if self._fused:
            raise ConfigError("a LoRA is fused into the weights: call unfuse_lora first")


def load_lora(
    model: nn.Layer,
    source: Source,
    scale: float = 1.0,
    metadata: Mapping[str, str] | None = None,
    ignore_unknown: bool = False,
) -> LoRAInfo:
    """Put the adapter of a file or folder (or of a dict of its tensors, with its header as `metadata`) into
    `model`, a transformer.

    The file may have any format and kind that parse.py reads. Linears become LoRALinears without gradient,
    their scale times `scale`; ranks may differ from one to the next. What was loaded before is replaced.
    Tensors: A [rank, in] and B [out, rank] in most formats, any floating dtype. Raises ConfigError, and
    changes nothing, for a pickle, a damaged file, a wrong shape, keys that name nothing in the model (unless
    ignore_unknown: the rest is applied, and the result lists them), a file of another model, or a model whose
    LoRA is in training.
    """
    check_not_training(model)
    file = read_fitting(source, {TRANSFORMER: shapes_of(model)}, metadata, ignore_unknown)
    put_adapters({TRANSFORMER: model}, [(file, scale)])
    return info_of(file, scale)


def check_not_training(model: nn.Layer) -> None:
    """Raises ConfigError for a model whose LoRA, DoRA or LoKr is in training."""
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, AdaptedLinear)]
    if any(not getattr(layer, name).stop_gradient for layer in layers for name in layer.factors):
        raise ConfigError("the model has a LoRA in training: save it, then call remove_lora before load_lora")


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


def _layers_of(model: nn.Layer) -> dict[str, nn.Layer]:
    """The adapters of a model, and the layer that a control LoRA widens, by path."""
    widened = dict(model.named_sublayers()).get(SHAPE_OF_INPUTS)
    return adapter_layers(model) | ({} if widened is None else {SHAPE_OF_INPUTS: widened})


def _adapted(model: nn.Layer) -> list[nn.Layer]:
    """The layers under the adapters of a model."""
    return [layer.base for layer in adapter_layers(model).values()]
