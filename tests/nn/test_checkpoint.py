"""What is computed again in backward: gradients as without it, random numbers repeated, and bytes held."""

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from ppcoat.lora import inject_lora
from ppcoat.nn.checkpoint import checkpointed, recomputed, recomputed_attention
from ppcoat.nn.saved import count_saved_tensors, fp8_saved_tensors

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


def test_without_gradients_it_is_a_plain_call():
    x = normal(1, 2, 4, trained=False)
    assert checkpointed(F.silu, x).stop_gradient
    with fp8_saved_tensors("coat+recompute", min_size=0) as saved, paddle.no_grad():
        assert recomputed(F.silu, normal(1, 2, 4)).stop_gradient
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
    x, vector, table = normal(1, ROWS, WIDTH), normal(32, WIDTH, seed=1), normal(ROWS, WIDTH, trained=False)
    with fp8_saved_tensors(policy, fp8_checkpoints=fp8) as saved:
        y = checkpointed(lambda x, vector, table: F.gelu(x * table) * vector.mean(0), x, vector, table)
    assert saved.bytes_kept == kept + 4 * (32 * WIDTH + VALUES)
    y.sum().backward()
    tokens = rounded(x.numpy()) if fp8 else x.numpy()
    inner = tokens * table.numpy()
    gelu = F.gelu(paddle.to_tensor(inner.astype("float32"))).numpy()
    close(vector.grad.numpy(), np.tile(gelu.sum((0, 1)) / 32, [32, 1]), 1e-5)


def test_in_what_is_computed_again_nothing_is_packed(make_block):
    """The gradients are exact although the policy packs; neither hooks nor LoRAs nor `recomputed` do."""
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
            return self.linear(recomputed(F.silu, x))

    def make():
        block = nn.Sequential(Block())
        for layer in inject_lora(block, 2, 2.0, targets=["linear"], policy="coat").values():
            layer.lora_B.set_value(normal(2, WIDTH, seed=4))
        return block

    return make


def test_recomputed_holds_its_input_in_fp8_and_its_result_nowhere():
    x, weight, w = (
        normal(ROWS, WIDTH),
        normal(WIDTH, WIDTH, seed=1),
        normal(ROWS, WIDTH, seed=2, trained=False),
    )
    weight.persistable = True  # a parameter
    with fp8_saved_tensors("coat+recompute") as saved:
        y = recomputed(lambda x: x**2, x)
        z = paddle.matmul(y, weight)
    assert saved.bytes_kept == PACKED and saved.tensors_packed == 1
    close(z.numpy(), (x.numpy().astype(np.float64) ** 2) @ weight.numpy(), 1e-5)  # forward is exact
    (z * w).sum().backward()
    seen, dz = rounded(x.numpy()), w.numpy().astype(np.float64)
    close(weight.grad.numpy(), (seen**2).T @ dz, 1e-5)
    close(x.grad.numpy(), 2 * seen * (dz @ weight.numpy().T), 1e-5)


def test_the_function_runs_once_more_for_all_its_readers():
    calls = []

    def function(x):
        calls.append(1)
        return x**2

    x = normal(ROWS, WIDTH)
    weights = [normal(WIDTH, 4, seed=n) for n in range(2)]
    with fp8_saved_tensors("coat+recompute"):
        y = recomputed(function, x)
        z = sum(paddle.matmul(y, weight) for weight in weights)
    z.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("policy", ["none", "coat", None])
def test_other_policies_keep_what_autograd_keeps(policy):
    x = normal(ROWS, WIDTH)
    if policy is None:
        assert type(recomputed(F.silu, x).grad_fn) is type(F.silu(x).grad_fn)
        return
    with fp8_saved_tensors(policy) as through:
        recomputed(lambda x: F.silu(x) * x, x)
    with fp8_saved_tensors(policy) as plain:
        F.silu(x) * x
    assert through.bytes_kept == plain.bytes_kept > 0


def core(q, k, v, bias):
    scores = paddle.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = F.softmax(scores if bias is None else scores + bias, axis=-1)
    return paddle.einsum("bhts,bshd->bthd", weights, v).flatten(2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("policy", "kept", "limit"),
    [
        ("coat+recompute", 3 * 4 * VALUES, 1e-6),
        # codes, half a byte more for queries and keys, a float32 scale for each head
        ("coat+recompute+attention", 3 * (VALUES + ROWS * 4 * 4) + VALUES, 0.03),
    ],
)
def test_attention_holds_queries_keys_and_values(policy, kept, limit, masked):
    q, k, v = (normal(1, ROWS, 4, 32, seed=seed) for seed in range(3))
    bias = paddle.where(paddle.arange(ROWS) < 50, 0.0, -1e9) if masked else None

    def gradients():
        with fp8_saved_tensors(policy) as saved:
            o = recomputed_attention(core, q, k, v, bias)
        (o**2).sum().backward()
        found = [x.grad.numpy() for x in (q, k, v)]
        for x in (q, k, v):
            x.clear_gradient(False)
        return saved, found

    (core(q, k, v, bias) ** 2).sum().backward()
    wanted = [x.grad.numpy() for x in (q, k, v)]
    for x in (q, k, v):
        x.clear_gradient(False)
    saved, found = gradients()
    # the square keeps the output outside, which is computed again for it, too; the mask belongs to the caller
    assert saved.bytes_kept == kept + (ROWS * 4 if masked else 0)
    for got, want in zip(found, wanted, strict=True):
        assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) <= limit


def test_nan_stays_visible():
    x = normal(ROWS, WIDTH)
    x.set_value(paddle.where(paddle.arange(VALUES).reshape(x.shape) == 5, paddle.full_like(x, np.nan), x))
    with fp8_saved_tensors("coat+recompute"):
        y = recomputed(F.silu, x)
    y.sum().backward()
    assert np.isnan(x.grad.numpy()[0, 5])


def test_what_is_counted_without_a_policy_is_the_input():
    x = normal(1, ROWS, WIDTH)
    with count_saved_tensors() as saved:
        checkpointed(lambda x: F.silu(F.silu(x)), x)
    assert saved.bytes_kept == 4 * VALUES
