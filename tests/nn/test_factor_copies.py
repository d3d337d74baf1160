"""LoRA factors in the dtype of the model: cast once a step, and never those of before an update."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.coat import factor_copies
from ppcoat.lora import inject_lora, lora_parameters
from ppcoat.nn.linear import FactorCopies, LoRALinear
from ppcoat.optim import FP8AdamW
from ppcoat.train.run_state import RunningMean

WIDE = paddle.float64  # stands for the 16-bit floats of a card: a CPU multiplies it


class Layers(nn.Layer):
    """Two LoRAs on float64 Linears."""

    def __init__(self):
        super().__init__()
        paddle.seed(0)
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 8)
        self.to(dtype="float64")
        for layer in inject_lora(self, 4, 8.0, targets=["first", "second"]).values():
            random = np.random.default_rng(1).standard_normal(layer.lora_B.shape) / 4
            layer.lora_B.set_value(random.astype("float32"))

    def forward(self, x):
        return self.second(self.first(x))


def loss_of(model: Layers) -> paddle.Tensor:
    x = np.random.default_rng(2).standard_normal([2, 5, 24])
    return model(paddle.to_tensor(x)).square().mean()


def step(model, optimizer, copies) -> np.ndarray:
    """Losses inside and outside of the context, before the update."""
    with copies.in_use():
        loss = loss_of(model)
        loss.backward()
    alone = loss_of(model)
    optimizer.step()
    optimizer.clear_grad()
    return float(loss), float(alone)


@pytest.fixture(params=["FP8AdamW", "AdamW"])
def training(request):
    """model, optimizer, its copies: from the flat buffer of ours, or gathered."""
    model = Layers()
    kind = {"FP8AdamW": FP8AdamW, "AdamW": paddle.optimizer.AdamW}[request.param]
    optimizer = kind(learning_rate=0.05, parameters=lora_parameters(model))
    return model, optimizer, factor_copies(model, [optimizer])


def served(model: Layers, copies: FactorCopies, dtype=WIDE) -> None:
    """Every copy is what the factor holds now."""
    with copies.in_use():
        for factor in lora_parameters(model):
            got = copies.of(factor, dtype)
            assert got.dtype == dtype and got.shape == factor.shape and got.stop_gradient
            np.testing.assert_array_equal(
                got.astype("float32").numpy(), factor.astype(dtype).astype("float32").numpy()
            )


def test_the_flat_buffer_of_the_optimizer_is_what_is_cast(training):
    model, optimizer, copies = training
    assert (copies._layout is getattr(optimizer, "space", None)) == isinstance(optimizer, FP8AdamW)


@pytest.mark.parametrize("dtype", [paddle.bfloat16, paddle.float16, WIDE])
def test_never_stale_after_a_step_a_load_and_a_running_mean(training, dtype):
    model, optimizer, copies = training
    served(model, copies, dtype)
    for _ in range(2):
        step(model, optimizer, copies)
        served(model, copies, dtype)
    mean = RunningMean({str(i): p for i, p in enumerate(lora_parameters(model))}, 0.5)
    step(model, optimizer, copies)
    mean.update()
    with mean.in_place_of_parameters():
        served(model, copies, dtype)
    served(model, copies, dtype)
    state = {name: paddle.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.set_state_dict(state)  # as from a file
    served(model, copies, dtype)
    for factor in lora_parameters(model):
        paddle.assign(paddle.full_like(factor, 0.75), output=factor)  # as from a checkpoint
    served(model, copies, dtype)


def test_losses_and_updates_are_those_of_casts_at_each_call(training):
    model, optimizer, copies = training
    other = Layers()
    plain = type(optimizer)(learning_rate=0.05, parameters=lora_parameters(other))
    for _ in range(3):
        loss, alone = step(model, optimizer, copies)
        wanted = loss_of(other)
        wanted.backward()
        plain.step()
        plain.clear_grad()
        assert loss == alone == float(wanted)
    for got, want in zip(lora_parameters(model), lora_parameters(other), strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_one_cast_serves_a_whole_step(training, monkeypatch):
    model, optimizer, copies = training
    step(model, optimizer, copies)
    casts = []
    cast = paddle.Tensor.astype
    monkeypatch.setattr(paddle.Tensor, "astype", lambda x, dtype: casts.append(x.shape) or cast(x, dtype))
    with copies.in_use():
        for _ in range(3):  # as in gradient accumulation
            loss_of(model).backward()
    gradients = [list(factor.shape) for factor in lora_parameters(model)]
    assert casts == [casts[0], *3 * [shape for pair in (gradients[2:], gradients[:2]) for shape in pair]]
    assert casts[0] == copies._layout.shape


def test_it_is_left_after_an_error_and_what_is_not_in_it_casts_for_itself(training):
    model, _, copies = training
    with pytest.raises(ZeroDivisionError), copies.in_use():
        loss_of(model)
        raise ZeroDivisionError
    stranger = LoRALinear(nn.Linear(4, 4).to(dtype="float64"), 2, 2.0)
    for factor in lora_parameters(model):
        paddle.assign(factor + 1.0, output=factor)
    after = float(loss_of(model))
    with copies.in_use():
        assert float(loss_of(model)) == after
        assert stranger(paddle.ones([1, 4], "float64")).dtype == WIDE
        assert copies.of(stranger.lora_A, WIDE).dtype == WIDE


def test_a_model_in_float32_has_no_copies():
    model = Layers().to(dtype="float32")
    copies = factor_copies(model, [])
    with copies.in_use():
        model(paddle.ones([1, 24])).sum().backward()
    assert copies._made == {}


def test_a_model_without_loras_has_nothing_to_cast():
    with factor_copies(nn.Linear(4, 4), []).in_use():
        pass
