"""Merging against W + scale * A B in float64."""

import numpy as np
import paddle

from ppcoat.lora import inject_lora, lora_layers, merge_lora


def test_merge_adds_the_product_once_and_takes_the_lora_out(model, rng):
    layers = inject_lora(model, rank=3, alpha=6.0)
    want = {}
    for path, layer in layers.items():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32"))
        layer.scale_multiplier = 0.25
        product = np.float64(layer.lora_A.numpy()) @ np.float64(layer.lora_B.numpy())
        want[path] = np.float64(layer.weight.numpy()) + 6.0 / 3 * 0.25 * product
    untouched = model.x_embedder.weight.numpy()
    merge_lora(model)
    assert not lora_layers(model)
    sublayers = dict(model.named_sublayers())
    for path, weight in want.items():
        np.testing.assert_allclose(sublayers[path].weight.numpy(), weight, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(model.x_embedder.weight.numpy(), untouched)


def test_bfloat16_is_rounded_once(model, rng):
    linear = model.single_transformer_blocks[0].proj_mlp
    linear.to(dtype="bfloat16")
    start = linear.weight.astype("float32").numpy()
    (layer,) = inject_lora(model, rank=2, alpha=2.0, targets=["proj_mlp"]).values()
    layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape).astype("float32"))
    want = np.float64(start) + np.float64(layer.lora_A.numpy()) @ np.float64(layer.lora_B.numpy())
    merge_lora(model)
    weight = model.single_transformer_blocks[0].proj_mlp.weight
    assert weight.dtype == paddle.bfloat16
    assert np.all(np.abs(weight.astype("float32").numpy() - want) <= 1.001 * 2.0**-8 * np.abs(want) + 1e-7)
