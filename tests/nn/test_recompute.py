"""What is computed again in backward: gradients as without it, random numbers repeated, and bytes held."""

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from ppcoat.lora import inject_lora
from ppcoat.nn import ops
from ppcoat.nn.recompute import checkpointed
from ppcoat.nn.saved_tensors import count_saved_tensors, fp8_saved_tensors

ROWS, WIDTH = 64, 128
VALUES = ROWS * WIDTH
PACKED = VALUES + ROWS * 4  # a byte per value and a float32 scale for each row of 128


def normal(*shape, seed=0, trained=True):
    x = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    x.stop_gradient = not trained
    return x


def rounded(x: np.ndarray) -> np.ndarray:
    """E4M3 with one scale for each row, by ml_dtypes."""
    scale = np.abs(x).max(-1, keepdims=True) / 448
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def close(got, wanted, tolerance=1e-6):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1e-30, np.abs(wanted).max()))


@pytest.mark.parametrize(("x_is_trained", "gate_is_trained"), [(True, True), (False, True), (False, False)])
def test_checkpointed_gives_the_gradients_of_plain_autograd(x_is_trained, gate_is_trained):
    """At last only a parameter inside is trained, as in the first block of a model with LoRAs."""
    layer, x = nn.Linear(8, 8), normal(2, 5, 8, trained=x_is_trained)
    gate = normal(1, 8, seed=1, trained=gate_is_trained)
    constant = normal(5, 8, seed=2, trained=False)

    def function(x, missing, constant, gate):
        return F.silu(layer(x) * gate) + constant, missing

    def first(*args):
        return function(*args)[0]

    def gradients(call):
        for each in (x, gate, *layer.parameters()):
            each.clear_gradient(False)
        out = call(x, None, constant, gate)
        (out**3).sum().backward()
        return [t.grad.numpy() for t in (x, gate, *layer.parameters()) if t.grad is not None]

    plain = gradients(first)
    again = gradients(lambda *args: checkpointed(first, *args, trained=layer.parameters()))
    assert len(plain) == len(again) == 2 + x_is_trained + gate_is_trained
    for one, other in zip(plain, again, strict=True):
        close(other, one)
    assert constant.grad is None


def test_results_of_a_checkpointed_pair_get_both_gradients():
    x = normal(2, 3, 4)
    a, b = checkpointed(lambda x: (x**2, x**3), x)
    (a.sum() + 2 * b.sum()).backward()
    values = x.numpy().astype(np.float64)
    close(x.grad.numpy(), 2 * values + 6 * values**2)


def test_random_numbers_repeat_and_those_behind_are_not_disturbed():
    def run(call):
        paddle.seed(3)
        x = normal(2, 40, 8)
        y = call(lambda x: F.dropout(x, 0.5) * x, x)
        behind = paddle.rand([4])
        y.sum().backward()
        return y.numpy(), x.grad.numpy(), behind.numpy(), paddle.rand([4]).numpy()

    for plain, again in zip(run(lambda f, x: f(x)), run(checkpointed), strict=True):
        np.testing.assert_array_equal(plain, again)


def test_dropout_repeats_where_the_devices_generator_is_not_the_hosts(monkeypatch):
    """As on a GPU: its generator is another than the one that seeds dropout."""
    get, put = paddle.get_rng_state, paddle.set_rng_state
    monkeypatch.setattr(paddle, "get_rng_state", lambda device=None: get(device) if device else "a GPU's")
    monkeypatch.setattr(paddle, "set_rng_state", lambda state, device=None: device and put(state, device))
    layers = nn.Sequential(nn.Linear(16, 16))
    lora = inject_lora(layers, 4, 8.0, dropout=0.5, targets=["0"])["0"]
    lora.lora_B.set_value(np.random.default_rng(3).standard_normal([4, 16]).astype("float32"))
    layers.train()
    x, found = normal(2, 5, 16), []
    for call in (layers, lambda x: checkpointed(layers, x, trained=[lora.lora_A, lora.lora_B])):
        paddle.seed(4)
        first = call(x)
        following = paddle.framework.core.default_cpu_generator().random()
        (first**2).sum().backward()
        found.append([t.grad.numpy() for t in (lora.lora_A, lora.lora_B, x)] + [np.array(following)])
        for each in (lora.lora_A, lora.lora_B, x):
            each.clear_gradient(False)
    for plain, again in zip(*found, strict=True):
        np.testing.assert_array_equal(plain, again)


