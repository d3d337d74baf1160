"""What a run loses where something cannot be written: as little as possible, and never without a word."""

import json

import pytest

from ppcoat.errors import ConfigError
from ppcoat.train import flux, trainer
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.report import Report
from ppcoat.train.run import train_lora

pytestmark = pytest.mark.usefixtures("small_flux")

FULL = OSError(28, "No space left on device")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_previews_and_curves_that_cannot_be_written_cost_a_warning(make_config, capfd):
    config = make_config("train.steps=1", "sample.sample_every=1", "sample.sample_steps=1", "sample.width=32",
                         "sample.height=32", "sample.prompts=[a hat]")  # fmt: skip
    config.run_dir.mkdir()
    (config.run_dir / "samples").touch()
    assert train_lora(config).lora_file.is_file()
    assert "warning: step 1: no previews, training goes on:" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("steps", "failing_part", "left"),
    [(4, "LoRA file", "checkpoint"), (4, "checkpoint", "LoRA file"), (2, "checkpoint", "LoRA file")],
    ids=["LoRA file", "checkpoint", "last checkpoint"],
)
def test_a_full_disk_ends_in_one_line_and_keeps_what_it_takes(
    make_config, monkeypatch, steps, failing_part, left
):
    """The second step is saved: in the middle of the run or at its end, where the file is the final one."""
    config = make_config(f"train.steps={steps}")
    if failing_part == "LoRA file":
        monkeypatch.setattr(flux, "save_lora", failing(FULL))
    else:
        monkeypatch.setattr(trainer, "save_run", failing(FULL))
    with pytest.raises(
        ConfigError, match=rf"step 2 could not be saved \({failing_part}: .*No space"
    ) as caught:
        train_lora(config)
    assert "\n" not in str(caught.value) and f"its {left} is unharmed; make room" in str(caught.value)
    name = "run.safetensors" if steps == 2 else "run_000000002.safetensors"
    assert (config.run_dir / name).exists() == (left == "LoRA file")
    assert (load_latest(config.run_dir) is not None) == (left == "checkpoint")


def test_what_lies_in_the_way_is_named(make_config):
    config = make_config("train.steps=1")
    (config.run_dir / "run.safetensors").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        train_lora(config)
    said = f"(LoRA file: {config.run_dir}/run.safetensors: Is a directory); what was saved before is unharmed"
    assert f"{said}; clear the way for it and run" in str(caught.value)
    assert load_latest(config.run_dir).step == 1


def test_an_error_of_the_device_is_no_full_disk(make_config, monkeypatch):
    monkeypatch.setattr(trainer, "save_run", failing(OSError("(External) CUDA error(700)")))
    with pytest.raises(OSError, match="CUDA error"):
        train_lora(make_config("train.steps=2"))


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capfd, monkeypatch):
    with Report(tmp_path, 3, log_every=1, visualdl=False) as report:
        for step in (1, 2, 3):
            with monkeypatch.context() as patch:
                if step > 1:
                    patch.setattr(report, "_log", type("Full", (), {"write": failing(FULL)}))
                report.step(step, {"loss": 1.0})
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 1
    said = capfd.readouterr().err
    assert said.count("warning: log.jsonl cannot be written: No space left on device; training goes on") == 1
