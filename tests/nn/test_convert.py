"""replace_linear_with_fp8: which Linears are replaced, and that nothing else changes."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.coat import COATConfig, COATTrainer
from ppcoat.errors import ConfigError
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears, replace_linear_with_fp8
from ppcoat.nn.linear import FrozenLinear, LoRALinear
from ppcoat.nn.saved_tensors import count_saved_tensors


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


def test_it_keeps_less_and_packs_the_inputs_of_loras():
    layers, x = model(), paddle.rand([5, 32])
    x.stop_gradient = False
    layers[2].add_sublayer("1", LoRALinear(layers[2][1], 2, 2.0))
    with count_saved_tensors() as before:
        layers(x)
    replace_linear_with_fp8(layers)
    assert isinstance(layers[2][1], LoRALinear)
    with count_saved_tensors() as after:
        layers(x)
    frozen, lora_packed = 5 * 32 * 4, 5 * 64 * 4 - (5 * 64 + 4)  # one scale of 4 bytes per tensor
    assert before.bytes_kept - after.bytes_kept == frozen + lora_packed
    replace_linear_with_fp8(layers, "per_group", 16)
    with count_saved_tensors() as grouped:
        layers(x)
    assert grouped.bytes_kept - after.bytes_kept == 5 * (64 // 16) * 4 - 4


@pytest.mark.parametrize(("arguments", "message"), [(("per_row",), "per_row"), (("per_group", 0), "got 0")])
def test_wrong_granularity_is_named_and_changes_nothing(arguments, message):
    layers = model()
    with pytest.raises(ConfigError, match=message):
        replace_linear_with_fp8(layers, *arguments)
    assert type(layers[0]) is nn.Linear


def test_embedders_of_nextdit_do_not_multiply_in_fp8():
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [4, 6, 6]}
    model = NextDiT_CLIP(**sizes, cap_feat_dim=16, clip_text_dim=16)
    quantize_linears(model)
    chosen = multiply_in_fp8(model)
    assert {path.partition(".")[0] for path in chosen} == {"noise_refiner", "context_refiner", "layers"}
    assert not any("adaLN" in path for path in chosen)


def test_a_model_in_which_nothing_is_replaced_is_told_what_to_do(caplog):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert replace_linear_with_fp8(model) is model and type(model[0]) is nn.Linear
    assert "changes nothing" in caplog.text and "fp8_saved_tensors()" in caplog.text


def test_full_training_under_coat_is_told_nothing(caplog):
    COATTrainer(COATConfig()).convert(nn.Sequential(nn.Linear(4, 8)))
    assert caplog.text == ""
