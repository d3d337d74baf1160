"""`python -m ppcoat train`: a dry run shows what a run would do; what goes wrong ends in one line and its
exit status."""

import argparse
import errno
import json
import re

import paddle
import pytest
import yaml

from ppcoat.cli.main import main
from ppcoat.cli.train import add_flux_arguments, add_newbie_arguments
from ppcoat.config.load import load_config
from ppcoat.train import checkpoint, run
from ppcoat.train import flux as flux_lora

pytestmark = pytest.mark.usefixtures("encoders_read_once")


@pytest.fixture
def file(tmp_path, write_run, drawings, small_flux):
    """Config of a run on 8 drawings, more than two steps need, with everything that writes switched on."""
    data = tmp_path / "data"
    drawings(data, 8)
    return write_run(
        tmp_path,
        data,
        model={"name_or_path": str(small_flux)},
        train={"steps": 3, "batch_size": 2, "gradient_accumulation": 2, "lr": 1e-2},
        datasets=[{"folder_path": str(data), "resolution": 64, "cache_to_disk": True,
                   "caption_dropout_rate": 0.5}],
        network={"linear": 2, "linear_alpha": 4, "dropout": 0.1},
        sample={"sample_every": 1, "skip_first_sample": False, "prompts": ["a hat"], "sample_steps": 1,
                "width": 64, "height": 64},
        save={"save_every": 1},
        logging={"visualdl": True},
    )  # fmt: skip


def files(folder):
    return sorted(path for path in folder.rglob("*"))


def test_a_dry_run_shows_settings_data_and_the_first_two_steps_and_writes_nothing(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert main(["train", str(file), "--dry_run", "--set", "seed=7"]) == 0
    assert files(tmp_path) == before
    printed = capsys.readouterr().out
    settings, data, steps = re.split(r"(?=^data: )|(?=^step 1)", printed, flags=re.MULTILINE)
    resolved = tmp_path / "printed.yaml"
    resolved.write_text(settings)
    assert load_config(resolved) == load_config(file, ["seed=7"])
    assert "8 pictures to encode" in data and "sks a" in data

    assert main(["train", str(file), "--set", "seed=7"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    shown = re.findall(r"step (\d): loss (\d\.\d{4}), activations kept (\d+\.\d\d) MB, (\d+) ms", steps)
    assert [number for number, *_ in shown] == ["1", "2"]
    for (_, loss, kept, milliseconds), line in zip(shown, lines, strict=False):
        assert float(loss) == pytest.approx(line["loss"], abs=2e-4)
        assert float(kept) == pytest.approx(line["kept_bytes"] / 1e6, abs=0.01)
        assert 0 < int(milliseconds) < 60_000


def test_a_dry_run_encodes_what_it_needs_and_no_more(file, monkeypatch):
    counted = []
    encode = flux_lora.FluxPipeline.encode_image

    def counting(pipeline, pixels):
        counted.append(pixels.shape[0])
        return encode(pipeline, pixels)

    monkeypatch.setattr(flux_lora.FluxPipeline, "encode_image", counting)
    config = load_config(file, ["train.batch_size=1", "train.gradient_accumulation=1"])
    assert len(list(run.dry_run(config))) == 2
    assert sum(counted) == 2


def test_a_dry_run_refuses_what_a_run_refuses(file, capsys):
    assert main(["train", str(file), "--dry_run", "--set", "model.name_or_path=nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and "nowhere" in said


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_went_bad_end_in_one_line_and_1(file, monkeypatch, capsys):
    real = flux_lora.FlowMatching.losses_at

    def losses_at(self, *arguments):
        found = real(self, *arguments)
        return type(found)(found.mean * paddle.to_tensor(float("nan")), found.of_pictures)

    monkeypatch.setattr(flux_lora.FlowMatching, "losses_at", losses_at)
    flags = ["--set", "train.max_skipped_in_a_row=1", "--set", "sample.sample_every=0"]
    assert main(["train", str(file), *flags]) == 1
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("error: 1 steps in a row were skipped") and "Traceback" not in said
    assert "the first bad tensor is the loss, nan" in last


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_later(file, monkeypatch, capsys):
    save, steps = checkpoint.save_checkpoint, []

    def full(run_dir, step, *arguments):
        steps.append(step)
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(run_dir, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", full)
        assert main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith("error: step 2 could not be saved (checkpoint: No space left on device); ")
    assert "Traceback" not in said and steps == [1, 2]
    assert main(["train", str(file)]) == 0
    assert f"resuming from {file.parent}/run/checkpoints/000000001: 2 of 3 steps are left" in (
        capsys.readouterr().out
    )


def test_an_output_folder_that_cannot_be_written_is_named_before_the_model_is_loaded(
    file, tmp_path, monkeypatch, capsys
):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(flux_lora.FluxPipeline, "from_pretrained", None)
    assert main(["train", str(file), "--set", f"output_dir={tmp_path}/a_file"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: output folder .*a_file/run: cannot be written to .*\n", said)


@pytest.mark.parametrize(
    ("add_arguments", "config"),
    [
        (add_flux_arguments, ["run.yaml"]),
        (add_newbie_arguments, ["--config_file", "run.toml"]),
    ],
)
def test_strict_sets_its_key_and_later_flags_win(add_arguments, config):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--set", "seed=7", "--strict", "--set", "save.strict_resume=false"]
    assert parser.parse_args(config).set == []
    assert parser.parse_args([*config, "--strict"]).set == ["save.strict_resume=true"]
    assert parser.parse_args([*config, "--deterministic"]).set == ["train.deterministic=true"]
    assert parser.parse_args([*config, *given]).set == [
        "seed=7", "save.strict_resume=true", "save.strict_resume=false"]  # fmt: skip


def test_the_settings_of_a_run_lie_beside_its_results(file):
    assert main(["train", str(file), "--set", "train.steps=1"]) == 0
    written = file.parent / "run" / "config.yaml"
    assert load_config(written) == load_config(file, ["train.steps=1"])
    assert yaml.safe_load(written.read_text())["train"]["steps"] == 1
