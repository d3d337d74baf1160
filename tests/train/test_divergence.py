"""What may not be saved, and what is said of the checkpoints that there are."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.train.divergence import BadStep, check_before_saving, check_weights, last_checkpoint


def state(**groups):
    return SimpleNamespace(step=7, tensors=lambda: groups)


def values(number):
    return {"a": paddle.ones([2]), "b": paddle.to_tensor([0.0, number])}


@pytest.mark.parametrize("group", ["lora", "optimizer", "ema"])
def test_nothing_that_is_not_finite_is_saved(tmp_path, group):
    groups = {name: values(1.0) for name in ("lora", "optimizer", "ema")}
    check_before_saving(state(**groups), tmp_path)
    groups[group] = values(float("nan"))
    told = (
        f"step 7: b of {group} holds NaN or infinity: training has diverged, .*No checkpoint was saved before"
    )
    with pytest.raises(FloatingPointError, match=told):
        check_before_saving(state(**groups), tmp_path)


def test_a_parameter_that_no_lora_file_may_hold_is_not_saved_either(tmp_path):
    check_before_saving(state(lora=values(-1e9), optimizer=values(1e30)), tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 7: b has grown beyond 1e\+09: training has diverged"):
        check_before_saving(state(lora=values(-2e9)), tmp_path)


def test_the_last_checkpoint_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "latest").write_text("000000250\n")
    assert last_checkpoint(tmp_path) == "The last checkpoint, step 250, is unharmed"
    (folder / "latest").write_bytes(b"\xff")
    assert last_checkpoint(tmp_path) == "No checkpoint was saved before"


def bad_step(parameter=1.0, weight=1.0):
    model = paddle.nn.Linear(2, 2)
    model.bias.set_value(paddle.to_tensor([0.0, weight]))
    parameters = {"a.lora_A": paddle.to_tensor([parameter])}
    return BadStep(3, model, parameters, np.zeros([1, 1]), np.zeros(1), lambda number: None)


class Two:
    """Two ranks, as the first; the other found what `other` says."""

    def __init__(self, other):
        self.other, self.closed = other, False

    def gather(self, values):
        return np.array([values, self.other])

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("step", "other", "error", "told"),
    [
        ({"parameter": np.inf}, [0, 0], FloatingPointError, "step 3: a.lora_A holds NaN or infinity since"),
        ({}, [1, 0], FloatingPointError, "step 3: a parameter of rank 1 holds NaN or infinity since"),
        ({"weight": np.nan}, [0, 0], ConfigError, "step 3: bias of the transformer of tiny holds NaN or inf"),
        ({}, [0, 1], ConfigError, "step 3: a weight on rank 1 of the transformer of tiny holds NaN or inf"),
    ],
)
def test_what_never_gets_well_ends_all_ranks(tmp_path, step, other, error, told):
    config = SimpleNamespace(run_dir=tmp_path, model=SimpleNamespace(name_or_path="tiny"))
    ranks = Two([0, 0])
    check_weights(bad_step(), config, ranks, with_base=True)
    assert not ranks.closed
    ranks = Two(other)
    with pytest.raises(error, match=told):
        check_weights(bad_step(**step), config, ranks, with_base=True)
    assert ranks.closed


def test_a_base_that_was_looked_at_is_not_looked_at_again(tmp_path):
    check_weights(bad_step(weight=np.nan), SimpleNamespace(), Two([0, 0]), with_base=False)
