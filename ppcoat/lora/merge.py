"""Merge the LoRA of a model into the weights under it."""

from __future__ import annotations

import paddle
from paddle import nn

from .layer import lora_layers, remove_lora


@paddle.no_grad()
def merge_lora(model: nn.Layer) -> None:
    """W [in, out] += alpha / rank * scale_multiplier * A B for every LoRA, which then leaves `model`.

    The sum is taken in float32 and rounded once to the weight's own dtype. LoRAs that are switched off
    (`enabled`) are merged too.
    """
    for layer in lora_layers(model).values():
        delta = paddle.matmul(layer.lora_A, layer.lora_B) * layer.scale
        layer.weight.set_value((layer.weight.astype("float32") + delta).astype(layer.weight.dtype))
    remove_lora(model)
