"""ai-toolkit's published FLUX LoRA config trains here: as it is but for its two folders, two steps of it; and
with COAT and few steps, to the end. So does the one for FLUX.1 Kontext, on pairs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors import safe_open

from ppcoat.cli.main import main
from ppcoat.data import garments
from ppcoat.train.checkpoint import load_latest

FIXTURES = Path(__file__).parents[1] / "fixtures"
PUBLISHED = FIXTURES / "ai_toolkit" / "train_lora_flux_24gb.yaml"
KONTEXT = FIXTURES / "ai_toolkit" / "train_lora_flux_kontext_24gb.yaml"
COAT = """\
coat:
  enabled: true
  optimizer: {use_fp8: true, m1_format: e4m3, m2_format: e4m3, block_size: 128}
  activation: {use_fp8: true, linear_granularity: per_tensor, nonlinear_granularity: per_group}
  memory: {enable_efficient_checkpoint: true}
"""


def with_folders(tmp_path):
    """The published file with a folder of three pictures and that of the tiny model in place of its own."""
    garments.write_folder(tmp_path / "pictures", 3, seed=1, motif="gold star", prefix="")
    text = PUBLISHED.read_text("utf-8")
    for old, new in (
        ("/path/to/images/folder", tmp_path / "pictures"),
        ("black-forest-labs/FLUX.1-dev", FIXTURES / "tiny_flux_fp32"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, str(new))
    return text


@pytest.mark.slow
def test_two_steps_of_the_published_config_with_nothing_replaced_but_its_folders(
    tmp_path, monkeypatch, capfd
):
    """Its 2000 steps, sizes and previews stay: a dry run does the first two steps, whatever they say."""
    (tmp_path / "run.yaml").write_text(with_folders(tmp_path), "utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", "run.yaml", "--dry_run"]) == 0
    said = capfd.readouterr().out
    losses = re.findall(r"^step (\d): loss (\S+), activations kept", said, re.MULTILINE)
    assert [number for number, _ in losses] == ["1", "2"]
    assert all(0 < float(loss) < 10 for _, loss in losses)
    for line in ("steps: 2000", "sample_steps: 20", "width: 1024", "quantize: fp8"):
        assert line in said
    assert sorted(tmp_path.rglob("*")) == before  # a dry run leaves nothing


def test_the_published_config_trains_to_the_end_with_coat_and_few_steps(tmp_path, monkeypatch, capfd, caplog):
    text = with_folders(tmp_path)
    (tmp_path / "run.yaml").write_text(text + COAT, "utf-8")
    monkeypatch.chdir(tmp_path)
    few = ["train.steps=2", "sample.sample_steps=1", "sample.width=64", "sample.height=64"]
    assert main(["train", "run.yaml", *(flag for each in few for flag in ("--set", each))]) == 0

    assert "9 pictures to encode" in capfd.readouterr().out  # 3 pictures at 3 resolutions
    run = tmp_path / "output" / "first_flux_lora"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in log] == [1, 2] and all(line["lr"] == 1e-4 for line in log)
    assert all(np.isfinite(line["loss"]) and line["kept_bytes"] > 0 for line in log)
    with safe_open(str(run / "first_flux_lora.safetensors"), framework="np") as file:
        assert (file.metadata()["rank"], file.metadata()["step"]) == ("16", "2")
        values = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert {value.dtype for value in values} == {np.dtype("float16")}
    assert all(np.isfinite(value).all() for value in values)
    assert load_latest(run).tensors["ema"]
    samples = sorted((run / "samples").iterdir())
    assert [path.stem for path in samples] == [f"00000000{step}_0{i}" for step in (0, 2) for i in (0, 1)]
    with Image.open(samples[0]) as picture:
        assert (
            picture.size == (64, 64) and picture.text["prompt"] == "a red dress on a hanger, first_flux_lora"
        )
    assert list((run / "cache").glob("*/*.safetensors"))

    warnings = [record.getMessage() for record in caplog.records]
    lines = (text + COAT).splitlines()
    for warning in warnings:
        place = re.fullmatch(r"run\.yaml:(\d+): (?:\w+\.)*(\w+): .+", warning)
        assert place and lines[int(place[1]) - 1].strip().startswith(f"{place[2]}:"), warning
    keys = [warning.split(": ")[1] for warning in warnings]
    assert len(set(keys)) == len(keys) and set(keys) <= {"device", "meta", "train.optimizer", "network"}


def test_the_published_kontext_config_trains_on_pairs_with_nothing_replaced_but_its_paths(
    tmp_path, monkeypatch, capfd
):
    """To the end, and its previews are drawn after the reference that their prompts name; its steps and sizes
    are few and small only by overrides."""
    garments.write_folder(tmp_path / "pictures", 2, seed=1, motif="gold star", prefix="")
    (tmp_path / "before").mkdir()
    for path in sorted((tmp_path / "pictures").glob("*.png")):
        ImageOps.invert(Image.open(path).convert("RGB")).save(tmp_path / "before" / f"{path.stem}.jpg")
    text = KONTEXT.read_text("utf-8")
    for old, new in (
        ("/path/to/images/folder", tmp_path / "pictures"),
        ("/path/to/control/folder/person1.jpg", tmp_path / "before" / "0001.jpg"),
        ("/path/to/control/folder", tmp_path / "before"),
        ("black-forest-labs/FLUX.1-Kontext-dev", FIXTURES / "tiny_flux_fp32"),
    ):
        assert old in text
        text = text.replace(old, str(new))
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    few = ["train.steps=2", "sample.sample_steps=1", "sample.width=64", "sample.height=64",
           "train.skip_first_sample=true", "datasets.0.resolution=[64, 96]"]  # fmt: skip
    assert main(["train", "run.yaml", *(flag for each in few for flag in ("--set", each))]) == 0
    assert capfd.readouterr().out.count("a reference at the size of the picture beside 2 of 2 pictures") == 1
    run = tmp_path / "output" / "my_first_flux_kontext_lora_v1"
    with safe_open(str(run / "my_first_flux_kontext_lora_v1.safetensors"), framework="np") as file:
        fields = file.metadata()
    assert (fields["ss_base_model_version"], fields["references"]) == ("flux.1_kontext", "1")
    samples = sorted((run / "samples").iterdir())
    assert len(samples) == 10 and all(path.stem.startswith("000000002") for path in samples)
    assert Image.open(samples[0]).text["prompt"] == "make the coat blue"
