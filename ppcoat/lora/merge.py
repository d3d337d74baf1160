"""Merge the LoRA or LoKr of a model into the weights under it."""

from __future__ import annotations

import paddle
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.fp8_weight import FP8Weight

from .layer import adapter_layers, remove_lora
from .lokr import LoKrLinear


@paddle.no_grad()
def merge_lora(model: nn.Layer) -> None:
    """W [in, out] += alpha / rank * scale_multiplier * A B for every LoRA, which then leaves `model`; LoKrs
    likewise.

    The sum is taken in float32 and rounded once to the weight's own dtype. LoRAs that are switched off
    (`enabled`) are merged too. Raises ConfigError, and merges nothing, if a weight is stored in FP8: most of
    a LoRA would be lost in its rounding.
    """
    layers = adapter_layers(model)
    for path, layer in layers.items():
        if isinstance(layer.weight, FP8Weight):
            raise ConfigError(f"{path}.weight is stored in FP8: load the model unquantised to merge a LoRA")
    for layer in layers.values():
        if isinstance(layer, LoKrLinear):
            delta = layer.delta()
        else:
            delta = paddle.matmul(layer.lora_A, layer.lora_B) * layer.scale
        layer.weight.set_value((layer.weight.astype("float32") + delta).astype(layer.weight.dtype))
    remove_lora(model)
