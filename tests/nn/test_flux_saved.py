"""A FLUX model under each saving policy: gradients equal to autograd's where nothing is packed and close to
them in FP8, bytes per block, checkpointed blocks, and what else may be trained."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

import ppcoat.nn.attention as plain_attention
from ppcoat.errors import ConfigError
from ppcoat.lora import DoRALinear, LoKrSettings, adapter_layers, inject_lora, lora_layers, remove_lora
from ppcoat.models.loading import load_transformer
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.policy import SavingPolicy
from ppcoat.nn.saved_tensors import fp8_saved_tensors

ROOT = Path(__file__).parents[2]
# Packing is the identity: what is left is the formulas.
EXACT = SavingPolicy("exact")
EXACT_VARIANTS = [
    EXACT,
    replace(EXACT, invert_head_norms=False),
    replace(EXACT, recompute=True),
    replace(EXACT, recompute=True, invert_head_norms=False),
    replace(EXACT, recompute=True, attention_in_fp8=True),
]
COAT, RECOMPUTE, ATTENTION = "coat", "coat+recompute", "coat+recompute+attention"
PACKING = (COAT, RECOMPUTE, ATTENTION)


@pytest.fixture
def model(flux):
    return flux.build()


@pytest.fixture(scope="module")
def plain(flux):
    """plain(...) -> (model, batch, loss, gradients by plain autograd) of these settings of build, made once:
    the tests leave all of them as they are."""
    made = {}

    def make(**settings):
        key = repr(settings)
        if key not in made:
            model = flux.build(**settings)
            batch = flux.arguments(model)
            made[key] = model, batch, *flux.plain_gradients(model, batch)
        return made[key]

    return make


def assert_equal_gradients(flux, got, wanted):
    each, _ = flux.errors(got, wanted)
    assert max(each.values()) < 1e-5, max(each, key=each.get)


@pytest.mark.parametrize("policy", EXACT_VARIANTS, ids=lambda p: f"{p.recompute}-{p.invert_head_norms}")
@pytest.mark.parametrize(
    "settings",
    [
        {"double": 2, "single": 0},
        {"double": 1, "single": 2},
        {"alpha": 3.0},
        {"targets": ["attn.to_q", "ff.net.2", "proj_out"]},
        {"targets": ["attn.to_k", "attn.add_v_proj", "to_add_out", "proj_mlp"]},
        {"targets": ["single_transformer_blocks.1.attn.to_v"]},
        {
            "targets": ["attn.to_q", "norm1.linear", "norm.linear"]
        },  # these want gradients of shift, scale, gate
    ],
    ids=lambda s: "-".join(map(str, s.values())).replace(" ", ""),
)
def test_without_packing_it_is_plain_autograd(flux, plain, policy, settings):
    model, batch, loss, wanted = plain(**settings)
    exact_loss, got = flux.gradients(model, batch, policy)
    assert exact_loss == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(flux, got, wanted)


@pytest.mark.parametrize("policy", EXACT_VARIANTS, ids=lambda p: f"{p.recompute}-{p.invert_head_norms}")
@pytest.mark.parametrize("checkpoints", [0, 3])
def test_training_of_all_parameters_without_packing_is_plain_autograd(flux, model, policy, checkpoints):
    remove_lora(model)
    for parameter in model.parameters():
        parameter.stop_gradient = False
    batch = flux.arguments(model)
    loss, wanted = flux.gradients(model, batch)
    assert len(wanted) == len(model.parameters())
    exact_loss, got = flux.gradients(model, batch, policy, checkpoints)
    assert exact_loss == loss
    assert_equal_gradients(flux, got, wanted)


ADAPTERS = {
    "dora": {"layer": DoRALinear, "alpha": 3.0},
    "lokr": {"lokr": LoKrSettings(2, 3.0, 4)},
    "whole lokr": {"lokr": LoKrSettings(2, 3.0, 4, full=True)},
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("policy", "checkpoints"), [(EXACT, 0), (EXACT_VARIANTS[-1], 0), (EXACT, 3)])
def test_other_adapters_are_plain_autograd_too(flux, plain, kind, policy, checkpoints):
    model, batch, loss, wanted = plain(double=1, single=2, **ADAPTERS[kind])
    exact_loss, got = flux.gradients(model, batch, policy, checkpoints)
    assert exact_loss == pytest.approx(loss, rel=1e-6)
    assert_equal_gradients(flux, got, wanted)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_in_fp8_save_what_loras_save_and_learn_alike(flux, kind):
    saved = {}
    for name, settings in {"lora": {}, kind: ADAPTERS[kind]}.items():
        model = flux.build(1, 1, policy="coat", **settings)
        replace_linear_with_fp8(model, "per_group", 64)
        assert {(layer.policy, layer.group_size) for layer in adapter_layers(model).values()} == {
            ("coat", 64)
        }
        batch = flux.arguments(model)
        saved[name] = flux.counted(model, batch, ATTENTION).bytes_kept
    layers = adapter_layers(model).values()
    own = sum(4 * layer.weight.shape[1] for layer in layers) if kind == "dora" else 0
    tokens = {layer: 2 * 48 if "single" in path else 2 * (12 if "context" in path or "add_" in path else 36)
              for path, layer in adapter_layers(model).items()}  # fmt: skip
    if kind != "dora":
        own = -sum(4 * 4 * rows for rows in tokens.values())  # no x A
    assert saved[kind] - saved["lora"] == own
    _, wanted = flux.plain_gradients(model, batch)
    _, got = flux.gradients(model, batch, ATTENTION)
    assert 0.001 < flux.errors(got, wanted)[1] < 0.05


@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("policy", [EXACT, replace(EXACT, recompute=True)], ids=["exact", "recompute"])
def test_gradients_of_the_tokens_of_a_block(flux, trains, policy):
    """A double block called alone, whose inputs want gradients, both or one of them."""
    block = flux.build(double=1, single=0).transformer_blocks[0]
    rng = np.random.default_rng(3)
    angles = paddle.to_tensor(rng.uniform(0, 6, [20, 16]).astype("float32"))
    img, txt, vec = (paddle.to_tensor(rng.standard_normal(s, dtype=np.float32)) for s in
                     ([2, 14, 64], [2, 6, 64], [2, 64]))  # fmt: skip
    img.stop_gradient, txt.stop_gradient = (not each for each in trains)

    def token_gradients(policy):
        img.clear_gradient()
        txt.clear_gradient()
        with flux.context(policy):
            out_img, out_txt = block(img, txt, vec, angles.cos(), angles.sin())
        (out_img.square().sum() + (out_txt**3).sum()).backward()
        return [x.grad.numpy() for x in (img, txt) if x.grad is not None]

    wanted, got = token_gradients(None), token_gradients(policy)
    assert len(got) == len(wanted) == sum(trains)
    for ours, theirs in zip(got, wanted, strict=True):
        assert flux.relative_rms(ours, theirs) < 1e-5


@pytest.mark.parametrize("policy", [EXACT, replace(EXACT, recompute=True)], ids=["exact", "recompute"])
@pytest.mark.parametrize("checkpoints", [0, 3])
def test_dropout_draws_the_masks_of_the_plain_forward(flux, checkpoints, policy):
    model = flux.build(dropout=0.3)
    batch = flux.arguments(model)
    loss, wanted = flux.gradients(model, batch)
    exact_loss, got = flux.gradients(model, batch, policy, checkpoints)
    assert exact_loss == loss
    assert_equal_gradients(flux, got, wanted)


@pytest.mark.parametrize("checkpoints", [0, 4])
def test_scale_multiplier_and_switched_off_loras_are_those_of_the_forward_pass(flux, model, checkpoints):
    """They are put back before backward runs, as the transformer does after its forward."""
    batch = flux.arguments(model)
    off = lora_layers(model)["transformer_blocks.0.attn.to_q"]

    def run(policy, checkpoints=0):
        model.clear_gradients()
        off.enabled = False
        with flux.checkpointing(model, checkpoints), flux.context(policy):
            loss = paddle.square(model(**batch, joint_attention_kwargs={"scale": 0.5})[0]).mean()
        off.enabled = True
        loss.backward()
        return {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}

    wanted = run(None)
    assert "transformer_blocks.0.attn.to_q.lora_A" not in wanted
    assert_equal_gradients(flux, run(EXACT, checkpoints), wanted)


@pytest.mark.parametrize("policy", [EXACT, replace(EXACT, invert_head_norms=False)], ids=["", "input"])
def test_a_graph_kept_by_flash_attention_gives_the_same_gradients(flux, model, monkeypatch, policy):
    batch, kept = flux.arguments(model), []
    _, wanted = flux.gradients(model, batch)

    def attention(q, k, v, padding=None):
        kept.append(paddle.is_grad_enabled())
        scores = paddle.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        return paddle.einsum("bhts,bshd->bthd", nn.functional.softmax(scores, axis=-1), v)

    monkeypatch.setattr(plain_attention, "attention_kernel", lambda q: plain_attention.FLASH)
    monkeypatch.setattr(plain_attention, "attention", attention)
    assert_equal_gradients(flux, flux.gradients(model, batch, policy)[1], wanted)
    assert kept == [True] * 4  # once in each block, with a graph, and not again in backward


def test_a_head_norm_with_a_tiny_weight_keeps_its_input(flux, model):
    batch = flux.arguments(model)
    weight = model.single_transformer_blocks[0].attn.norm_q.weight
    weight.set_value(np.where(np.arange(32) == 5, 0.0, weight.numpy()).astype("float32"))
    _, wanted = flux.plain_gradients(model, batch)
    _, got = flux.gradients(model, batch, replace(EXACT, recompute=True))
    assert_equal_gradients(flux, got, wanted)


@pytest.fixture(scope="module")
def calls_of_wide_blocks(flux):
    """Two blocks, 512 wide, LoRA of rank 16 on each Linear: {kind: (block, arguments)}."""
    model, calls = flux.build(1, 1, heads=8, head_dim=64, rank=16), {}
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        block = getattr(model, kind)[0]
        hook = block.register_forward_pre_hook(
            lambda block, args, kind=kind: calls.update({kind: (block, args)})
        )
        with paddle.no_grad():
            model(**flux.arguments(model, tokens=256, text=64, pictures=1))
        hook.remove()
    return calls


@pytest.mark.parametrize(
    ("policy", "double", "single"), [(COAT, 9.98, 9.41), (RECOMPUTE, 6.37, 5.81), (ATTENTION, 5.42, 4.85)]
)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_bytes_per_block_in_units_of_tokens_times_width(
    calls_of_wide_blocks, policy, double, single, granularity
):
    """In bfloat16 the ordinary blocks would keep 18 and 17 units."""
    unit = 320 * 512 * 2
    for limit, (block, arguments) in zip((double, single), calls_of_wide_blocks.values(), strict=True):
        replace_linear_with_fp8(block, granularity)
        with fp8_saved_tensors(policy) as saved:
            block(*arguments)
        print(policy, type(block).__name__, granularity, saved.bytes_kept_bf16 / unit)
        assert limit - 0.11 < saved.bytes_kept_bf16 / unit <= limit
        # float32 counts double where nothing is packed; a GPU's flash attention is not in it
        assert saved.bytes_kept_bf16 < saved.bytes_kept + 1.1 * unit < 2 * saved.bytes_kept_bf16 + unit


LIMITS = [(COAT, 0.03), (RECOMPUTE, 0.03), (ATTENTION, 0.05)]


@pytest.mark.parametrize(("policy", "limit"), LIMITS)
def test_lora_gradients_of_the_tiny_flux_in_fp8(flux, policy, limit):
    folder = ROOT / "ppcoat/assets/tiny_flux/transformer"
    model = flux.with_loras(load_transformer(folder, "float32"), rank=8)
    batch = flux.arguments(model, tokens=64, text=16)
    loss, wanted = flux.plain_gradients(model, batch)
    fp8_loss, got = flux.gradients(model, batch, policy)
    assert fp8_loss == pytest.approx(loss, rel=1e-6)
    each, overall = flux.errors(got, wanted)
    print(policy, overall, max(each.values()))
    assert 0.002 < overall < limit / 2
    assert max(each.values()) <= limit, max(each, key=each.get)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "limit"), LIMITS)
def test_lora_gradients_of_a_wider_and_deeper_model_and_their_growth_with_depth(flux, policy, limit):
    """4 + 8 blocks, 512 wide. Errors add up from the last block to the first: they must not run away."""
    model = flux.build(4, 8, heads=8, head_dim=64, rank=16, alpha=16.0)
    batch = flux.arguments(model, tokens=256, text=64, pictures=1)
    _, wanted = flux.plain_gradients(model, batch)
    each, overall = flux.errors(flux.gradients(model, batch, policy)[1], wanted)
    assert max(each.values()) <= limit and overall <= limit
    kinds = ("transformer_blocks", "single_transformer_blocks")
    blocks = [f"{kind}.{i}." for kind, n in zip(kinds, (4, 8), strict=True) for i in range(n)]
    depth = [max(e for name, e in each.items() if name.startswith(block)) for block in blocks]
    print(policy, f"overall {overall:.4f}, worst per block from first to last:", np.round(depth, 4))
    assert max(depth[:4]) < 2 * max(depth[-4:])


@pytest.mark.parametrize("policy", PACKING)
def test_gradients_of_loras_on_modulation_and_of_all_parameters_are_close_in_fp8(flux, policy):
    model = flux.build(targets=["attn.to_q", "norm1.linear", "norm.linear"])
    batch = flux.arguments(model)
    each, overall = flux.errors(
        flux.gradients(model, batch, policy)[1], flux.plain_gradients(model, batch)[1]
    )
    assert 0.001 < overall < 0.03 and max(each.values()) < 0.05, max(each, key=each.get)
    remove_lora(model)
    for parameter in model.parameters():
        parameter.stop_gradient = False
    each, overall = flux.errors(flux.gradients(model, batch, policy)[1], flux.gradients(model, batch)[1])
    print(policy, overall, max(each, key=each.get), max(each.values()))
    assert 0.001 < overall < 0.03 and max(each.values()) < 0.06, max(each, key=each.get)


@pytest.mark.parametrize("policy", PACKING)
def test_nan_stays_visible(flux, policy):
    model = flux.build(1, 1)
    batch = flux.arguments(model)
    batch["hidden_states"][0, 0, 0] = float("nan")
    _, got = flux.gradients(model, batch, policy)
    assert np.isnan(got["transformer_blocks.0.attn.to_q.lora_A"]).any()


def test_no_policy_and_none_are_plain_autograd_also_after_another_policy(flux, model):
    batch = flux.arguments(model)
    loss, wanted = flux.gradients(model, batch)
    keys, parameters = list(model.state_dict()), {name: id(p) for name, p in model.named_parameters()}
    coat, recompute, none = (
        flux.counted(model, batch, policy).bytes_kept for policy in (COAT, RECOMPUTE, "none")
    )
    assert none > coat > recompute
    assert flux.counted(model, batch, COAT).bytes_kept == coat
    for policy in (None, "none"):
        again_loss, again = flux.gradients(model, batch, policy)
        assert again_loss == loss
        assert all(np.array_equal(again[name], wanted[name]) for name in wanted)
    assert list(model.state_dict()) == keys
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.parametrize(("checkpoints", "limit"), [(4, 0.03), (0, 0.04)])
def test_frozen_linears_and_hooks_around_the_blocks_go_with_it(flux, model, checkpoints, limit):
    """Hooks pack what lies behind the blocks; in blocks that are computed again nothing is packed."""
    batch = flux.arguments(model)
    loss, wanted = flux.plain_gradients(model, batch)
    replace_linear_with_fp8(model, "per_group")
    model.clear_gradients()
    with flux.checkpointing(model, checkpoints), fp8_saved_tensors(COAT, min_size=0) as saved:
        got = paddle.square(model(**batch)[0] - 1).mean()
    got.backward()
    assert float(got) == pytest.approx(loss, rel=1e-6)
    assert saved.bytes_kept > 0
    each, _ = flux.errors({n: p.grad.numpy() for n, p in model.named_parameters() if n in wanted}, wanted)
    assert max(each.values()) < limit


def test_without_gradients_or_with_nothing_to_train_nothing_is_saved(flux, model):
    batch = flux.arguments(model)
    with paddle.no_grad():
        wanted = model(**batch)[0].numpy()
        with flux.context(COAT) as saved:
            np.testing.assert_array_equal(model(**batch)[0].numpy(), wanted)
    assert saved.bytes_kept == 0
    for layer in lora_layers(model).values():
        layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = True
    with flux.context(COAT) as saved:
        assert model(**batch)[0].stop_gradient
    assert saved.bytes_kept == 0


def test_a_copy_of_the_model_runs_its_own_blocks(flux, model):
    batch = flux.arguments(model)
    loss, wanted = flux.gradients(model, batch, EXACT)
    other = copy.deepcopy(model)
    for layer in lora_layers(other).values():
        layer.lora_B.set_value(paddle.zeros_like(layer.lora_B))
    other_loss, got = flux.gradients(other, batch, EXACT)
    assert other_loss != loss
    assert not any(np.any(grad) for name, grad in got.items() if name.endswith("lora_A"))
    assert_equal_gradients(flux, flux.gradients(model, batch, EXACT)[1], wanted)


def test_foreign_linears_and_a_trained_linear_are_served_too(flux, model):
    class OtherLinear(nn.Linear):
        pass

    model.transformer_blocks[1].ff.net[2] = OtherLinear(256, 64)
    model.single_transformer_blocks[1].norm.linear.weight.stop_gradient = False
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    assert "transformer_blocks.1.ff.net.2.weight" in wanted
    for policy in (EXACT, replace(EXACT, recompute=True)):
        assert_equal_gradients(flux, flux.gradients(model, batch, policy)[1], wanted)
    assert flux.counted(model, batch, COAT).bytes_kept < 0.6 * flux.counted(model, batch).bytes_kept


@pytest.mark.parametrize("checkpoints", [0, 4])
def test_a_trained_vec_gets_its_gradient(flux, model, checkpoints):
    """The vector that steers the blocks comes from something that is trained."""
    model.time_text_embed.text_embedder.linear_2.weight.stop_gradient = False
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    _, got = flux.gradients(model, batch, EXACT, checkpoints)
    assert "time_text_embed.text_embedder.linear_2.weight" in got
    assert_equal_gradients(flux, got, wanted)


@pytest.mark.parametrize(
    ("checkpoints", "policy"),
    [
        *((checkpoints, policy) for checkpoints in (1, 3, 4, 9) for policy in (EXACT, COAT)),
        *((checkpoints, policy) for checkpoints in (3, 9) for policy in (None, "none", ATTENTION)),
        *(
            pytest.param(checkpoints, policy, marks=pytest.mark.slow)
            for checkpoints in (1, 4)
            for policy in (None, "none", ATTENTION)
        ),
    ],
    ids=str,
)
def test_checkpointing_the_first_blocks_without_packing_is_plain_autograd(flux, plain, checkpoints, policy):
    """Policies pack in the other blocks, and the input of the norm behind them, only."""
    model, batch, _, wanted = plain()
    each, _ = flux.errors(flux.gradients(model, batch, policy, checkpoints)[1], wanted)
    exact = policy in (None, "none", EXACT)
    assert max(each.values()) < (1e-5 if exact else 0.03 if checkpoints >= 4 else 0.05)


def test_checkpointed_blocks_keep_their_inputs_only_in_fp8_or_not(flux, model):
    batch = flux.arguments(model)
    outside = flux.counted(flux.build(0, 0, targets=["proj_out"]), batch).bytes_kept
    values = 4 * 2 * (36 + 12) * 64  # inputs of 4 blocks
    plain = flux.counted(model, batch, "none", 4).bytes_kept
    packed = flux.counted(model, batch, "none", 4, fp8_checkpoints=True).bytes_kept
    assert plain - packed == 3 * values - 4 * values // 64  # a scale of 4 bytes for each row of 64
    assert plain - 4 * values < 2 * outside + 100_000
    kept = [flux.counted(model, batch, COAT, blocks, fp8_checkpoints=True).bytes_kept for blocks in (0, 2, 4)]
    assert kept == sorted(kept, reverse=True) and len({*kept}) == 3 and kept[2] <= packed


def test_fp8_checkpoints_give_close_gradients(flux, model):
    """The blocks are computed again from rounded inputs, so this is less exact than any policy."""
    batch = flux.arguments(model)
    _, wanted = flux.plain_gradients(model, batch)
    _, got = flux.gradients(model, batch, COAT, 4, fp8_checkpoints=True)
    each, overall = flux.errors(got, wanted)
    assert 0.001 < overall < 0.03 and max(each.values()) < 0.06


def test_a_lora_put_in_later_is_seen_by_the_blocks(flux, model):
    batch = flux.arguments(model)
    flux.gradients(model, batch, EXACT)
    remove_lora(model)
    layers = inject_lora(model, rank=2, alpha=2.0)
    _, got = flux.gradients(model, batch, EXACT)
    assert len(got) == 2 * len(layers)


def test_a_wrong_policy_is_named():
    with pytest.raises(ConfigError, match="coat\\+recompte.*nearest is 'coat\\+recompute'"):
        fp8_saved_tensors("coat+recompte")
