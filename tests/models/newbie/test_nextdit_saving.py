"""What NextDiT_CLIP keeps for backward under each saving policy and with checkpointing, and at what error."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.autograd import PyLayer

import ppcoat.nn.attention as plain_attention
from ppcoat.lora import inject_lora
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.models.newbie.nextdit import Block, NextDiT_CLIP
from ppcoat.nn.attention import rotary_angles
from ppcoat.nn.convert import replace_linear_with_fp8
from ppcoat.nn.policy import POLICIES, SavingPolicy
from ppcoat.nn.saved_tensors import fp8_saved_tensors

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TARGETS = ["attention.qkv", "attention.out", "feed_forward.w2", "time_text_embed.1"]
LORA = {"rank": 4, "alpha": 8.0, "targets": TARGETS}
PACKING = POLICIES[1:]


def with_loras(model, policy, **settings):
    rng = np.random.default_rng(1)
    settings = {**LORA, "policy": policy if policy in POLICIES else "none", **settings}
    for layer in inject_lora(model, **settings).values():
        layer.lora_B.set_value((0.05 * rng.standard_normal(layer.lora_B.shape)).astype("float32"))
    if policy in PACKING:
        replace_linear_with_fp8(model)
    model.train()
    return model


@pytest.fixture(scope="module")
def batch():
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    with np.load(FOLDER / "refs.npz") as refs:
        return [refs[name][:2] for name in names]


def step(batch, policy, layers=0, fp8=True, trained="loras", **settings):
    """A pass of the tiny NewBie, the first `layers` checkpointed -> loss, {name: gradient}, counters."""
    model = load_nextdit(FOLDER / "transformer", "float32")
    if trained == "loras":
        model = with_loras(model, policy, **settings)
    if layers:
        model.checkpoint_blocks = layers
        model.enable_gradient_checkpointing()
    paddle.seed(7)
    with fp8_saved_tensors(policy, fp8_checkpoints=fp8) as saved:
        loss = (model(*map(paddle.to_tensor, batch)) - 1).square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if not p.stop_gradient}
    grads = {name: grad.numpy() for name, grad in grads.items() if grad is not None}
    return float(loss), grads, saved


@pytest.fixture(scope="module")
def plain(batch):
    return step(batch, "none")


def errors(got, wanted):
    """Relative RMS error of all gradients in one row, and of the worst."""

    def relative(a, b):
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))

    assert got.keys() == wanted.keys()
    together = (np.concatenate([g[name].ravel() for name in wanted]) for g in (got, wanted))
    return relative(*together), max(relative(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize(("policy", "limit"), zip(PACKING, (0.03, 0.03, 0.05), strict=True))
def test_lora_gradients_in_fp8(batch, plain, policy, limit, layers):
    loss, got, _ = step(batch, policy, layers)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    overall, worst = errors(got, plain[1])
    print(f"{policy}, {layers} layers checkpointed: overall {overall:.4f}, worst {worst:.4f}")
    assert 0.002 < overall < limit / 2
    assert worst < 0.05  # of a product of two rounded factors, after two blocks of rounding


@pytest.mark.parametrize(("layers", "dropout"), [(1, 0.3), (2, 0.0)])
def test_checkpointing_without_fp8_is_exact(batch, layers, dropout):
    wanted = step(batch, "none", dropout=dropout)
    loss, got, saved = step(batch, "none", layers, fp8=False, dropout=dropout)
    assert loss == wanted[0] and errors(got, wanted[1])[1] < 1e-6
    assert saved.bytes_kept < wanted[2].bytes_kept


EXACT = SavingPolicy("exact")


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("trained", ["loras", "all"])
@pytest.mark.parametrize("policy", [EXACT, replace(EXACT, recompute=True)], ids=["exact", "recompute"])
def test_without_packing_it_is_plain_autograd(batch, policy, trained, layers):
    wanted = step(batch, "none", trained=trained)
    loss, got, _ = step(batch, policy, layers, fp8=False, trained=trained)
    assert loss == wanted[0]
    assert errors(got, wanted[1])[1] < 1e-5


def test_bytes_fall_with_every_step(batch, plain):
    def kept(*settings):
        return step(batch, *settings)[2].bytes_kept

    falling = [plain[2].bytes_kept, *(kept(policy) for policy in PACKING)]
    falling += [kept(PACKING[-1], 1), kept(PACKING[-1], 2)]
    assert falling == sorted(falling, reverse=True) and len({*falling}) == 6
    assert kept("none", 2) < kept("none", 2, False)  # inputs in FP8 or not
    assert kept("coat", 2) < kept("coat", 1) < falling[1]


ATTENTION = plain_attention.attention


class Flash(PyLayer):
    """Holds what flash attention holds: q, k, v, the output and a float32 per row and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        o = ATTENTION(q, k, v)
        ctx.save_for_backward(q, k, v, o, paddle.zeros(q.shape[:3]))
        return o

    @staticmethod
    def backward(ctx, grad):
        return grad, grad, grad


def flash(q, k, v, padding=None):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return Flash.apply(q, k, v) if paddle.is_grad_enabled() else ATTENTION(q, k, v)


def units_of_a_block(policy, checkpointed, monkeypatch):
    """Kept by a modulated block, 768 wide, three query heads to a key head, LoRA on three Linears: tokens x
    width x 2 bytes, as if it computed in bfloat16 with flash attention."""
    monkeypatch.setattr(plain_attention, "attention", flash)
    tokens, dim = 320, 768
    block = with_loras(Block(dim, 12, 4, 4 * dim, 1e-5, 256), policy, rank=16, targets=TARGETS[:3])
    rng = np.random.default_rng(2)
    shapes = (1, tokens, dim), (1, 256)
    x, adaln = (paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes)
    x.stop_gradient = False
    cos, sin = rotary_angles(paddle.arange(tokens).unsqueeze(1), (64,))
    runner = NextDiT_CLIP.__new__(NextDiT_CLIP)
    runner.gradient_checkpointing, runner.training = checkpointed, True
    with fp8_saved_tensors(policy, fp8_checkpoints=policy != "none") as saved:
        NextDiT_CLIP.run_block(runner, 0, block, x, cos, sin, adaln)
    return saved.bytes_kept_bf16 / (tokens * dim * 2)


def test_bytes_of_a_block_in_units_of_tokens_times_width(monkeypatch):
    found = [units_of_a_block(policy, False, monkeypatch) for policy in POLICIES]
    found += [units_of_a_block(policy, True, monkeypatch) for policy in ("none", "coat")]
    print(dict(zip([*POLICIES, "checkpointed", "checkpointed in FP8"], np.round(found, 2), strict=True)))
    # 0.52 for the inputs of each of four norms, 4.1 for those of the product in the feed-forward, 0.06 for
    # the LoRAs; queries, keys, values are 5/3 as they are, 1.2 packed. "coat" adds the output of attention,
    # 1, keys and values for each query head, 4/3, and the inputs of the LoRAs on qkv and w2, 0.5 and 2
    np.testing.assert_allclose(found, [38.48, 12.84, 7.97, 7.5, 1.0, 0.52], atol=0.01)
