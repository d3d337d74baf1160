"""Put the saving-nothing Linear into a model from outside: the model file does not know about FP8."""

from __future__ import annotations

from paddle import nn

from .linear import FrozenLinear, LoRALinear
from .policy import granularity_groups


def replace_linear_with_fp8(
    model: nn.Layer, linear_granularity: str = "per_tensor", group_size: int = 128
) -> nn.Layer:
    """Make the Linears inside `model` keep what COAT keeps, in place; returns `model`.

    A frozen nn.Linear (weight and bias have stop_gradient) becomes a FrozenLinear, which keeps nothing; a
    LoRALinear whose policy is "none" keeps its input in FP8 from now on, with one scale "per_tensor" or
    "per_group" of `group_size` features. Parameters are shared, not copied, and keep their names in the
    state_dict. Trainable Linears and subclasses of Linear stay as they are: what autograd keeps of them is
    packed by `fp8_saved_tensors`. Raises ConfigError for wrong values.
    """
    groups = granularity_groups(linear_granularity, group_size)
    for path, layer in list(model.named_sublayers()):
        if isinstance(layer, LoRALinear):
            layer.policy = "coat" if layer.policy == "none" else layer.policy
            layer.group_size = groups
        elif type(layer) is nn.Linear and all(param.stop_gradient for param in layer.parameters()):
            set_sublayer(model, path, FrozenLinear(layer))
    return model


def sublayer_at(model: nn.Layer, path: str) -> nn.Layer:
    """model.<path>, where `path` is dotted as in named_sublayers()."""
    for part in path.split(".") if path else []:
        model = model._sub_layers[part]
    return model


def set_sublayer(model: nn.Layer, path: str, layer: nn.Layer) -> None:
    """model.<path> = layer, where `path` is dotted as in named_sublayers()."""
    parent_path, _, name = path.rpartition(".")
    sublayer_at(model, parent_path).add_sublayer(name, layer)
