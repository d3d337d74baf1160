"""Put Linears that save nothing for backward, or whose weights are quantised, into a model from outside: the
model file does not know about either.
"""

from __future__ import annotations

import logging

import paddle
from paddle import nn

from ppcoat.errors import ConfigError

from .base_weight import BASES, BaseWeight, FP8Weight
from .linear import AdaptedLinear, FrozenLinear, LinearParameters
from .policy import granularity_groups

_log = logging.getLogger(__name__)


def replace_linear_with_fp8(
    model: nn.Layer, linear_granularity: str = "per_tensor", group_size: int = 128
) -> nn.Layer:
    """Make the Linears inside `model` save for backward what COAT saves, in place; returns `model`.

    A frozen nn.Linear (weight and bias have stop_gradient) becomes a FrozenLinear, which saves nothing; a
    LoRALinear (or one of a DoRA or LoKr) whose policy is "none" saves its input in FP8 from now on, with one
    scale "per_tensor" or "per_group" of `group_size` features. Parameters are shared, not copied, and keep
    their names in the state_dict. Trainable Linears and subclasses of Linear stay as they are: what autograd
    saves of them is turned into FP8 by `fp8_saved_tensors`; a warning says so where nothing is left to
    change. Raises ConfigError for wrong values.
    """
    if not save_linears_in_fp8(model, granularity_groups(linear_granularity, group_size)):
        _log.warning(
            "replace_linear_with_fp8 changes nothing: the model has neither a frozen Linear nor a LoRA; run "
            "its forward pass inside fp8_saved_tensors() to save activations in FP8"
        )
    return model


def save_linears_in_fp8(model: nn.Layer, groups: int | None) -> bool:
    """What `replace_linear_with_fp8` does, one scale for `groups` features (None: one for all) -> whether
    there is a Linear that saves as COAT does."""
    layers = list(model.named_sublayers())
    for path, layer in layers:
        if isinstance(layer, AdaptedLinear):
            layer.policy = "coat" if layer.policy == "none" else layer.policy
            layer.group_size = groups
        elif _is_frozen(layer):
            set_sublayer(model, path, FrozenLinear(layer))
    return any(isinstance(layer, FrozenLinear | AdaptedLinear) or _is_frozen(layer) for _, layer in layers)


def _is_frozen(layer: nn.Layer) -> bool:
    return type(layer) is nn.Linear and all(param.stop_gradient for param in layer.parameters())


def quantize_linears(model: nn.Layer, base: str = "fp8") -> list[str]:
    """Store the weight of every nn.Linear inside `model` quantised, in place -> their paths.

    base: "fp8", "int8", "nf4" or "fp4". Each becomes a FrozenLinear with a BaseWeight under its old name and
    with its old bias; call it before inject_lora. Raises ConfigError for another base, a Linear that already
    carries a LoRA or is quantised, and for weights that are not finite. (models/quantized_base.py does the
    same while it reads a model from disk.)
    """
    check_format(base)
    layers = list(model.named_sublayers())
    for path, layer in layers:
        if isinstance(layer, AdaptedLinear):
            raise ConfigError(f"{path} carries a LoRA: quantise the base before inject_lora")
        if isinstance(layer, BaseWeight):
            raise ConfigError(f"{path} is stored in {layer.name} already: load the model unquantised")
    paths = [path for path, layer in layers if type(layer) is nn.Linear]
    for path in paths:
        layer = sublayer_at(model, path)
        set_base_weight(model, path, BASES[base].of(layer.weight), layer.bias)
    return paths


def check_format(base: str | None) -> None:
    """Raises ConfigError for what is no format of base weights; None is none."""
    if base is not None and base not in BASES:
        raise ConfigError(f"unknown format of base weights {base!r}; use one of {', '.join(BASES)}")


def set_base_weight(model: nn.Layer, path: str, weight: BaseWeight, bias: paddle.Tensor | None) -> None:
    """Put a FrozenLinear with a quantised `weight` [in, out] and float `bias` [out] in the place of the
    Linear model.<path>."""
    frozen = FrozenLinear(LinearParameters(weight, bias))
    frozen.training = sublayer_at(model, path).training
    set_sublayer(model, path, frozen)


def multiply_in_fp8(model: nn.Layer) -> list[str]:
    """Let products with the FP8 weights of the blocks be FP8 products -> the paths of these Linears.

    What is outside the blocks, and the Linears of the adaptive norms, which see one vector for a picture,
    stay as they are. Call it before or after inject_lora.
    """
    chosen = []
    for path, layer in model.named_sublayers():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, FP8Weight) and is_in_block(path, model) and not _is_modulation(path):
            weight.in_fp8 = True
            chosen.append(path)
    return chosen


def _is_modulation(path: str) -> bool:
    """norm1.linear of FLUX's blocks and adaLN_modulation.1 of NextDiT's are."""
    return any(part.startswith(("norm", "adaLN")) for part in path.split("."))


def is_in_block(path: str, model: nn.Layer) -> bool:
    """Whether a sublayer stands inside a block, an entry of one of the model's own LayerLists: in FLUX,
    transformer_blocks.3.ff.net.2 does, x_embedder does not."""
    blocks, _, rest = path.partition(".")
    return "." in rest and isinstance(model._sub_layers.get(blocks), nn.LayerList)


def sublayer_at(model: nn.Layer, path: str) -> nn.Layer:
    """model.<path>, where `path` is dotted as in named_sublayers()."""
    for part in path.split(".") if path else []:
        model = model._sub_layers[part]
    return model


def set_sublayer(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    """model.<path> = layer, where `path` is dotted as in named_sublayers()."""
    parent_path, _, name = path.rpartition(".")
    sublayer_at(model, parent_path).add_sublayer(name, layer)
