"""The fused step against the published formula in float64, against the reference, and where it may change
nothing."""

import inspect

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8.adamw import AdamWHyper, MomentCodec, adamw_step, encode_moments
from ppcoat.fp8.backend import Unsuited
from ppcoat.fp8.formats import E4M3, E5M2

kernels = pytest.importorskip("ppcoat.fp8.adamw_triton", reason="Triton is not installed")

FLOAT = (MomentCodec(None, False, False), MomentCodec(None, False, True))
TRUE, FALSE = paddle.to_tensor([True]), paddle.to_tensor([False])


@pytest.fixture(scope="module")
def fused(on_triton):
    return on_triton(kernels.adamw_step)


def codecs(fmt, expand: bool) -> tuple[MomentCodec, MomentCodec]:
    return MomentCodec(fmt, expand, positive=False), MomentCodec(fmt, expand, positive=True)


def new_states(shape: list[int], pair: tuple[MomentCodec, MomentCodec], beta1: float) -> dict:
    states = encode_moments(paddle.zeros(shape) if beta1 else None, paddle.zeros(shape), pair)
    states["beta_powers"] = {name: paddle.ones([1], "float64") for name in ("beta1", "beta2")}
    states["count"] = {name: paddle.zeros([1], dtype="int64") for name in ("steps", "skipped")}
    return states


def every_tensor(states: dict) -> dict[str, bytes]:
    return {f"{part}.{n}": t.numpy().tobytes() for part, state in states.items() for n, t in state.items()}


