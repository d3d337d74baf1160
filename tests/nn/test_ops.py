"""The ops that decide what is saved: against their formulas in float64, and what policies let them save."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

import ppcoat.nn.attention as plain
from ppcoat.fp8.formats import E4M3
from ppcoat.nn import ops
from ppcoat.nn.linear import LoRALinear
from ppcoat.nn.op import OpCall
from ppcoat.nn.policy import SavingPolicy
from ppcoat.nn.saved_tensors import fp8_saved_tensors

EXACT = SavingPolicy("exact")
EXACT_VARIANTS = [
    replace(EXACT, recompute=r, invert_head_norms=i) for r in (False, True) for i in (True, False)
]
COAT, RECOMPUTE, ATTENTION = PACKING = "coat", "coat+recompute", "coat+recompute+attention"
BATCH, TOKENS, WIDTH, HEADS, HEAD_DIM = 2, 48, 128, 4, 32
ROWS, VALUES = BATCH * TOKENS, BATCH * TOKENS * WIDTH
SMALL = 4 * BATCH * WIDTH  # bytes of a shift, a scale or a gate
PACKED = VALUES + 4 * ROWS  # of codes, and a float32 scale for each row
FINE = PACKED + VALUES // 2
RSTD = 4 * ROWS * HEADS
NO_HOOKS = {"min_size": 2**60}


def modulated_norm(h, shift, scale):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def rms_norm(x, weight, scale=None):
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    return y if scale is None else y * (1 + scale)


def rms_norm_rotated(x, weight, cos, sin):
    y = rms_norm(x.reshape([*x.shape[:2], -1, HEAD_DIM]), weight)
    cos, sin = (angle.reshape([-1, x.shape[1], 1, HEAD_DIM // 2]) for angle in (cos, sin))
    a, b = y[..., 0::2], y[..., 1::2]
    return paddle.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)


def attention(q, k, v, bias=None):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = paddle.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = F.softmax(scores if bias is None else scores + bias, axis=-1)
    return paddle.einsum("bhts,bshd->bthd", weights, v).flatten(2)


def padded_attention(q, k, v, bias):
    del bias  # for the formula
    return ops.attention(q, k, v, PADDING)


def joint_attention(first, second):
    o = attention(*(paddle.concat(pair, axis=1) for pair in zip(first, second, strict=True)))
    return o[:, : first[0].shape[1]], o[:, first[0].shape[1] :]


def gelu(u):
    return u * (1 + paddle.tanh((2 / np.pi) ** 0.5 * (u + 0.044715 * u**3))) / 2


def heads(norm, attend):
    """-> function of raw queries, keys and values."""

    def run(q, k, v, weight_q, weight_k, cos, sin, *bias):
        q, k = norm(q, weight_q, cos, sin), norm(k, weight_k, cos, sin)
        return attend(q, k, v.reshape([*v.shape[:2], -1, HEAD_DIM]), *bias)

    return run


def streams(norm, attend):
    """The same with two streams, of a third and two thirds of the tokens."""

    def run(q, k, v, weight_q, weight_k, cos, sin):
        parts = []
        for rows in (slice(0, TOKENS // 3), slice(TOKENS // 3, None)):
            angles, value = (cos[rows], sin[rows]), v[:, rows]
            parts.append((norm(q[:, rows], weight_q, *angles), norm(k[:, rows], weight_k, *angles),
                          value.reshape([*value.shape[:2], -1, HEAD_DIM])))  # fmt: skip
        return paddle.concat(list(attend(*parts)), axis=1)

    return run


@dataclass(frozen=True)
class Case:
    """An op, its formula, the shapes of its inputs and of its constants; the bytes it saves under each policy
    of PACKING when only its inputs number `trained` (None: all) want gradients. packs: FP8 under all.
    """

    op: Callable
    formula: Callable
    shapes: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    constants: tuple = ()
    trained: tuple[int, ...] | None = None
    packs: bool = True


TOKEN, NARROW, VECTOR, WEIGHT, HEAD = (
    (BATCH, TOKENS, WIDTH), (BATCH, TOKENS, WIDTH // 2), (BATCH, 1, WIDTH), (WIDTH,), (HEAD_DIM,)
)  # fmt: skip
QKV, GROUPED = (TOKEN, TOKEN, TOKEN, HEAD, HEAD), (TOKEN, NARROW, NARROW, HEAD, HEAD)
ANGLES, OF_SAMPLES = ((rows, HEAD_DIM // 2) for rows in (TOKENS, ROWS))
PADDING = plain.padding_of([TOKENS, TOKENS - 9], TOKENS)
PLAIN_QKV = 3 * 4 * VALUES + 2 * RSTD
PACKED_QKV = 2 * FINE + PACKED + 2 * RSTD
PLAIN_GROUPED = 2 * 4 * VALUES + RSTD * 3 // 2
PACKED_GROUPED = FINE + (VALUES * 3 // 4 + 4 * ROWS) + (VALUES // 2 + 4 * ROWS) + RSTD * 3 // 2
CASES = {
    "modulated_norm": Case(
        ops.modulated_norm, modulated_norm, (TOKEN, VECTOR, VECTOR), (PACKED + 2 * SMALL,) * 3
    ),
    "rms_norm": Case(ops.rms_norm, rms_norm, (TOKEN, WEIGHT), (PACKED,) * 3),
    "rms_norm_scaled": Case(ops.rms_norm, rms_norm, (TOKEN, WEIGHT, VECTOR), (PACKED + SMALL,) * 3),
    "attention": Case(
        heads(ops.rms_norm_rotated, ops.attention), heads(rms_norm_rotated, attention), QKV,
        (PLAIN_QKV, PLAIN_QKV, PACKED_QKV), (ANGLES, ANGLES), trained=(0, 1, 2), packs=False,
    ),
    "attention_masked": Case(
        heads(ops.rms_norm_rotated, padded_attention), heads(rms_norm_rotated, attention), GROUPED,
        (PLAIN_GROUPED, PLAIN_GROUPED, PACKED_GROUPED), (OF_SAMPLES, OF_SAMPLES, None), trained=(0, 1, 2),
        packs=False,
    ),
    "attention_joint": Case(
        streams(ops.rms_norm_rotated, ops.joint_attention), streams(rms_norm_rotated, joint_attention), QKV,
        (PLAIN_QKV, PLAIN_QKV, PACKED_QKV), (ANGLES, ANGLES), trained=(0, 1, 2), packs=False,
    ),
    "gelu": Case(ops.gelu, gelu, (TOKEN,), (PACKED,) * 3),
    "gated_silu": Case(
        ops.gated_silu, lambda gate, up: gate * F.sigmoid(gate) * up, (TOKEN, TOKEN), (2 * PACKED,) * 3
    ),
    "gated_residual": Case(
        ops.gated_residual, lambda y, gate, x: x + gate * y, (TOKEN, VECTOR, TOKEN), (SMALL + PACKED,) * 3
    ),
    "gated_residual_frozen": Case(
        ops.gated_residual, lambda y, gate, x: x + gate * y, (TOKEN, VECTOR, TOKEN), (SMALL,) * 3,
        trained=(0, 2), packs=False,
    ),
    "concat": Case(ops.concat, lambda *x: paddle.concat(x, -1), (TOKEN, NARROW), (0,) * 3, packs=False),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tensor(seed, shape, trained=True):
    x = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    x.stop_gradient = not trained
    return x


def inputs_of(case, trained=None):
    """-> inputs, of which those number `trained` (None: all) want gradients, and constants."""
    inputs = [tensor(seed, shape) for seed, shape in enumerate(case.shapes)]
    for number, x in enumerate(inputs):
        if x.ndim == 1:
            x.set_value(x.abs() + 0.5)
        elif x.shape[1] == TOKENS:  # rows of different size
            x.set_value(x * tensor(20, [BATCH, TOKENS, 1]).exp())
        x.stop_gradient = not (trained is None or number in trained)
    turns = [tensor(30, shape, trained=False) for shape in case.constants[:2]]
    mask = [PADDING.bias] * len(case.constants[2:])
    return inputs, [*(turns and [turns[0].cos(), turns[1].sin()]), *mask]


def run(function, inputs, constants, policy=None, dtype="float32"):
    """-> result, gradient of each input (None where none is wanted) for a random one of the result, counters.
    Neither inputs nor that gradient are changed."""
    given = [x.astype(dtype).detach() for x in inputs]
    for x, original in zip(given, inputs, strict=True):
        x.stop_gradient = original.stop_gradient
    with fp8_saved_tensors(policy or "none", **NO_HOOKS) as saved:
        y = function(*given, *(x.astype(dtype) for x in constants))
    dy = tensor(40, y.shape, trained=False).astype(dtype)
    before = [x.numpy() for x in (*given, dy)]
    paddle.autograd.backward([y], [dy])
    for x, value in zip((*given, dy), before, strict=True):
        np.testing.assert_array_equal(x.numpy(), value)
    return y.numpy(), [None if x.grad is None else x.grad.numpy() for x in given], saved


def assert_close(got, wanted, limit):
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()


def rounded(x):
    """E4M3 with one scale for each row, by ml_dtypes, float64."""
    x = x.numpy()
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
    return paddle.to_tensor((x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale)


@each_case
def test_results_are_those_of_the_formula_under_every_policy(case):
    inputs, constants = inputs_of(case)
    wanted, *_ = run(case.formula, inputs, constants, dtype="float64")
    with paddle.no_grad():
        fastest = case.op(*inputs, *constants).numpy()
    np.testing.assert_allclose(fastest, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    for policy in ("none", EXACT, *PACKING):
        np.testing.assert_array_equal(run(case.op, inputs, constants, policy)[0], fastest)


@each_case
@pytest.mark.parametrize("policy", ["none", *EXACT_VARIANTS], ids=["none", "", "saved", "recompute", "both"])
def test_gradients_are_those_of_the_formula_where_nothing_is_packed(case, policy):
    """Of all inputs, of each alone, and of all but the weights of norms."""
    alone = [(number,) for number in range(len(case.shapes))]
    for trained in (None, case.trained, *alone):
        inputs, constants = inputs_of(case, trained)
        _, wanted, _ = run(case.formula, inputs, constants, dtype="float64")
        assert_close(run(case.op, inputs, constants, policy)[1], wanted, 1e-5)


@each_case
@pytest.mark.parametrize("policy", PACKING)
def test_gradients_in_fp8_are_close(case, policy):
    for trained in (None, case.trained):
        inputs, constants = inputs_of(case, trained)
        _, wanted, _ = run(case.formula, inputs, constants, dtype="float64")
        _, got, _ = run(case.op, inputs, constants, policy)
        errors = [np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) for a, b in zip(got, wanted, strict=True)
                  if b is not None]  # fmt: skip
        print(policy, trained, np.round(errors, 4))
        assert max(errors) < 0.05
        packs = case.packs or (policy == ATTENTION and case.constants)
        assert max(errors) > 1e-3 if packs else trained is None or max(errors) < 1e-5


@each_case
@pytest.mark.parametrize("policy", PACKING)
def test_bytes_that_are_saved(case, policy):
    saved = run(case.op, *inputs_of(case, case.trained), policy)[2]
    assert saved.bytes_kept == case.kept[PACKING.index(policy)]


@pytest.mark.parametrize(
    ("name", "qkv", "rstd", "copies"),
    [("attention", 6 * VALUES, 2 * RSTD, 0), ("attention_masked", 4 * VALUES, RSTD * 3 // 2, 2 * VALUES)],
)
def test_bytes_of_attention_in_bfloat16_are_those_of_flash_attention(name, qkv, rstd, copies):
    """Beside queries, keys, values and 1 / rms: the output, a float32 for each token and head, and keys and
    values for the query heads that share them; nothing of it where attention is computed again."""
    case = CASES[name]
    for policy, more in ((COAT, 2 * VALUES + RSTD + copies), (RECOMPUTE, 0)):
        saved = run(case.op, *inputs_of(case, case.trained), policy)[2]
        assert saved.bytes_kept_bf16 == qkv + rstd + more


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"nonlinear_granularity": "per_tensor"}, 4),
        ({"group_size": 32}, 4 * 4 * ROWS),
        ({"fmt": "e5m2"}, 4 * ROWS),
    ],
)
def test_groups_and_format_are_those_of_the_context(settings, kept):
    u = tensor(0, TOKEN)
    with fp8_saved_tensors(COAT, **settings) as saved:
        ops.gelu(u)
    assert saved.bytes_kept == VALUES + kept


@each_case
@pytest.mark.parametrize("policy", PACKING)
def test_without_gradients_nothing_is_saved(case, policy):
    inputs, constants = inputs_of(case)
    frozen, _ = inputs_of(case, ())
    with fp8_saved_tensors(policy) as saved:
        with paddle.no_grad():
            assert case.op(*inputs, *constants).stop_gradient
        assert case.op(*frozen, *constants).stop_gradient
    assert saved.bytes_kept == 0


@each_case
def test_without_a_policy_it_is_left_to_autograd(case, monkeypatch):
    inputs, constants = inputs_of(case)

    def refuse(*_):
        raise AssertionError("a backward by hand")

    monkeypatch.setattr("ppcoat.nn.op._ByHand.forward", refuse)
    case.op(*inputs, *constants).sum().backward()
    run(case.op, inputs, constants, "none")
    with pytest.raises(AssertionError, match="by hand"):
        run(case.op, inputs, constants, COAT)


def test_what_several_ops_and_a_lora_read_is_saved_once():
    x, vectors = tensor(0, TOKEN), [tensor(n, VECTOR, trained=False) for n in range(4)]
    lora = LoRALinear(nn.Linear(WIDTH, WIDTH), 2, 2.0, policy="coat")
    with fp8_saved_tensors(COAT) as saved:
        results = [
            ops.modulated_norm(x, *vectors[:2]),
            ops.modulated_norm(x, *vectors[2:]),
            ops.gelu(x),
            lora(x),
        ]
    assert saved.bytes_kept == PACKED + 4 * SMALL + 4 * ROWS * 2
    paddle.add_n(results).sum().backward()


READ = [
    name for name in CASES if not name.startswith(("attention_masked", "attention_joint", "gated_residual"))
]


def matmul_reader(width):
    """A trained matrix that Paddle multiplies with: it saves its input through hooks."""
    weight = paddle.create_parameter([width, 8], "float32")
    return lambda y: paddle.matmul(y, weight), weight, 0


def lora_reader(width):
    """A LoRA; the gradient of its B does not tell of its input, that of A does."""
    layer = LoRALinear(nn.Linear(width, 8), 8, 8.0, policy="coat")
    layer.lora_B.set_value(np.eye(8, dtype="float32"))
    return layer, layer.lora_A, 4 * ROWS * 8


@pytest.mark.parametrize("reader", [matmul_reader, lora_reader])
@pytest.mark.parametrize("name", READ)
def test_a_reader_saves_nothing_and_sees_what_the_saved_codes_give(name, reader):
    case = CASES[name]
    inputs, constants = inputs_of(case, case.trained)
    op = case.op
    if name == "concat":  # offers what it gets from ops that offer it
        op = lambda *x: ops.concat(*map(ops.gelu, x))  # noqa: E731
    read, parameter, more = reader(case.shapes[0][-1] + (WIDTH // 2 if name == "concat" else 0))
    kept = case.kept[1] if name != "concat" else PACKED + VALUES // 2 + 4 * ROWS
    for policy, least in ((RECOMPUTE, 0), (COAT, VALUES)):
        parameter.clear_gradient(False)
        with fp8_saved_tensors(policy) as saved:
            z = read(op(*inputs, *constants))
        if policy == RECOMPUTE:
            assert saved.bytes_kept == kept + more
        elif name not in ("attention", "concat"):  # attention's output is never saved by who reads it
            assert saved.bytes_kept >= kept + more + least
        dz = tensor(41, z.shape, trained=False)
        paddle.autograd.backward([z], [dz])
        if policy == RECOMPUTE:
            packs = case.packs or name == "concat"
            seen = [rounded(x) if packs and x.shape[1:2] == [TOKENS] else x.astype("float64") for x in inputs]
            seen = [gelu(x) for x in seen] if name == "concat" else seen
            y = case.formula(*seen, *(x.astype("float64") for x in constants)).numpy()
            wanted = y.reshape([ROWS, -1]).T @ dz.numpy().astype("float64").reshape([ROWS, -1])
            assert_close([parameter.grad.numpy()], [wanted], 1e-5)


def test_attention_runs_once_more_for_its_reader_and_its_own_backward(monkeypatch):
    calls, attend = [], plain.attention
    monkeypatch.setattr(plain, "attention", lambda *args, **more: calls.append(1) or attend(*args, **more))
    case = CASES["attention"]
    read, *_ = lora_reader(WIDTH)
    inputs, constants = inputs_of(case)
    for policy in PACKING:
        with fp8_saved_tensors(policy):
            z = read(case.op(*inputs, *constants))
        z.sum().backward()
        assert len(calls) == 2
        calls.clear()


def test_a_result_is_computed_once_more_for_all_its_readers(monkeypatch):
    calls, again = [], ops._ModulatedNorm.again
    monkeypatch.setattr(ops._ModulatedNorm, "again", lambda op: calls.append(1) or again(op))
    inputs, _ = inputs_of(CASES["modulated_norm"])
    readers = [lora_reader(WIDTH)[0] for _ in range(3)]
    with fp8_saved_tensors(RECOMPUTE):
        y = ops.modulated_norm(*inputs)
        z = paddle.add_n([read(y) for read in readers])
    z.sum().backward()
    assert len(calls) == 1


@each_case
@pytest.mark.parametrize("policy", PACKING)
def test_nan_stays_visible(case, policy):
    for trained in (None, case.trained):
        inputs, constants = inputs_of(case, trained)
        inputs[0].stop_gradient = False
        inputs[0].set_value(
            paddle.where(paddle.arange(VALUES).reshape(TOKEN) == 9999, float("nan"), inputs[0])
        )
        # in float32, because there Paddle's softmax on a CPU gives equal weights for a row of NaN
        wanted_y, wanted, _ = run(case.formula, inputs, constants)
        y, got, _ = run(case.op, inputs, constants, policy)
        assert np.isnan(y[np.isnan(wanted_y)]).all()
        assert any(np.isnan(x).any() for x in (y, *got) if x is not None)
        for ours, theirs in zip(got, wanted, strict=True):
            assert theirs is None or np.isnan(ours[np.isnan(theirs)]).all()


@each_case
@pytest.mark.parametrize("policy", [EXACT, COAT, ATTENTION], ids=["exact", COAT, ATTENTION])
def test_nothing_is_held_after_backward(case, policy):
    inputs, constants = inputs_of(case)
    reader, *_ = lora_reader(case.op(*inputs, *constants).shape[-1])

    def step(backward=True):
        with fp8_saved_tensors(policy):
            z = reader(case.op(*inputs, *constants))
        if backward:
            z.sum().backward()
        for x in (*inputs, *reader.parameters()):
            x.clear_gradient(False)

    def allocated():
        return paddle.base.core.host_memory_stat_current_value("Allocated", 0)

    step()
    gc.freeze()  # only what is new is looked at
    gc.disable()  # what is in no circle goes at once
    try:
        before = allocated()
        for backward in (True, True, False):
            step(backward)
            assert not [x for x in gc.get_objects() if isinstance(x, OpCall)]
        assert allocated() - before < 64
    finally:
        gc.enable()


def test_memory_that_is_used_again_is_another_tensor():
    u, angles = tensor(0, TOKEN), [tensor(n, ANGLES, trained=False) for n in range(2)]
    addresses, met = set(), 0
    with fp8_saved_tensors(RECOMPUTE, **NO_HOOKS) as saved:
        for factor in range(1, 20):
            y, q = ops.gelu(u), ops.rms_norm_rotated(u, paddle.ones(HEAD), *angles)
            assert saved.offered(y) is not None and saved.maker_of(q) is not None
            addresses |= {y.data_ptr(), q.data_ptr()}
            del y, q
            others = [u.detach() * float(factor), u.detach() + float(factor)]
            for other in others:
                met += other.data_ptr() in addresses
                assert saved.offered(other) is None and saved.maker_of(other) is None
                decoded = saved.save_input(other, E4M3, 128).unpack()
                assert float((decoded - other).abs().max()) <= float(other.abs().max()) / 16
    assert met > 0


def test_a_rotated_norm_that_attention_does_not_read_is_named():
    x, weight, angles = (
        tensor(0, TOKEN),
        paddle.ones(HEAD),
        [tensor(n, ANGLES, trained=False) for n in range(2)],
    )
    with fp8_saved_tensors(COAT):
        y = ops.rms_norm_rotated(x, weight, *angles)
    with pytest.raises(Exception, match="went elsewhere than to ops.attention"):
        y.sum().backward()
    ops.rms_norm_rotated(x, weight, *angles).sum().backward()


@pytest.mark.parametrize("policy", ["coat", "coat+recompute", EXACT], ids=str)
@pytest.mark.parametrize("shape", [[64, 128], [4, 16, 128], [2, 64, 64]], ids=str)
def test_two_views_of_one_tensor_keep_their_shapes(policy, shape):
    """Also where one was saved before the other; a LoRA reads the second."""
    rng = np.random.default_rng(4)
    x = paddle.to_tensor(rng.standard_normal([2, 32, 128], dtype=np.float32))
    gradients = []
    for chosen in (SavingPolicy("none", by_hand=False), policy):
        u = x.detach()
        u.stop_gradient = False
        linear = LoRALinear(nn.Linear(shape[-1], 8), 2, 2.0)
        linear.weight.set_value(paddle.full_like(linear.weight, 0.1))
        linear.lora_B.set_value(paddle.ones_like(linear.lora_B))
        with fp8_saved_tensors(chosen):
            y = u * 1.0
            loss = ops.gelu(y).square().sum() + linear(ops.gelu(y.reshape(shape)).reshape(shape)).sum()
        loss.backward()
        gradients.append(u.grad.numpy())
    plain_gradient, got = gradients
    assert np.sqrt(np.mean((got - plain_gradient) ** 2) / np.mean(plain_gradient**2)) < 0.03


def test_modulation_that_serves_all_samples_gets_one_gradient():
    rng = np.random.default_rng(5)
    h = paddle.to_tensor(rng.standard_normal([2, 32, 128], dtype=np.float32))
    shift, scale, gate = (
        paddle.to_tensor(rng.standard_normal([1, 1, 128], dtype=np.float32)) for _ in range(3)
    )
    gradients = []
    for policy in (SavingPolicy("none", by_hand=False), EXACT):
        leaves = [x.detach() for x in (shift, scale, gate)]
        for leaf in leaves:
            leaf.stop_gradient = False
        with fp8_saved_tensors(policy):
            y = ops.modulated_norm(h, *leaves[:2])
            loss = ops.gated_residual(y, leaves[2], h).square().sum()
        loss.backward()
        gradients.append([leaf.grad.numpy() for leaf in leaves])
    for ours, autograd in zip(gradients[1], gradients[0], strict=True):
        np.testing.assert_allclose(ours, autograd, rtol=1e-4, atol=1e-3)


def test_a_head_norm_that_gets_a_zero_weight_later_is_looked_at_again(build_flux):
    model = build_flux(1, 1)
    norm = model.single_transformer_blocks[0].attn.norm_q.weight
    norm.divides = True
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_state_dict(state)
    assert not hasattr(norm, "divides")
