"""The adapters of a pipeline: several by name, some of them active, each with its strength; and
one file put into one transformer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack

import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.linear import AdaptedLinear

from .keys import TRANSFORMER
from .layer import adapter_layers, merge_lora, put_layers
from .loading import (
    SHAPE_OF_INPUTS,
    LoRAInfo,
    Source,
    info_of,
    put_adapters,
    read_fitting,
    shapes_of,
)
from .parse import LoRAFile


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


def _layers_of(model: nn.Layer) -> dict[str, nn.Layer]:
    """The adapters of a model, and the layer that a control LoRA widens, by path."""
    widened = dict(model.named_sublayers()).get(SHAPE_OF_INPUTS)
    return adapter_layers(model) | ({} if widened is None else {SHAPE_OF_INPUTS: widened})


def _adapted(model: nn.Layer) -> list[nn.Layer]:
    """The layers under the adapters of a model."""
    return [layer.base for layer in adapter_layers(model).values()]
