"""What may not be saved, and what is said of the checkpoints that there are."""

from types import SimpleNamespace

import paddle
import pytest

from ppcoat.train.divergence import check_before_saving, last_checkpoint


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
