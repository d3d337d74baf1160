"""Whole runs on the reference FLUX: what they leave, exact resume at either side's turn, early refusals."""

import errno
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from safetensors import safe_open

import ppcoat.distill.encoding as encoding
import ppcoat.train.trainer as trainer_module
from ppcoat.config.lightning import lightning_config
from ppcoat.data import garments
from ppcoat.distill import flux_lightning
from ppcoat.distill.flux_lightning import pre_allocate, train_flux_lightning
from ppcoat.errors import ConfigError
from ppcoat.fp8 import backend
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of this file's runs, with 5 drawings in data/."""
    folder = tmp_path_factory.mktemp("lightning")
    garments.write_folder(folder / "data", 5, seed=1)
    return folder


@pytest.fixture(scope="module")
def make_config(folder, small_flux):
    """make_config(name, flag=value, ...) -> a run of 2 pictures a step."""
    given = {
        "data_path": str(folder / "data"),
        "pretrained_teacher_model": str(small_flux),
        "output_dir": str(folder),
        "resolution": "64",
        "lora_rank": "2",
        "learning_rate": "1e-2",
        "adv_lr": "1e-3",
        "train_batch_size": "2",
        "max_train_steps": "5",
        "max_sequence_length": "16",
        "num_euler_timesteps": "20",
        "use_dmd_loss": True,
        "apply_reflow_loss": True,
        "log_every": 1,  # the last step is always a point of the curves; so all are
        "visualdl": False,
        "validation_steps": 0,
        "device": "cpu",
    }

    def make(name, **flags):
        wanted = given | {"tracker_project_name": name} | flags
        return lightning_config({key: value for key, value in wanted.items() if value is not None})

    return make


def folder_of(config):
    return Path(config.output_dir) / config.tracker_project_name


def log(config):
    return [json.loads(line) for line in (folder_of(config) / "log.jsonl").read_text().splitlines()]


def checkpoint(config, step, name):
    return folder_of(config) / f"checkpoints/{step:09d}" / name


def shapes(file):
    with safe_open(str(file), framework="np") as content:
        return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def whole(make_config):
    """An uninterrupted run of 5 steps and its result."""
    config = make_config("whole", validation_steps=4, checkpointing_steps=2)
    return config, train_flux_lightning(config)


def test_a_run_leaves_lora_heads_previews_and_a_log_of_both_sides(whole):
    config, result = whole
    with safe_open(str(result.lora_file), framework="np") as file:
        assert file.metadata()["alpha"] == file.metadata()["rank"] == "2"
        values = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert all(np.isfinite(value).all() for value in values) and max(np.abs(v).max() for v in values) > 0
    lines = log(config)
    assert [("loss_discriminator" in line, "loss_generator" in line) for line in lines] == [
        (step % 2 == 0, step % 2 == 1) for step in range(5)
    ]
    assert [line["lr"] for line in lines] == [1e-3, 1e-2, 1e-3, 1e-2, 1e-3]
    assert len(list((folder_of(config) / "samples").glob("*.png"))) == 2
    names = sorted(path.name for path in (folder_of(config) / "checkpoints").iterdir())
    assert names == ["000000002", "000000004", "000000005", "latest"]
    state = json.loads(checkpoint(config, 5, "state.json").read_text())
    assert state["compatible"]["turns"] == {"even": "discriminator", "odd": "generator"}


def test_the_heads_are_in_the_checkpoint_and_have_no_first_moment(whole):
    config, result = whole
    names = shapes(checkpoint(config, 5, "optimizer.safetensors"))
    assert "generator.m1.codes" in names
    assert all(f"discriminator.{head}.m2.codes" in names for head in range(2))
    assert not any(name.startswith("discriminator.") and ".m1." in name for name in names)
    parameters = shapes(checkpoint(config, 5, "lora.safetensors"))
    heads = {
        name: math.prod(shape) for name, shape in parameters.items() if name.startswith("discriminator.")
    }
    lora = sum(math.prod(shape) for name, shape in parameters.items() if name not in heads)
    assert len({name.split(".")[2] for name in heads}) == 2
    # small tensors leave their last group half empty
    assert result.optimizer_bytes < 1.25 * sum(heads.values()) + 3 * lora


