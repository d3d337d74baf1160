"""replace_linear_with_fp8: which Linears are replaced, and that nothing else changes."""

import numpy as np
import paddle
from paddle import nn

from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.linear import FrozenLinear, LoRALinear
from ppcoat.nn.saved import count_saved_tensors


def model() -> nn.Layer:
    paddle.seed(0)
    layers = nn.Sequential(
        nn.Linear(32, 64), nn.Silu(), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8, bias_attr=False))
    )
    for param in [*layers[0].parameters(), *layers[2][1].parameters()]:
        param.stop_gradient = True
    return layers


def test_only_frozen_linears_are_replaced_and_keys_and_results_stay():
    layers, x = model(), paddle.rand([5, 32])
    x.stop_gradient = False
    keys, before = list(layers.state_dict()), layers(x).numpy()
    weight = layers[0].weight
    assert replace_linear_with_fp8(layers) is layers
    assert isinstance(layers[0], FrozenLinear) and isinstance(layers[2][1], FrozenLinear)
    assert type(layers[2][0]) is nn.Linear  # it trains
    assert layers[0].weight is weight
    assert list(layers.state_dict()) == keys
    np.testing.assert_array_equal(layers(x).numpy(), before)


def test_it_keeps_less_and_leaves_loras_alone():
    layers, x = model(), paddle.rand([5, 32])
    x.stop_gradient = False
    layers[2].add_sublayer("1", LoRALinear(layers[2][1], 2, 2.0))
    with count_saved_tensors() as before:
        layers(x)
    replace_linear_with_fp8(layers)
    assert isinstance(layers[2][1], LoRALinear)
    with count_saved_tensors() as after:
        layers(x)
    assert before.bytes_kept - after.bytes_kept == 5 * 32 * 4
