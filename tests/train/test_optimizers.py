"""A run with each optimizer: what it writes, going on from a checkpoint, what is refused there."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.coat import COATTrainer
from ppcoat.errors import ConfigError
from ppcoat.optim import ScheduleFreeAdamW
from ppcoat.train.optimizers import run_optimizer
from ppcoat.train.run import train_lora
from ppcoat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_flux")

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("schedulefree_adamw", "lion", "adafactor")]
NAMES = ["prodigy", *SLOW]
PREVIEWS_OFF = "sample.sample_every=0"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_stops_and_goes_on_writes_the_bits_of_one_that_did_not(make_config, monkeypatch, name):
    """Two steps and one more, FP8 states in the checkpoint. The files are not empty: the LoRA has moved."""
    options = [f"train.optimizer={name}", "train.lr=0.5", "coat.enabled=true", PREVIEWS_OFF]
    options += ["train.steps=3", "train.batch_size=1", "logging.log_every=1"]
    options += ["train.prodigy.d0=1e-3"] if name == "prodigy" else []
    whole = load_file(train_lora(make_config("name=whole", *options)).lora_file)
    step = Trainer.train_step

    def stops(trainer):
        if trainer.step == 2:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train_lora(make_config("name=parts", *options))
    result = train_lora(make_config("name=parts", *options))
    parts = load_file(result.lora_file)
    assert len(result.losses) == 1 and parts.keys() == whole.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(parts[key], value)
        assert np.isfinite(value).all() and np.abs(value).max() > 0
    lines = [json.loads(line) for line in (result.lora_file.parent / "log.jsonl").read_text().splitlines()]
    assert any("prodigy_d" in line for line in lines) == (name == "prodigy")


def test_schedule_free_writes_its_average_and_trains_on(make_config, monkeypatch):
    """In the file is x, recomputed from y and z of the optimizer; after that the model has y again."""
    seen = {}
    save = Trainer._save

    def watched(trainer, report, checkpoint, final):
        result = save(trainer, report, checkpoint, final)
        seen.update({name: p.numpy() for name, p in trainer.side.parameters.items()})
        optimizer = trainer.state.optimizer
        assert isinstance(optimizer, ScheduleFreeAdamW)
        seen["z"] = [view.numpy() for view in optimizer.space.views(optimizer.state_dict()["z.values"])]
        return result

    monkeypatch.setattr(Trainer, "_save", watched)
    options = ("train.optimizer=schedulefree_adamw", "train.lr_scheduler=constant_with_warmup",
               "train.lr_warmup_steps=2", "train.steps=3", "train.batch_size=1", "network.linear_alpha=2",
               PREVIEWS_OFF)  # fmt: skip
    file = load_file(train_lora(make_config("name=average", *options)).lora_file)
    z = seen.pop("z")
    for (name, y), other in zip(seen.items(), z, strict=True):
        x = y + (other - y) * (1 - 1 / 0.9)
        key = f"transformer.{name}.weight"
        np.testing.assert_allclose(file[key].T, x, rtol=1e-5, atol=1e-8)
        if "lora_B" in name:
            assert not np.allclose(file[key].T, y, rtol=1e-3)


def test_a_schedule_beside_a_rate_of_its_own_is_told(make_config, caplog):
    """relative_step leaves the schedule out; that is not silent."""
    own = ("train.optimizer=adafactor", "train.adafactor.relative_step=true", "train.lr_scheduler=cosine")
    run_optimizer(make_config(*own), COATTrainer(), [paddle.create_parameter([4, 4], "float32")])
    assert "train.lr_scheduler cosine has no effect with adafactor.relative_step" in caplog.text


def test_another_optimizer_cannot_go_on_from_a_checkpoint(make_config):
    short = ("name=run", "train.steps=1", "train.batch_size=1", PREVIEWS_OFF)
    train_lora(make_config(*short, "train.optimizer=lion"))
    with pytest.raises(ConfigError) as caught:
        train_lora(make_config(*short, "train.optimizer=prodigy", "train.lr=1"))
    assert "train.optimizer was 'lion' in the checkpoint and is 'prodigy' now" in str(caught.value)
