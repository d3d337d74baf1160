"""The adapters of a pipeline: several by name, some of them active, each with its strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError

from .layer import adapter_layers
from .loading import LoRAInfo, Source, check_not_training, info_of, put_adapters, read_fitting, shapes_of
from .parse import LoRAFile


class Adapters:
    """The adapters that were loaded into the models of a pipeline, by name, and those that are active, with
    their strengths."""

    def __init__(self, models: Callable[[], Mapping[str, nn.Layer]]) -> None:
        self._models = models
        self.files: dict[str, LoRAFile] = {}
        self.strengths: dict[str, float] = {}  # of those that are active
        self._fused: list[tuple[paddle.Tensor, paddle.Tensor]] = []  # parameters, and what they were

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
        if name is None:
            self.files.clear()
        self.files[name or "default_0"] = file
        self.strengths = {name or "default_0": scale}
        self.put()
        return info_of(file, scale)

    def set_active(self, names: Sequence[str], strengths: Sequence[float]) -> None:
        """Make these the active ones. Raises ConfigError for a name that is not loaded."""
        unknown = [name for name in names if name not in self.files]
        if unknown:
            raise ConfigError(
                f"no adapter {unknown[0]!r} is loaded; there are {', '.join(self.files) or 'none'}"
            )
        if len(strengths) != len(names) or not all(np.isfinite(each) for each in strengths):
            raise ConfigError(f"{len(names)} adapters want as many finite strengths, came {list(strengths)}")
        self._check_not_fused()
        self.strengths = dict(zip(names, map(float, strengths), strict=True))
        self.put()

    def delete(self, names: Sequence[str]) -> None:
        """Forget these. Raises ConfigError for a name that is not loaded."""
        missing = [name for name in names if name not in self.files]
        if missing:
            raise ConfigError(
                f"no adapter {missing[0]!r} is loaded; there are {', '.join(self.files) or 'none'}"
            )
        for name in names:
            del self.files[name]
            self.strengths.pop(name, None)
        if not self._fused:
            self.put()

    def put(self) -> None:
        """Put the active ones into the models."""
        put_adapters(self._models(), [(self.files[name], by) for name, by in self.strengths.items()])

    def fuse(self, names: Sequence[str] | None, factor: float, merge: Callable[[nn.Layer], dict]) -> None:
        """Add the active ones (or these), at `factor` times their strengths, to the weights."""
        self._check_not_fused()
        if names is not None:
            self.set_active(names, [self.strengths.get(name, 1.0) for name in names])
        if not self.strengths:
            raise ConfigError("no adapter is active: load one first, and then fuse it")
        kept = self.strengths
        self.strengths = {name: by * factor for name, by in kept.items()}
        self.put()
        self.strengths = kept
        for model in self._models().values():
            parameters = [p for layer in _adapted(model) for p in layer._parameters.values() if p is not None]
            before = {id(p): (p, p.clone().cpu()) for p in parameters}
            merge(model)
            self._fused += before.values()

    def unfuse(self) -> None:
        """The weights are bit for bit what they were before `fuse`, and the active adapters beside them."""
        if not self._fused:
            raise ConfigError("nothing is fused: call fuse_lora first")
        with paddle.no_grad():
            for parameter, before in self._fused:
                parameter.set_value(before)
        self._fused = []
        self.put()

    def _check_not_fused(self) -> None:
        if self._fused:
            raise ConfigError("a LoRA is fused into the weights: call unfuse_lora first")


def _adapted(model: nn.Layer) -> list[nn.Layer]:
    """The layers under the adapters of a model."""
    return [layer.base for layer in adapter_layers(model).values()]
