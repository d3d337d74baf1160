"""Frozen Linear and LoRA Linear: forward and every gradient against float64 numpy, and what they keep."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.linear import FrozenLinear, LoRALinear
from ppcoat.nn.saved_tensors import count_saved_tensors, fp8_saved_tensors

IN, OUT, RANK, ALPHA = 256, 96, 8, 4.0


def tensor(seed: int, shape: list[int], trainable: bool = True) -> paddle.Tensor:
    x = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))
    x.stop_gradient = not trainable
    return x


def make(bias: bool = True, **settings) -> LoRALinear:
    base = nn.Linear(IN, OUT, bias_attr=None if bias else False)
    base.weight.set_value(tensor(1, [IN, OUT]) / 16)
    layer = LoRALinear(base, RANK, ALPHA, **settings)
    layer.lora_B.set_value(tensor(2, [RANK, OUT]) / 4)
    if bias:
        base.bias.set_value(tensor(3, [OUT]))
    return layer


def expected(layer: LoRALinear, x: np.ndarray, dy: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """The formulas of the LoRA paper in float64; x and dy as rows."""
    w, a, b, x, dy = (
        np.asarray(t, dtype=np.float64)
        for t in (layer.weight.numpy(), layer.lora_A.numpy(), layer.lora_B.numpy(), x, dy)
    )
    bias = 0 if layer.bias is None else layer.bias.numpy().astype(np.float64)
    return {
        "y": x @ w + bias + scale * (x @ a @ b),
        "dx": dy @ (w + scale * a @ b).T,
        "dA": scale * x.T @ dy @ b.T,
        "dB": scale * (x @ a).T @ dy,
    }


def run(layer: LoRALinear, x: paddle.Tensor, dy: np.ndarray) -> dict[str, np.ndarray | None]:
    layer.clear_gradients()
    x.clear_gradient()
    y = layer(x)
    y.backward(paddle.to_tensor(dy.reshape(y.shape)))

    def grad(t):
        return None if t.grad is None else t.grad.numpy().reshape([-1, t.shape[-1]])

    return {
        "y": y.numpy().reshape([-1, OUT]),
        "dx": grad(x),
        "dA": grad(layer.lora_A),
        "dB": grad(layer.lora_B),
    }


def rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("shape", [[40, IN], [2, 20, IN]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiplier", [1.0, 0.5])
def test_policy_none_equals_float64(shape, bias, multiplier):
    layer, x = make(bias), tensor(4, shape)
    layer.scale_multiplier = multiplier
    dy = tensor(5, [40, OUT]).numpy()
    got = run(layer, x, dy)
    for name, want in expected(layer, x.numpy().reshape([-1, IN]), dy, ALPHA / RANK * multiplier).items():
        assert np.abs(got[name] - want).max() <= 1e-6 * max(1.0, np.abs(want).max()), name


@pytest.mark.parametrize("group_size", [128, 100, None])
def test_policy_coat_is_exact_but_for_da(group_size):
    exact, layer, x = make(), make(policy="coat", group_size=group_size), tensor(4, [2, 20, IN])
    dy = tensor(5, [40, OUT]).numpy()
    want, got = run(exact, x, dy), run(layer, x, dy)
    for name in ("y", "dx", "dB"):
        np.testing.assert_array_equal(got[name], want[name])
    # E4M3 has 3 mantissa bits: an error of at most 2^-4, about 2.6 % RMS for values spread over an octave
    assert 0.005 < rms(got["dA"], want["dA"]) < 0.035


def test_gradients_equal_plain_autograd():
    layer, x = make(), tensor(6, [40, IN])
    dy = tensor(7, [40, OUT])
    got = run(layer, x, dy.numpy())
    x.clear_gradient()
    layer.clear_gradients()
    scale = ALPHA / RANK
    y = paddle.nn.functional.linear(x, layer.weight, layer.bias) + scale * x @ layer.lora_A @ layer.lora_B
    y.backward(dy)
    for name, grad in (("dx", x.grad), ("dA", layer.lora_A.grad), ("dB", layer.lora_B.grad)):
        assert rms(got[name], grad.numpy()) < 1e-6


@pytest.mark.parametrize("policy", ["none", "coat"])
def test_dropout_forward_and_backward_agree_with_the_mask(policy):
    """With W = 0: dx is zero exactly where x was dropped, and y, dx, dA and dB are those of that mask."""
    layer = make(dropout=0.5, policy=policy, bias=False)
    layer.weight.set_value(np.zeros([IN, OUT], "float32"))
    paddle.seed(0)
    x = tensor(8, [64, IN])
    y = layer(x)
    y.sum().backward()
    dropped = x.grad.numpy() == 0
    assert 0.45 < dropped.mean() < 0.55
    kept_x = np.where(dropped, 0, 2 * x.numpy()).astype(np.float64)
    want = ALPHA / RANK * kept_x @ layer.lora_A.numpy() @ layer.lora_B.numpy()
    np.testing.assert_allclose(y.numpy(), want, atol=1e-4)
    dx = 2 * ALPHA / RANK * (layer.lora_A.numpy() @ layer.lora_B.numpy()).sum(-1)
    np.testing.assert_allclose(x.grad.numpy(), np.where(dropped, 0, dx), atol=1e-5)
    da = ALPHA / RANK * kept_x.T @ (np.ones([64, OUT]) @ layer.lora_B.numpy().astype(np.float64).T)
    assert rms(layer.lora_A.grad.numpy(), da) < (1e-6 if policy == "none" else 0.04)
    db = ALPHA / RANK * (kept_x @ layer.lora_A.numpy()).T @ np.ones([64, OUT])
    assert rms(layer.lora_B.grad.numpy(), db) < 1e-6
    layer.eval()
    np.testing.assert_array_equal(layer(x).numpy(), layer(x).numpy())


@pytest.mark.parametrize("policy", ["none", "coat"])
@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("lora_trains", [True, False])
def test_only_what_asks_for_a_gradient_gets_one(policy, x_trains, lora_trains):
    layer, x = make(policy=policy), tensor(9, [40, IN], x_trains)
    layer.lora_A.stop_gradient = layer.lora_B.stop_gradient = not lora_trains
    if not (x_trains or lora_trains):
        assert layer(x).stop_gradient
        return
    with count_saved_tensors() as saved:
        layer(x).sum().backward()
    assert (x.grad is not None) == x_trains
    assert (layer.lora_A.grad is not None) == lora_trains
    assert layer.weight.grad is None and layer.bias.grad is None
    if not lora_trains:
        assert saved.bytes_kept < 40 * IN  # x is not kept when no LoRA gradient is wanted


def test_no_grad_and_disabled():
    layer, x = make(policy="coat"), tensor(10, [40, IN])
    with paddle.no_grad():
        np.testing.assert_array_equal(layer(x).numpy(), run(layer, x, np.ones([40, OUT], "float32"))["y"])
    layer.enabled = False
    np.testing.assert_array_equal(
        layer(x).numpy(), paddle.nn.functional.linear(x, layer.weight, layer.bias).numpy()
    )


def test_weight_is_shared_and_names_stay():
    base = nn.Linear(IN, OUT)
    layer = LoRALinear(base, RANK, ALPHA)
    assert layer.weight is base.weight and layer.weight.stop_gradient
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert (layer.lora_A.shape, layer.lora_B.shape) == ([IN, RANK], [RANK, OUT])
    assert not layer.lora_B.numpy().any() and 0 < np.abs(layer.lora_A.numpy()).max() <= IN**-0.5


def test_bytes_kept_for_three_projections_of_one_input():
    """Plain: x once; coat: one FP8 copy of x for all three, which active hooks do not pack again."""
    x, layers = tensor(11, [64, IN]), [make(policy="coat") for _ in range(3)]
    rank_bytes = 3 * 64 * RANK * 4
    for context in (count_saved_tensors(), fp8_saved_tensors(min_size=1)):
        with context as saved:
            sum(layer(x).sum() for layer in layers)
        fp8_x = 64 * IN + 64 * (IN // 128) * 4
        assert saved.bytes_kept == fp8_x + rank_bytes
    plain = [make() for _ in range(3)]
    with count_saved_tensors() as saved:
        sum(layer(x).sum() for layer in plain)
    assert saved.bytes_kept == 64 * IN * 4 + rank_bytes


@pytest.mark.parametrize("shape", [[40, IN], [2, 20, IN]])
def test_frozen_linear_keeps_nothing_and_is_exact(shape):
    base = nn.Linear(IN, OUT)
    frozen, x = FrozenLinear(base), tensor(12, shape)
    with count_saved_tensors() as saved:
        y = frozen(x)
    assert saved.bytes_kept == 0
    y.sum().backward()
    got = x.grad.numpy()
    x.clear_gradient()
    base(x).sum().backward()
    np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-6)
    with count_saved_tensors() as plain:
        base(x)
    assert plain.bytes_kept == 40 * IN * 4  # why this class exists: Paddle's own Linear keeps x
    assert frozen(tensor(12, shape, trainable=False)).stop_gradient


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"policy": "fp8"}, "fp8"),
    ],
)
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        LoRALinear(nn.Linear(4, 4), **{"rank": 2, "alpha": 2.0, **settings})