@pytest.mark.parametrize("beta1", [0.875, 0.0])
@pytest.mark.parametrize("shape", [[70, 48], [1, 16], [3, 2000]])
@pytest.mark.parametrize("per_group", [False, True])
def test_steps_equal_the_published_formula_in_float64(beta1, shape, per_group, fused):
    """Odd sizes, several programs, and a rate and decay for each group."""
    rng = np.random.default_rng(0)
    lr = np.linspace(0.01, 0.03, shape[0])[:, None] if per_group else 0.01
    decay = np.linspace(0, 0.2, shape[0])[:, None] if per_group else 0.1
    given = [paddle.to_tensor(x.astype("float32")) if per_group else x for x in (lr, decay)]
    hyper = AdamWHyper(*given, beta1, 0.5, 1e-3)
    exact = rng.standard_normal(shape)
    param, states = paddle.to_tensor(exact.astype("float32")), new_states(shape, FLOAT, beta1)
    m = v = np.zeros(shape)
    for t in (1, 2, 3):
        grad = rng.standard_normal(shape).astype("float32")
        m, v = beta1 * m + (1 - beta1) * grad, 0.5 * v + 0.5 * grad.astype(np.float64) ** 2
        exact = exact * (1 - lr * decay) - lr * m / (1 - beta1**t) / (np.sqrt(v / (1 - 0.5**t)) + 1e-3)
        fused(param, paddle.to_tensor(grad), states, FLOAT, hyper, TRUE)
    np.testing.assert_allclose(param.numpy(), exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(states["m2"]["values"].numpy(), v, rtol=1e-6)
    assert [int(states["count"][name]) for name in ("steps", "skipped")] == [3, 0]
    assert float(states["beta_powers"]["beta2"]) == 0.125
    assert float(states["beta_powers"]["beta1"]) == beta1**3


@pytest.mark.parametrize(
    ("fmt", "expand", "beta1"),
    [(E4M3, True, 0.9), (E5M2, True, 0.9), (E4M3, True, 0.0), (E4M3, False, 0.9), (E5M2, False, 0.9)],
)
def test_four_steps_stay_with_the_reference(fmt, expand, beta1, fused):
    """The two may round a code to two sides of a limit, so they are as far apart as codes are, and each is
    as near to exact moments as the other."""
    rng, pair = np.random.default_rng(1), codecs(fmt, expand)
    hyper = AdamWHyper(0.01, 0.1, beta1, 0.99, 1e-8)
    start = rng.standard_normal([37, 48]).astype("float32")
    scale = np.exp(rng.standard_normal([37, 48])).astype("float32")
    runs = []
    for step in (fused, adamw_step.reference):
        draw = np.random.default_rng(2)
        param, states = paddle.to_tensor(start), new_states([37, 48], pair, beta1)
        for _ in range(4):
            grad = scale * draw.standard_normal([37, 48]).astype("float32")
            step(param, paddle.to_tensor(grad), states, pair, hyper, TRUE)
        runs.append((param.numpy(), states))
    moved = np.abs(runs[1][0] - start).mean()
    assert np.abs(runs[0][0] - runs[1][0]).max() < 2.0**-fmt.mantissa_bits * moved
    assert np.abs(runs[0][0] - runs[1][0]).mean() < 1e-3 * moved
    for part in ("m1", "m2") if beta1 else ("m2",):
        same = runs[0][1][part]["codes"].numpy() == runs[1][1][part]["codes"].numpy()
        assert same.mean() > 0.99
    assert int(runs[0][1]["count"]["steps"]) == 4


@pytest.mark.parametrize(("fmt", "expand"), [(E4M3, True), (E4M3, False), (None, False)])
def test_a_step_that_is_not_finite_changes_nothing_but_a_counter(fmt, expand, fused):
    pair = codecs(fmt, expand)
    hyper = AdamWHyper(0.01, 0.1, 0.9, 0.99, 1e-8)
    param = paddle.ones([40, 48])
    stored, states = param.astype("bfloat16"), new_states([40, 48], pair, 0.9)
    fused(param, paddle.ones([40, 48]), states, pair, hyper, TRUE, stored)
    before = every_tensor(states) | {"param": param.numpy().tobytes(), "stored": stored.numpy().tobytes()}
    fused(param, paddle.full([40, 48], float("nan")), states, pair, hyper, FALSE, stored)
    after = every_tensor(states) | {"param": param.numpy().tobytes(), "stored": stored.numpy().tobytes()}
    assert {name for name in before if before[name] != after[name]} == {"count.skipped"}
    assert [int(states["count"][name]) for name in ("steps", "skipped")] == [1, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_copy_is_the_master_rounded_to_nearest(dtype, fused):
    rng = np.random.default_rng(3)
    param = paddle.to_tensor(rng.standard_normal([33, 48]).astype("float32"))
    stored, states = param.astype(dtype), new_states([33, 48], FLOAT, 0.9)
    hyper = AdamWHyper(0.3, 0.1, 0.9, 0.99, 1e-8)
    fused(
        param,
        paddle.to_tensor(rng.standard_normal([33, 48]).astype("float32")),
        states,
        FLOAT,
        hyper,
        TRUE,
        stored,
    )
    cast = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    want = param.numpy().astype(cast).astype(np.float32)
    np.testing.assert_array_equal(stored.astype("float32").numpy(), want)


def test_without_a_master_parameters_are_rounded_to_their_neighbours_with_the_right_odds(fused):
    """lr 0 and decay move every parameter from 1 to 1 - 0.3 / 256; bfloat16 has 1 and 1 - 1 / 256 there."""
    hyper = AdamWHyper(0.3 / 256, 1.0, 0.0, 0.99, 1e-8)
    drawn = []
    for first_step in (0, 0, 7):
        param, states = paddle.ones([200, 128]).astype("bfloat16"), new_states([200, 128], FLOAT, 0.0)
        states["count"]["steps"] = paddle.to_tensor([first_step])
        fused(param, paddle.zeros([200, 128]), states, FLOAT, hyper, TRUE)
        drawn.append(param.astype("float32").numpy())
    assert set(np.unique(drawn[0])) == {1.0, 1 - 1 / 256}
    lower = drawn[0] < 1
    assert lower.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / lower.size))
    # no pattern along rows or columns: means within 5 standard errors
    assert np.abs(lower.mean(0) - 0.3).max() < 5 * np.sqrt(0.21 / 200)
    assert np.abs(lower.mean(1) - 0.3).max() < 5 * np.sqrt(0.21 / 128)
    assert (drawn[0] == drawn[1]).all()  # a resumed run repeats the bits of a step
    both = (lower & (drawn[2] < 1)).mean()  # another step draws independently
    assert both == pytest.approx(0.09, abs=5 * np.sqrt(0.09 * 0.91 / lower.size))


def test_what_the_kernel_does_not_take_is_refused(fused):
    hyper, states = AdamWHyper(0.1, 0.1, 0.9, 0.99, 1e-8), new_states([8, 16], FLOAT, 0.9)
    with pytest.raises(Unsuited, match=r"grad \[8, 16\] is not contiguous"):
        fused(paddle.ones([8, 16]), paddle.ones([16, 8]).t(), states, FLOAT, hyper, TRUE)
    with pytest.raises(Unsuited, match="param is float16"):
        fused(paddle.ones([8, 16]).astype("float16"), paddle.ones([8, 16]), states, FLOAT, hyper, TRUE)


def test_signature_is_the_references():
    twin, reference = (inspect.signature(f) for f in (kernels.adamw_step, adamw_step.reference))
    assert list(twin.parameters) == list(reference.parameters)
