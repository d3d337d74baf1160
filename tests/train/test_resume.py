"""Going on under other settings: what may change does at once, what may not is refused by name."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.cli.main import main
from ppcoat.data import garments
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.examples import Example
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError
from ppcoat.optim import lr_scheduler
from ppcoat.train.base_model import base_identity
from ppcoat.train.checkpoint import in_its_folder, load_latest
from ppcoat.train.flux import FluxSpec
from ppcoat.train.report import SigmaBins
from ppcoat.train.run import train_lora
from ppcoat.train.run_state import RunState


def test_a_moved_run_goes_on_with_another_rate_a_mean_and_one_picture_more(make_config, tmp_path, capfd):
    config = make_config("train.steps=2", "train.lr=1e-3")
    train_lora(config)
    garments.write_folder(tmp_path / "more", 1, seed=9, motif="gold star", prefix="")
    for file in (tmp_path / "more").iterdir():
        shutil.copy(file, tmp_path / "data" / f"more{file.suffix}")
    moved = tmp_path / "elsewhere" / "coats"
    shutil.move(config.run_dir, moved)
    again = ["train", "--config", str(moved / "config.yaml"), "--set", "train.steps=3",
             "--set", "train.lr=1e-4", "--set", "train.ema.use_ema=true"]  # fmt: skip
    assert main([*again, "--restart-data"]) == 0
    assert "restart_data: false" in (moved / "config.yaml").read_text()  # it was allowed this once
    said = capfd.readouterr().out
    assert f"this run's folder was {config.run_dir}; it goes on in {moved}" in said
    assert f"resuming from {moved}/checkpoints/000000002: 1 of 3 steps are left" in said
    for part in ("train.lr 0.001 -> 0.0001", "train.steps 2 -> 3", "copy counts) was 6 and is 7 now",
                 "rate is now 0.0001", "; anew: the order of the pictures and the running mean"):  # fmt: skip
        assert part in said, part
    rates = [json.loads(line)["lr"] for line in (moved / "log.jsonl").read_text().splitlines()]
    assert rates == [1e-3, 1e-3, 1e-4]  # the first resumed step has the new one
    assert load_latest(moved).step == 3 and (moved / "coats.safetensors").is_file()


def test_what_changed_is_refused_before_anything_is_loaded_or_told(make_config, tmp_path, monkeypatch, capfd):
    base = "seed=0", "train.batch_size=2", "network.linear=4"
    train_lora(make_config("train.steps=1", *base))
    next((tmp_path / "data").glob("*.txt")).write_text("a hat")
    train_lora(make_config("train.steps=2", *base))
    said = capfd.readouterr().out
    assert "changed since then: train.steps 1 -> 2, data: 1 caption changed (" in said
    monkeypatch.setattr(FluxSpec, "load_encoders", None)  # a call would be another error
    for change, part in {
        "network.linear=8": "network.linear was 4 in the checkpoint and is 8 now",
        "train.batch_size=1": "was 2 and is 1 now (train.batch_size 2 -> 1); set it back, add --restart_data",
        "seed=7": "the seed was 0 and is 7 now",
        "coat.optimizer.use_fp8=false": "FP8 optimizer states",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(part)):
            train_lora(make_config("train.steps=2", *base, change))


def test_only_the_own_config_of_a_moved_folder_is_followed(make_config, tmp_path):
    config, folder = make_config(), tmp_path / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    own = folder / "config.yaml"
    assert in_its_folder(config, own).run_dir == folder
    assert in_its_folder(config, folder / "mine.yaml") == config
    assert in_its_folder(config, own, ["output_dir=elsewhere"]) == config
    (config.run_dir / "checkpoints").mkdir(parents=True)  # a new run under the old name
    assert in_its_folder(config, own).run_dir == folder
    assert in_its_folder(config, config.run_dir / "config.yaml") == config


def test_a_base_is_known_by_its_weights_and_not_by_the_name_of_its_folder(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        (folder / "transformer").mkdir(parents=True)
        save_file({"w": np.ones([4], np.float32)}, folder / "transformer" / "model.safetensors")
    first, second = map(base_identity, folders)
    assert first == second
    file = folders[0] / "transformer" / "model.safetensors"
    save_file({"w": load_file(file)["w"] * 2}, file)
    assert base_identity(folders[0]) != first


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_rate_and_schedule_are_those_of_the_run_that_goes_on(scheduler):
    def state(rate, steps, name):
        schedule = lr_scheduler(name, rate, steps)
        batches = ResumableBatches([Example(Item(Path("a.png"), "a", 64, 64), (64, 64), ("a",))], 1, 0)
        return RunState({}, _NoOptimizer(), schedule, batches, SigmaBins())

    before, after = state(1e-3, 10, "linear"), state(1e-4, 20, scheduler)
    for _ in range(5):
        before.schedule.step()
    after.load(5, {"lora": {}, "optimizer": {}}, before.state_dict())
    wanted = lr_scheduler(scheduler, 1e-4, 20)
    for _ in range(5):
        wanted.step()
    assert after.schedule() == wanted() != before.schedule()


class _NoOptimizer:
    def set_state_dict(self, state):
        assert state == {}