@pytest.mark.parametrize("stop", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(make_config, whole, stop):
    """Stopped before a turn of the heads, and before one of the LoRA."""
    name = f"halves {stop}"
    train_flux_lightning(make_config(name, max_train_steps=stop))
    halves = make_config(name, resume_from_checkpoint="latest")
    train_flux_lightning(halves)
    assert log(halves) == log(whole[0])
    manifests = [checkpoint(config, 5, "manifest.json").read_text() for config in (halves, whole[0])]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("stop", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_in_windows_is_bit_equal_to_one_that_encodes_all_at_once(make_config, whole, stop):
    """Uninterrupted, and resumed in the midst of a window of two steps."""
    name = f"windows {stop}"
    if stop:
        train_flux_lightning(make_config(name, max_train_steps=stop, encode_ahead=4))
    config = make_config(
        name,
        encode_ahead=4,
        validation_steps=4,
        resume_from_checkpoint="latest" if stop else None,
        checkpointing_steps=2,
    )
    train_flux_lightning(config)
    assert log(config) == log(whole[0])
    manifests = [checkpoint(each, 5, "manifest.json").read_text() for each in (config, whole[0])]
    assert manifests[0] == manifests[1]
    pictures = [(folder_of(each) / "samples").glob("*.png") for each in (config, whole[0])]
    for ours, theirs in zip(*map(sorted, pictures), strict=True):
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()


def test_a_picture_that_goes_bad_in_training_is_named_and_the_run_goes_on_later(
    make_config, whole, tmp_path, monkeypatch
):
    """All were decoded when the run began; this one breaks when the second window is due."""
    shutil.copytree(whole[0].data_path, tmp_path / "data")
    plain = {"adv_weight": 0, "adv_lr": None, "use_dmd_loss": False, "apply_reflow_loss": False}
    config = make_config(
        "bad",
        data_path=str(tmp_path / "data"),
        encode_ahead=2,
        checkpointing_steps=1,
        max_train_steps=4,
        **plain,
    )
    kept, load, loads = {}, encoding.OneByOne.load_encoders, []

    def load_and_break(*arguments):
        loads.append(1)
        if len(loads) == 3:  # the first is that of the whole run, before any window
            for path in (tmp_path / "data").glob("*.png"):
                kept[path] = path.read_bytes()
                path.write_bytes(b"")
        return load(*arguments)

    monkeypatch.setattr(encoding.OneByOne, "load_encoders", load_and_break)
    with pytest.raises(ConfigError, match=r"\.png.*checkpoints are unharmed"):
        train_flux_lightning(config)
    for path, content in kept.items():
        path.write_bytes(content)
    again = config.model_copy(update={"resume_from_checkpoint": "latest", "strict_resume": True})
    train_flux_lightning(again)
    assert [line["step"] for line in log(again)] == [1, 2, 3, 4]
    assert len(loads) == (1 + 2) + (1 + 3)


def test_a_damaged_checkpoint_stops_a_strict_run(make_config):
    plain = {"adv_weight": 0, "adv_lr": None, "use_dmd_loss": False, "apply_reflow_loss": False}
    train_flux_lightning(make_config("strict", max_train_steps=2, checkpointing_steps=1, **plain))
    config = make_config("strict", resume_from_checkpoint="latest", strict_resume=True, **plain)
    checkpoint(config, 2, "lora.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"lora\.safetensors.* resume without --strict_resume from"):
        train_flux_lightning(config)


def test_after_a_stop_the_flag_that_goes_on_is_named(make_config, stopped_in, monkeypatch, capfd):
    """The same command again is refused; and so it is said where a disk is full or a rank dies."""
    plain = {"adv_weight": 0, "adv_lr": None, "use_dmd_loss": False, "apply_reflow_loss": False}
    config = make_config("stopped", max_train_steps=2, **plain)
    status = stopped_in(1, train_flux_lightning, config)
    said, advice = capfd.readouterr().err, "give --resume_from_checkpoint latest"
    assert status == 143 and f"stopped at step 1; {advice} to go on from there" in said
    with pytest.raises(ConfigError, match=advice):
        train_flux_lightning(config)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    seen, current = [], Ranks.current
    monkeypatch.setattr(Ranks, "current", lambda *given: seen.append(given) or current(*given))
    monkeypatch.setattr(trainer_module, "save_run", full)
    with pytest.raises(ConfigError, match=f"make room on the disk and {advice}$"):
        train_flux_lightning(config.model_copy(update={"resume_from_checkpoint": "latest"}))
    assert [(device, patience.again) for device, patience in seen] == [("cpu", advice)]


def test_without_heads_every_step_trains_the_lora_and_published_order_begins_again(make_config):
    plain = {"adv_weight": 0, "adv_lr": None, "use_dmd_loss": False, "apply_reflow_loss": False}
    train_flux_lightning(make_config("order", max_train_steps=2, **plain))
    again = make_config(
        "order", max_train_steps=3, resume_order="published", resume_from_checkpoint="latest", **plain
    )
    train_flux_lightning(again)
    assert json.loads(checkpoint(again, 3, "state.json").read_text())["batches"]["batches"] == 1
    assert all("loss_generator" in line for line in log(again))


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        pytest.param({"gradient_checkpointing": True}, 0.02, marks=pytest.mark.slow),
        ({"quantize": "fp8", "saving_policy": "coat+recompute"}, 0.1),
    ],
    ids=["checkpointed", "FP8 base"],
)
def test_policies_checkpointing_and_an_fp8_base_follow_the_run(make_config, whole, flags, tolerance):
    config = make_config(" ".join(flags), max_train_steps=2, **flags)
    train_flux_lightning(config)
    losses = [[line["loss"] for line in log(each)][:2] for each in (config, whole[0])]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(FluxSpec, "load_encoders", fail)


def test_wrong_inputs_stop_before_a_model_is_loaded(make_config, whole, no_model_is_loaded, monkeypatch):
    with pytest.raises(ConfigError, match="nowhere"):
        train_flux_lightning(make_config("new", data_path="nowhere"))
    with pytest.raises(ConfigError, match="no_model: .* set --pretrained_teacher_model"):
        train_flux_lightning(make_config("new", pretrained_teacher_model="no_model"))
    with pytest.raises(ConfigError, match="--resume_from_checkpoint latest"):
        train_flux_lightning(make_config("whole"))
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(ConfigError, match="it needs an NVIDIA GPU; unset PPCOAT_BACKEND"):
        train_flux_lightning(make_config("new"))


def test_pre_allocation_says_one_line_on_a_cpu(capsys):
    pre_allocate(0)
    pre_allocate(76)
    assert capsys.readouterr().out == "pre_alloc_memory: nothing to do, this run is on a CPU\n"


def test_pre_allocation_takes_no_more_than_is_free(monkeypatch):
    meter = SimpleNamespace(free_memory=lambda: 30 * 10**9, total_memory=lambda: 48 * 10**9)
    taken = []
    monkeypatch.setattr(flux_lightning, "on_gpu", lambda: True)
    monkeypatch.setattr(flux_lightning, "GpuMeter", lambda: meter)
    monkeypatch.setattr(paddle, "empty", lambda shape, dtype: taken.append((shape, dtype)))
    pre_allocate(29)
    assert taken == [([29 * 10**9], "uint8")]
    with pytest.raises(ConfigError, match=r"came 30 GB, wanted less than the 30.0 GB .* free of .* 48.0"):
        pre_allocate(30)
