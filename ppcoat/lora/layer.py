"""LoRA, DoRA and LoKr put into a model from outside: choose Linears by name, replace them by LoRALinears,
DoRALinears or LoKrLinears (other kinds of a file: by ChangedLayers), take them out again, or merge them into
the weights under them.

The default targets are the attention and feed-forward Linears of both FLUX block kinds; norms, modulation and
embedders are left alone. The model needs to know nothing: its sublayers carry diffusers' names.
"""

from __future__ import annotations

import copy
import difflib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.models.flux import ATTENTION_AND_MLP
from ppcoat.nn.base_weight import BaseWeight
from ppcoat.nn.convert import set_sublayer
from ppcoat.nn.linear import FrozenLinear, LinearParameters, LoRALinear

from .delta import LoRAModule, LoRASummary, summary_of
from .dora import DoRALinear
from .kinds import Kind, LoKr
from .lokr import LoKrLinear, LoKrSettings, lokr_norm, new_factors

_LINEARS = (nn.Linear, FrozenLinear)
Deltas = Callable[[float], Mapping[str, np.ndarray]]
FLUX_TARGETS = {  # block list -> names of the Linears of attention and feed-forward inside a block
    blocks: tuple(part for parts in linears.values() for part in parts)
    for blocks, linears in ATTENTION_AND_MLP.items()
}


class ChangedLayer(nn.Layer):
    """A frozen Linear or norm that computes with a weight or bias of its own, made from the base's: for
    drawing with kinds of adapters that no LoRALinear can be.

    deltas(strength) -> {"weight", "bias": difference, float32 in torch's order, [out, in] or [n]}. Parameters
    keep their names and stay the base's. The changed ones are made where they are first used and when
    `scale_multiplier`, which multiplies the strength, is another; `enabled` as in LoRALinear. An FP8 weight
    becomes one of the compute dtype, which takes its room for as long as the adapter is there.
    """

    def __init__(self, base: nn.Layer, deltas: Deltas) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a sublayer: its parameters are registered here
        for name, parameter in [*base._parameters.items(), *base._sub_layers.items()]:
            setattr(self, name, parameter)
        self.__dict__["_deltas"], self.__dict__["_made"] = deltas, None
        self.enabled, self.scale_multiplier = True, 1.0

    def forward(self, *args: paddle.Tensor) -> paddle.Tensor:
        return self.changed()(*args) if self.enabled else self.base(*args)

    @paddle.no_grad()
    def changed(self) -> nn.Layer:
        """The base with the changed parameters."""
        if self._made is None or self._made[0] != self.scale_multiplier:
            self.__dict__["_made"] = (self.scale_multiplier, self._make(self._deltas(self.scale_multiplier)))
        return self._made[1]

    def _make(self, deltas: Mapping[str, np.ndarray]) -> nn.Layer:
        is_linear = isinstance(self.base, _LINEARS)
        new = {name: changed_parameter(self.base, name, delta) for name, delta in deltas.items()}
        if is_linear:
            weight, bias = (new.get(name, getattr(self.base, name)) for name in ("weight", "bias"))
            return FrozenLinear(LinearParameters(weight, bias))
        layer = copy.copy(self.base)
        layer.__dict__["_parameters"] = type(self.base._parameters)(self.base._parameters | new)
        return layer


def values_of(layer: nn.Layer, name: str) -> np.ndarray:
    """A parameter of a Linear or norm as float32 in torch's order, [out, in] or [n]."""
    parameter = getattr(layer, name)
    if isinstance(parameter, BaseWeight):
        return parameter.dequantized("float32").numpy().T
    values = parameter.astype("float32").numpy()
    return values.T if values.ndim == 2 else values


def changed_parameter(layer: nn.Layer, name: str, delta: np.ndarray) -> paddle.Tensor:
    """The parameter plus delta [out, in] or [n], float32 in torch's order, as a new frozen one in Paddle's
    order: rounded once to the parameter's dtype, to the bias's where the weight is quantised."""
    return _like_parameter(layer, name, values_of(layer, name) + delta)


