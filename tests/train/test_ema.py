"""The running mean against float64 NumPy, and its way in and out of the parameters."""

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.optim import FP8AdamW
from ppcoat.train.run import train_lora
from ppcoat.train.run_state import RunningMean
from ppcoat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_flux")


def parameter(values):
    return paddle.create_parameter(
        [len(values)], "float32", default_initializer=lambda p, _: p.set_value(values)
    )


@pytest.fixture
def two():
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(size).astype(np.float32) for name, size in (("a", 5), ("b", 3))}
    return {name: parameter(value) for name, value in values.items()}


def test_the_mean_is_the_weighted_sum_of_what_was_seen(two):
    mean, decay = RunningMean(two, 0.9), 0.9
    wanted = {name: p.numpy().astype(np.float64) for name, p in two.items()}
    rng = np.random.default_rng(1)
    for _ in range(20):
        for name, p in two.items():
            p.set_value(rng.standard_normal(p.shape).astype(np.float32))
            wanted[name] = decay * wanted[name] + (1 - decay) * p.numpy().astype(np.float64)
        mean.update()
    for name, tensor in mean.tensors.items():
        assert tensor.dtype == paddle.float32
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=1e-5, atol=1e-7)


def test_parameters_hold_the_mean_for_a_while_and_no_copy_stays(two):
    optimizer = FP8AdamW(0.1, list(two.values()))  # its flat buffer is what the parameters look into
    mean = RunningMean(two, 0.5)
    for p in two.values():
        p.grad = paddle.ones_like(p)
    optimizer.step()
    mean.update()
    own = {name: p.numpy() for name, p in two.items()}
    places = {name: p.data_ptr() for name, p in two.items()}
    known = set(vars(mean))
    with pytest.raises(RuntimeError, match="inside"), mean.in_place_of_parameters():
        for name, p in two.items():
            np.testing.assert_array_equal(p.numpy(), mean.tensors[name].numpy())
            assert not np.array_equal(p.numpy(), own[name])
        raise RuntimeError("inside")
    assert {name: p.data_ptr() for name, p in two.items()} == places and set(vars(mean)) == known
    for name, p in two.items():
        np.testing.assert_array_equal(p.numpy(), own[name])


def test_a_loaded_mean_goes_on_bit_for_bit(two):
    first, second = RunningMean(two, 0.9), RunningMean(two, 0.9)
    for p in two.values():
        p.set_value(p.numpy() + 1)
    first.update()
    second.load({name: tensor.clone() for name, tensor in first.tensors.items()})
    for mean in (first, second):
        mean.update()
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), second.tensors[name].numpy())


def test_the_file_holds_the_mean_and_training_is_the_same(make_config, monkeypatch):
    """The mean is recomputed in float64 from the weights after every step."""
    seen, step = [], Trainer.train_step

    def watched(trainer):
        if not seen:
            seen.append({name: p.numpy() for name, p in trainer.side.parameters.items()})
        result = step(trainer)
        seen.append({name: p.numpy() for name, p in trainer.side.parameters.items()})
        return result

    monkeypatch.setattr(Trainer, "train_step", watched)
    plain = train_lora(make_config("name=plain", "network.linear_alpha=2"))
    without = [seen.pop(0) for _ in range(5)]
    options = ("train.ema.use_ema=true", "train.ema.ema_decay=0.6", "network.linear_alpha=2")
    file = load_file(train_lora(make_config("name=mean", *options)).lora_file)
    last = load_file(plain.lora_file)
    for name in seen[0]:
        for with_it, without_it in zip(seen, without, strict=True):
            np.testing.assert_array_equal(with_it[name], without_it[name])
        mean = seen[0][name].astype(np.float64)
        for weights in seen[1:]:
            mean = 0.6 * mean + 0.4 * weights[name]
        key = f"transformer.{name}.weight"
        np.testing.assert_allclose(file[key].T, mean, rtol=1e-4, atol=1e-6)
        if "lora_B" in name:
            assert not np.allclose(file[key], last[key], rtol=1e-3)