def test_without_gradients_it_is_a_plain_call():
    x = normal(1, 2, 4, trained=False)
    assert checkpointed(F.silu, x).stop_gradient
    with fp8_saved_tensors("coat", min_size=0) as saved, paddle.no_grad():
        assert checkpointed(F.silu, normal(1, 2, 4)).stop_gradient
    assert saved.bytes_kept == 0


@pytest.mark.parametrize(
    ("policy", "fp8", "kept"),
    [
        ("none", False, 4 * VALUES),
        ("none", True, PACKED),
        ("coat", True, PACKED),
        ("coat", False, 4 * VALUES),
    ],
)
def test_checkpointed_holds_its_tokens_in_the_form_of_the_context(policy, fp8, kept):
    """Constants are those of the whole model and do not count."""
    x, vector, table = normal(1, ROWS, WIDTH), normal(32, WIDTH, seed=1), normal(ROWS, WIDTH, trained=False)
    with fp8_saved_tensors(policy, fp8_checkpoints=fp8) as saved:
        y = checkpointed(lambda x, vector, table: F.gelu(x * table) * vector.mean(0), x, vector, table)
    assert saved.bytes_kept == kept + 4 * 32 * WIDTH
    y.sum().backward()
    tokens = rounded(x.numpy()) if fp8 else x.numpy()
    inner = tokens * table.numpy()
    gelu = F.gelu(paddle.to_tensor(inner.astype("float32"))).numpy()
    close(vector.grad.numpy(), np.tile(gelu.sum((0, 1)) / 32, [32, 1]), 1e-5)


def test_in_what_is_computed_again_nothing_is_packed(make_block):
    """The gradients are exact although the policy packs; neither hooks nor LoRAs nor ops do."""
    block, x = make_block(), normal(1, ROWS, WIDTH)

    def gradients(policy, call):
        loras = [p for p in block.parameters() if not p.stop_gradient]
        block[0].linear.policy = "none" if policy == "none" else "coat"
        for each in (x, *loras):
            each.clear_gradient(False)
        with fp8_saved_tensors(policy, min_size=0):
            y = call(block, x, loras)
            y.sum().backward()  # within the context: what is computed again meets its hooks
        return [each.grad.numpy() for each in (x, *loras)]

    plain = gradients("none", lambda block, x, _: block(x))
    again = gradients("coat+recompute", lambda block, x, trained: checkpointed(block, x, trained=trained))
    packed = gradients("coat+recompute", lambda block, x, _: block(x))
    for one, other in zip(plain, again, strict=True):
        close(other, one)
    assert any(np.abs(other - one).max() > 1e-4 for one, other in zip(plain, packed, strict=True))


@pytest.fixture
def make_block():
    class Block(nn.Layer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.linear(F.silu(ops.gelu(x)))

    def make():
        block = nn.Sequential(Block())
        for layer in inject_lora(block, 2, 2.0, targets=["linear"], policy="coat").values():
            layer.lora_B.set_value(normal(2, WIDTH, seed=4))
        return block

    return make


def test_outside_of_a_context_gradients_are_bit_for_bit_those_without_checkpointing(make_block):
    block, x = make_block(), normal(1, ROWS, WIDTH)

    def gradients(call):
        trained = [p for p in block.parameters() if not p.stop_gradient]
        for each in (x, *trained):
            each.clear_gradient(False)
        call(block, x, trained).square().sum().backward()
        return [each.grad.numpy() for each in (x, *trained)]

    plain = gradients(lambda block, x, _: block(x))
    again = gradients(lambda block, x, trained: checkpointed(block, x, trained=trained))
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("policy", ["none", "coat+recompute+attention"])
def test_nothing_is_held_after_backward(make_block, policy):
    block, x = make_block(), normal(1, ROWS, WIDTH)

    def step():
        with fp8_saved_tensors(policy, fp8_checkpoints=policy != "none"):
            y = checkpointed(block, x, trained=block.parameters())
        y.sum().backward()
        block.clear_gradients()
        x.clear_gradient(False)

    def allocated():
        return paddle.base.core.host_memory_stat_current_value("Allocated", 0)

    step()
    before = allocated()
    for _ in range(3):
        step()
    assert allocated() - before < 64


def test_what_is_counted_without_a_policy_is_the_input():
    x = normal(1, ROWS, WIDTH)
    with count_saved_tensors() as saved:
        checkpointed(lambda x: F.silu(F.silu(x)), x)
    assert saved.bytes_kept == 4 * VALUES