def original_of(layer: nn.Layer) -> nn.Layer:
    """The layer of the model under an adapter, as narrow as it was loaded (`with_inputs`)."""
    base = base_of(layer)
    return base.__dict__.get("narrow", base)


def with_inputs(base: nn.Layer, inputs: int) -> nn.Layer:
    """A Linear that takes x [..., inputs]: `base`, whose own inputs come first, with zero weights for the
    others, which a control LoRA then fills. Where no more are wanted, `base` as it was loaded."""
    narrow = original_of(base)
    more = inputs - narrow.weight.shape[0]
    if more <= 0 or base.weight.shape[0] == inputs:
        return narrow if more <= 0 else base
    weight = _like_parameter(narrow, "weight", np.pad(values_of(narrow, "weight"), [(0, 0), (0, more)]))
    wide = FrozenLinear(LinearParameters(weight, narrow.bias))
    wide.__dict__["narrow"] = narrow  # not a sublayer: what is there again when the adapter is taken off
    return wide


def _like_parameter(layer: nn.Layer, name: str, values: np.ndarray) -> paddle.Tensor:
    """A new frozen parameter in Paddle's order, in the dtype that `changed_parameter` says."""
    old = getattr(layer, name)
    like = getattr(layer, "bias", None) if isinstance(old, BaseWeight) else old
    dtype = paddle.get_default_dtype() if like is None else like.dtype
    values = np.ascontiguousarray(values.T if values.ndim == 2 else values)
    new = paddle.create_parameter(
        list(values.shape), "float32", default_initializer=nn.initializer.Assign(values)
    )
    new = new if dtype == new.dtype else new.astype(dtype)
    new.stop_gradient = True
    return new


AdapterLayer = LoRALinear | LoKrLinear | ChangedLayer


def inject_lora(
    model: nn.Layer,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    policy: str = "none",
    seed: int = 0,
    group_size: int | None = 128,
    layer: type[LoRALinear] = LoRALinear,
) -> dict[str, LoRALinear]:
    """Freeze `model` and put a LoRALinear in the place of each target Linear -> {path: LoRALinear}, in model
    order.

    targets: path suffixes such as "attn.to_q" (whole dotted parts), None for FLUX_TARGETS. layer: DoRALinear
    for DoRAs. Only their parameters are trainable afterwards; the start depends on `seed` and the path alone.
    Raises ConfigError if a target matches nothing (the nearest names are given) or the model already has a
    LoRA.
    """
    if not alpha > 0:
        raise ConfigError(f"LoRA alpha must be positive for training, got {alpha!r}")

    def make(path: str, base: nn.Layer) -> LoRALinear:
        return layer(base, rank, alpha, dropout, policy, group_size, _seed_of(path, seed))

    return _inject(model, targets, make)


def inject_lokr(
    model: nn.Layer,
    settings: LoKrSettings,
    targets: Sequence[str] | None = None,
    dropout: tuple[float, float] = (0.0, 0.0),
    seed: int = 0,
    policy: str = "none",
    group_size: int | None = 128,
) -> dict[str, LoKrLinear]:
    """As `inject_lora`, with LoKrLinears. dropout: of output rows, and of whole modules."""

    def make(path: str, base: nn.Layer) -> LoKrLinear:
        width_in, width_out = base.weight.shape
        factors = new_factors(width_in, width_out, settings, _seed_of(path, seed))
        return LoKrLinear(base, factors, settings, dropout, policy, group_size)

    return _inject(model, targets, make)


