"""inject_lora and its undoing: targets, what trains, determinism, errors."""

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.lora import inject_lora, lora_disabled, lora_layers, lora_parameters, remove_lora
from ppcoat.nn.convert import replace_linear_with_fp8

DOUBLE = ["to_q", "to_k", "to_v", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]
DEFAULT = {
    *(f"transformer_blocks.0.attn.{name}" for name in DOUBLE),
    *(f"transformer_blocks.0.{ff}.net.{part}" for ff in ("ff", "ff_context") for part in ("0.proj", "2")),
    *(f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    *("single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out"),
}


def test_default_targets_are_attention_and_feed_forward_of_both_kinds(model):
    keys = set(model.state_dict())
    layers = inject_lora(model, rank=4, alpha=4.0)
    assert set(layers) == DEFAULT
    added = set(model.state_dict()) - keys
    assert added == {f"{path}.lora_{part}" for path in DEFAULT for part in "AB"}
    assert keys <= set(model.state_dict())
    trainable = {name for name, param in model.named_parameters() if not param.stop_gradient}
    assert trainable == added
    assert len(lora_parameters(model)) == 2 * len(DEFAULT)


def test_targets_by_suffix_take_whole_parts(model):
    assert set(inject_lora(model, 2, 2.0, targets=["q_proj", "add_q_proj", "proj_out"][1:])) == {
        "transformer_blocks.0.attn.add_q_proj",
        "single_transformer_blocks.0.proj_out",
        "proj_out",
    }


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["attn.to_qq"], "attn.to_q"),
        (["to_k", "to_add_oot"], "to_add_out"),
        ([], "list"),
        ("to_q", "list"),
    ],
)
def test_targets_that_match_nothing_name_the_nearest_and_change_nothing(model, targets, said):
    with pytest.raises(ConfigError, match=said):
        inject_lora(model, 2, 2.0, targets=targets)
    assert not lora_layers(model)
    assert not model.proj_out.weight.stop_gradient


def test_start_is_the_base_model_and_depends_on_seed_and_path_only(model):
    paddle.seed(1)
    first = {path: layer.lora_A.numpy() for path, layer in inject_lora(model, 4, 4.0, seed=3).items()}
    remove_lora(model)
    paddle.seed(2)
    again = inject_lora(model, 4, 4.0, seed=3, targets=["attn.to_q"])
    for path, layer in again.items():
        np.testing.assert_array_equal(layer.lora_A.numpy(), first[path])
    values = list(first.values())
    assert not np.array_equal(values[0], values[1])
    remove_lora(model)
    other = inject_lora(model, 4, 4.0, seed=4, targets=["attn.to_q"])
    assert not np.array_equal(next(iter(other.values())).lora_A.numpy(), first[next(iter(other))])


def test_remove_and_disable(model):
    x = paddle.rand([2, 16])
    block = model.single_transformer_blocks[0]
    linear, before = block.proj_mlp, block.proj_mlp(x).numpy()
    for layer in inject_lora(model, 4, 8.0).values():
        layer.lora_B.set_value(paddle.ones_like(layer.lora_B))
    changed = block.proj_mlp(x).numpy()
    assert np.abs(changed - before).max() > 0.1
    with lora_disabled(model):
        np.testing.assert_array_equal(block.proj_mlp(x).numpy(), before)
    np.testing.assert_array_equal(block.proj_mlp(x).numpy(), changed)
    with pytest.raises(ConfigError, match="already"):
        inject_lora(model, 4, 8.0)
    remove_lora(model)
    assert block.proj_mlp is linear and not lora_layers(model)
    np.testing.assert_array_equal(block.proj_mlp(x).numpy(), before)


def test_works_on_a_converted_model(model):
    for param in model.parameters():
        param.stop_gradient = True
    replace_linear_with_fp8(model)
    assert set(inject_lora(model, 4, 4.0, policy="coat")) == DEFAULT
