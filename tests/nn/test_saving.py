"""Saving policies put into a model and taken out: which blocks, what stays the same, and checkpointing."""

import copy
import logging

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.lora import inject_lora, lora_layers, remove_lora
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.policy import SavingPolicy
from ppcoat.nn.saved import count_saved_tensors, fp8_saved_tensors
from ppcoat.nn.saving import apply_saving_policy, flux_blocks, remove_saving_policy

EXACT = SavingPolicy("exact")


@pytest.fixture
def model(flux):
    return flux.build()


def replaced(model):
    return [path for path, block, _ in flux_blocks(model) if "forward" in block.__dict__]


def test_it_is_put_in_and_taken_out_without_a_trace(flux, model):
    keys, parameters = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    assert apply_saving_policy(model, "coat") == []
    assert replaced(model) == [path for path, *_ in flux_blocks(model)] and len(replaced(model)) == 4
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    apply_saving_policy(model, "none")
    assert replaced(model) == []
    apply_saving_policy(model, "coat")
    remove_saving_policy(model)
    remove_saving_policy(model)
    assert replaced(model) == []


def test_a_second_call_replaces_the_first(flux, model):
    batch = flux.arguments(model)
    apply_saving_policy(model, "coat")
    coat = flux.counted(model, batch).bytes_kept
    apply_saving_policy(model, "coat+recompute")
    recompute = flux.counted(model, batch).bytes_kept
    apply_saving_policy(model, "coat")
    assert flux.counted(model, batch).bytes_kept == coat > recompute


def test_frozen_linears_and_hooks_around_the_blocks_go_with_it(flux, model):
    batch = flux.arguments(model)
    loss, wanted = flux.plain_gradients(model, batch)
    replace_linear_with_fp8(model)
    apply_saving_policy(model, EXACT)
    model.clear_gradients()
    with fp8_saved_tensors("coat") as saved:
        got = paddle.square(model(**batch)[0] - 1).mean()
    got.backward()
    assert float(got) == pytest.approx(loss, rel=1e-6)
    assert saved.bytes_kept > 0
    each, _ = flux.errors({n: p.grad.numpy() for n, p in model.named_parameters() if n in wanted}, wanted)
    # what lies behind the blocks is packed by the hooks, what is in them is not
    assert max(each.values()) < 0.03


def test_without_gradients_or_with_nothing_to_train_the_block_runs_as_it_is(flux, model):
    batch = flux.arguments(model)
    with paddle.no_grad():
        wanted = model(**batch)[0].numpy()
        apply_saving_policy(model, "coat")
        np.testing.assert_array_equal(model(**batch)[0].numpy(), wanted)
    for layer in lora_layers(model).values():
        layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    with count_saved_tensors() as saved:
        assert model(**batch)[0].stop_gradient
    assert saved.bytes_kept == 0


def test_a_copy_of_the_model_runs_its_own_blocks(flux, model):
    apply_saving_policy(model, EXACT)
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.lora_B.set_value(paddle.zeros_like(layer.lora_B))
    batch = flux.arguments(model)
    assert flux.gradients(model, batch)[0] != flux.gradients(other, batch)[0]
    assert all(block.forward.args[0] is block for _, block, _ in flux_blocks(other))


def test_unusual_blocks_stay_and_are_named_in_one_warning(flux, model, caplog):
    model.single_transformer_blocks[1].norm.linear.weight.stop_gradient = False
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    with caplog.at_level(logging.WARNING):
        assert apply_saving_policy(model, EXACT) == ["single_transformer_blocks.1"]
    (said,) = [r.getMessage() for r in caplog.records if r.name == "ppcoat.nn.saving"]
    assert "1 blocks" in said and "single_transformer_blocks.1: norm.linear.weight is trained" in said
    assert len(replaced(model)) == 3
    each, _ = flux.errors(flux.gradients(model, batch)[1], wanted)
    assert max(each.values()) < 1e-5


def test_lora_on_modulation_and_foreign_linears_are_unusual(flux):
    class OtherLinear(nn.Linear):
        pass

    model = flux.build(targets=["attn.to_q", "norm1.linear"])
    assert apply_saving_policy(model, "coat") == ["transformer_blocks.0", "transformer_blocks.1"]
    model.single_transformer_blocks[0].proj_mlp = OtherLinear(64, 256)
    assert apply_saving_policy(model, "coat")[-1] == "single_transformer_blocks.0"


def test_a_trained_vec_gets_its_gradient(flux):
    """Blocks are as usual, but the vector that steers them comes from something that is trained."""
    model = flux.build()
    weight = model.time_text_embed.text_embedder.linear_2.weight
    weight.stop_gradient = False
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    apply_saving_policy(model, EXACT)
    each, _ = flux.errors(flux.gradients(model, batch)[1], wanted)
    assert "time_text_embed.text_embedder.linear_2.weight" in each and max(each.values()) < 1e-5


@pytest.mark.parametrize("checkpointed", [1, 3, 4, 9])
def test_checkpointing_the_first_blocks_without_packing_is_plain_autograd(flux, model, checkpointed):
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    apply_saving_policy(model, EXACT, checkpointed, fp8_checkpoints=False)
    each, _ = flux.errors(flux.gradients(model, batch)[1], wanted)
    assert max(each.values()) < 1e-5


def test_checkpointed_blocks_keep_their_inputs_only_in_fp8_or_not(flux, model):
    batch = flux.arguments(model)
    outside = flux.counted(flux.build(0, 0, targets=["proj_out"]), batch).bytes_kept
    values = 4 * 2 * (36 + 12) * 64  # inputs of 4 blocks
    apply_saving_policy(model, "none", 4, fp8_checkpoints=False)
    plain = flux.counted(model, batch).bytes_kept
    apply_saving_policy(model, "coat", 4)
    packed = flux.counted(model, batch).bytes_kept
    assert plain - packed == 3 * values - 4 * values // 64  # a scale of 4 bytes for each row of 64
    assert plain - 4 * values < 2 * outside + 100_000
    apply_saving_policy(model, "coat", 2)
    assert packed < flux.counted(model, batch).bytes_kept


def test_fp8_checkpoints_give_close_gradients(flux, model):
    """The blocks are computed again from rounded inputs, so this is less exact than any policy."""
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    apply_saving_policy(model, "coat", 4)
    each, overall = flux.errors(flux.gradients(model, batch)[1], wanted)
    assert 0.001 < overall < 0.03 and max(each.values()) < 0.06


def test_wrong_calls_are_named(flux, model):
    with pytest.raises(ConfigError, match="coat\\+recompte.*nearest is 'coat\\+recompute'"):
        apply_saving_policy(model, "coat+recompte")
    for number in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="checkpoint_blocks"):
            apply_saving_policy(model, "coat", number)
    with pytest.raises(ConfigError, match="no FLUX block inside Linear"):
        apply_saving_policy(nn.Linear(2, 2), "coat")
    model.enable_gradient_checkpointing()
    with pytest.raises(ConfigError, match="disable_gradient_checkpointing"):
        apply_saving_policy(model, "coat")


def test_a_lora_put_in_later_is_seen_by_the_blocks_that_are_already_set(flux, model):
    """Linears are looked up at each call, so only what is trained besides LoRAs needs a second apply."""
    apply_saving_policy(model, EXACT)
    remove_lora(model)
    layers = inject_lora(model, rank=2, alpha=2.0)
    batch = flux.arguments(model)
    _, got = flux.gradients(model, batch)
    assert len(got) == 2 * len(layers)
