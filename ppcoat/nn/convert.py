"""Put the saving-nothing Linear into a model from outside: the model file does not know about FP8."""

from __future__ import annotations

from paddle import nn

from .linear import FrozenLinear


def replace_linear_with_fp8(model: nn.Layer) -> nn.Layer:
    """Replace every frozen nn.Linear inside `model` by a FrozenLinear, in place; returns `model`.

    A Linear is frozen when its weight and bias have stop_gradient. Parameters are shared, not copied, and
    keep their names in the state_dict (`weight`, `bias`). Trainable Linears and subclasses of Linear stay
    as they are, so do LoRALinears.
    """
    for path, layer in list(model.named_sublayers()):
        if type(layer) is nn.Linear and all(param.stop_gradient for param in layer.parameters()):
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