def _inject(
    model: nn.Layer, targets: Sequence[str] | None, make: Callable[[str, nn.Layer], AdapterLayer]
) -> dict[str, AdapterLayer]:
    """Freeze `model` and put make(path, Linear) in the place of each target."""
    if adapter_layers(model):
        raise ConfigError("the model already has a LoRA; call remove_lora first")
    paths = target_paths(model, targets)
    for param in model.parameters():
        param.stop_gradient = True
    layers = dict(model.named_sublayers())
    injected = {}
    for path in paths:
        injected[path] = make(path, layers[path])
        injected[path].training = layers[path].training
        set_sublayer(model, path, injected[path])
    return injected


def _seed_of(path: str, seed: int) -> int:
    return zlib.crc32(f"{seed}/{path}".encode())


def target_paths(model: nn.Layer, targets: Sequence[str] | None = None) -> list[str]:
    """Paths of the Linears that `targets` select, as `inject_lora` chooses them. Raises ConfigError as it
    does.
    """
    linears = linear_paths(model)
    if targets is None:
        chosen = [path for path in linears if _is_flux_target(path)]
        if not chosen:
            raise ConfigError(f"no FLUX block Linear in this model; give `targets`, e.g. {_some(linears)}")
        return chosen
    if isinstance(targets, str) or not targets:
        raise ConfigError(f"LoRA targets must be a list of path suffixes, got {targets!r}")
    for target in targets:
        if not any(_ends_with(path, target) for path in linears):
            raise ConfigError(
                f"LoRA target {target!r} matches no Linear; the nearest are {_nearest(target, linears)}"
            )
    return [path for path in linears if any(_ends_with(path, target) for target in targets)]


def remove_lora(model: nn.Layer) -> None:
    """Take LoRAs and LoKrs out: the Linears under them are back, and the model computes exactly as without.

    Their parameters were shared all along and stay frozen.
    """
    _replace(model, {path: original_of(layer) for path, layer in adapter_layers(model).items()})


def put_layers(model: nn.Layer, layers: Mapping[str, AdapterLayer]) -> None:
    """Put adapters (or Linears without one) that were made for these paths there, in the place of all that
    are there."""
    remove_lora(model)
    _replace(model, layers)


def _replace(model: nn.Layer, layers: Mapping[str, nn.Layer]) -> None:
    for path, layer in layers.items():
        set_sublayer(model, path, layer)
    if hasattr(model, "follow_inputs"):
        model.follow_inputs()


def lora_layers(model: nn.Layer) -> dict[str, LoRALinear]:
    """{path: LoRALinear or DoRALinear} in model order."""
    return {path: layer for path, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}


def adapter_layers(model: nn.Layer) -> dict[str, AdapterLayer]:
    """{path: LoRALinear, LoKrLinear or ChangedLayer} in model order."""
    return {path: layer for path, layer in model.named_sublayers() if isinstance(layer, AdapterLayer)}


def adapter_kinds(model: nn.Layer) -> dict[str, Kind]:
    """{path: the LoRA, DoRA or LoKr there as a file has it, without `scale_multiplier`} in model order."""
    return {
        path: _kind(layer)
        for path, layer in adapter_layers(model).items()
        if not isinstance(layer, ChangedLayer)
    }


def adapter_summary(model: nn.Layer) -> LoRASummary:
    """Norms of what a model's LoRA, DoRA or LoKr adds to the weights, without `scale_multiplier`."""
    layers, norms = adapter_layers(model), {}
    for path, kind in adapter_kinds(model).items():
        if isinstance(kind, LoRAModule):
            norms[path] = kind.norm()
        else:
            norms[path] = lokr_norm(kind) if isinstance(kind, LoKr) else layers[path].change()
    return summary_of(norms)


def _kind(layer: LoRALinear | LoKrLinear) -> Kind:
    if isinstance(layer, DoRALinear):
        return layer.kind()
    arrays = {name: getattr(layer, name).numpy() for name in layer.factors}
    if isinstance(layer, LoKrLinear):
        return LoKr(arrays, layer.own_scale, layer.rank, layer.alpha)
    a, b = (np.ascontiguousarray(arrays[name].T) for name in LoRALinear.factors)
    return LoRAModule(a, b, layer.alpha)


def lora_parameters(model: nn.Layer) -> list[paddle.Tensor]:
    """lora_A [in, rank] and lora_B [rank, out] of every LoRALinear, DoRAs among them, float32, in model
    order."""
    return [param for layer in lora_layers(model).values() for param in (layer.lora_A, layer.lora_B)]


@contextmanager
def lora_disabled(model: nn.Layer) -> Iterator[None]:
    """Context manager: the model computes as if it had no LoRA and no LoKr."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def linear_paths(model: nn.Layer) -> list[str]:
    """Dotted paths of everything that a LoRA can stand on, or already stands on."""
    return [path for path, layer in model.named_sublayers() if isinstance(base_of(layer), _LINEARS)]


def norm_paths(model: nn.Layer) -> list[str]:
    """Dotted paths of the norms that have weights: layers with one vector `weight` and nothing inside."""
    return [
        path
        for path, layer in model.named_sublayers()
        for weight in [base_of(layer)._parameters.get("weight")]
        if weight is not None and weight.ndim == 1 and not layer._sub_layers
    ]


def base_of(layer: nn.Layer) -> nn.Layer:
    """The layer that an adapter stands on, or `layer` itself."""
    return layer.base if isinstance(layer, AdapterLayer) else layer


def _is_flux_target(path: str) -> bool:
    blocks, _, rest = path.partition(".")
    _, _, inside = rest.partition(".")
    return inside in FLUX_TARGETS.get(blocks, ())


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith("." + suffix)


def _nearest(target: str, paths: list[str]) -> str:
    """The suffixes in the model that look most like `target`, of as many parts as it has."""
    parts = target.count(".") + 1
    suffixes = sorted({".".join(path.split(".")[-parts:]) for path in paths})
    return ", ".join(difflib.get_close_matches(target, suffixes, n=3, cutoff=0.0)) or "none: it has no Linear"


def _some(paths: list[str]) -> str:
    return ", ".join(repr(path) for path in paths[:3]) or "(it has no Linear)"


@paddle.no_grad()
def merge_lora(model: nn.Layer) -> dict[str, list[str]]:
    """W [in, out] += alpha / rank * scale_multiplier * A B for every LoRA, which then leaves `model`; other
    adapters likewise, with what they do to biases and norms. Returns {path: names of its changed parameters}.

    The sum is taken in float32 and rounded once to the weight's own dtype. LoRAs that are switched off
    (`enabled`) are merged too. Raises ConfigError, and merges nothing, if a weight is quantised: most of
    a LoRA would be lost in its rounding.
    """
    layers = adapter_layers(model)
    for path, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, BaseWeight):
            raise ConfigError(
                f"{path}.weight is stored in {weight.name}: load the model unquantised to merge a LoRA"
            )
    # All before the first: what a fused module does to one Linear is made from the weights of the others too.
    changed = {path: layer.changed() for path, layer in layers.items() if isinstance(layer, ChangedLayer)}
    merged = {}
    for path, layer in layers.items():
        if path in changed:
            new = {name: getattr(changed[path], name) for name in layer.base._parameters}
            merged[path] = [name for name, value in new.items() if value is not getattr(layer.base, name)]
            for name in merged[path]:
                getattr(layer.base, name).set_value(new[name])
            continue
        if isinstance(layer, LoKrLinear):
            delta = layer.delta()
        elif isinstance(layer, DoRALinear):
            weight = values_of(layer.base, "weight")
            delta = paddle.to_tensor(_kind(layer).delta(weight, layer.scale_multiplier).T)
        else:
            delta = paddle.matmul(layer.lora_A, layer.lora_B) * layer.scale
        layer.weight.set_value((layer.weight.astype("float32") + delta).astype(layer.weight.dtype))
        merged[path] = ["weight"]
    for layer in layers.values():
        layer.base.__dict__.pop("narrow", None)  # what a control LoRA put in stays
    remove_lora(model)
    return merged
