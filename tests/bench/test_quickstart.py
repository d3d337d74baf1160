"""quickstart: its sheet, its summary, and a whole small run whose printed numbers are those of its files."""

import json
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import ppcoat.bench.quickstart as quickstart_module
from ppcoat.bench.flags import CONFIG
from ppcoat.bench.quickstart import contact_sheet, draw_and_score, final_loss, quickstart_summary
from ppcoat.cli.main import run
from ppcoat.config.load import load_config
from ppcoat.infer.garment_scores import GarmentClassifier
from ppcoat.lora import inject_lora, lora_layers, save_lora
from ppcoat.models.flux import prompt_encoding
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.train.trainer import TrainingResult

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"


def result(lora_file, losses, seconds, kept, states):
    return TrainingResult(lora_file, losses, seconds, kept, 4 * kept, states)


def test_contact_sheet_enlarges_and_labels_rows():
    rows = [[Image.new("RGB", (8, 6), (row, column, 9)) for column in range(3)] for row in (100, 200)]
    sheet = contact_sheet(rows, ["LoRA off", "LoRA on"], scale=2)
    assert sheet.size == (70 + 3 * 16, 2 * 12)
    for y, row in enumerate((100, 200)):
        for x in range(3):
            corners = [(70 + x * 16, y * 12), (70 + x * 16 + 15, y * 12 + 11)]
            assert {sheet.getpixel(corner) for corner in corners} == {(row, x, 9)}
    names = np.asarray(sheet.crop((0, 0, 70, 24)))
    assert (names != 255).any(), "the rows have no names"
    assert contact_sheet(rows, ["a", "b"], scale=5).size == (70 + 3 * 40, 2 * 30)


def test_contact_sheet_wants_a_name_per_row():
    with pytest.raises(ValueError):
        contact_sheet([[Image.new("RGB", (8, 6))]], ["one", "two"])


def test_final_loss_is_the_mean_of_the_last_steps(tmp_path):
    run_of_100 = result(tmp_path, [9.0] * 50 + [1.0, 3.0] * 25, 0, 0, 0)
    assert final_loss(run_of_100) == 2.0
    assert final_loss(run_of_100, steps=1) == 3.0
    assert final_loss(result(tmp_path, [4.0, 6.0], 0, 0, 0)) == 5.0


def test_summary_shows_what_was_computed(tmp_path):
    """50 parameters; 104 bytes of FP8 states and 400 of float32 ones are 2.08 and 8 a parameter."""
    file = tmp_path / "lora.safetensors"
    save_file({"a": np.zeros((2, 20), np.float32), "b": np.zeros((5, 2), np.float32)}, str(file))
    coat = result(file, [0.5150] * 60, 61.4, 3 << 20, 104)
    plain = result(file, [0.5] * 60, 42.6, 12 << 20, 400)
    config = load_config(CONFIG)
    rates = {"off": 0.01, "on": 0.87, "no_trigger": 0.42}
    text = quickstart_summary(config, coat, plain, rates, 200, tmp_path / "grid.png")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for wanted in (
        "final loss (mean of last 50 steps) 0.5150 0.5000",
        "activations kept for backward, MiB 3.00 12.00",
        "optimizer states, bytes per parameter 2.080 8.000",
        "training seconds, with previews 61 43",
        "difference of final losses: +3.00 % (wanted: within 3 %)",
        "pictures in which the detector finds the gold star, of 200 each:",
        "LoRA on, with 'sks' 87% (wanted: at least 80 %)",
        "LoRA off, with 'sks' 1% (wanted: at most 10 %)",
        "LoRA on, without 'sks' 42%",
        f"LoRA: {file}",
        f"before and after: {tmp_path / 'grid.png'}",
    ):
        assert wanted in lines


@pytest.fixture
def quick(monkeypatch, one_process):
    """A judge without training, a handful of pictures, captions of 16 tokens, and the threads as they are."""

    def load():
        paddle.seed(0)
        return GarmentClassifier()

    monkeypatch.setattr(quickstart_module.GarmentClassifier, "load", staticmethod(load))
    monkeypatch.setattr(quickstart_module, "PICTURES", 5)
    monkeypatch.setattr(quickstart_module, "tune_host", lambda: None)
    one_process(quickstart_module)
    monkeypatch.setattr(prompt_encoding, "MAX_T5_TOKENS", 16)


def overrides(folder, *more):
    values = (
        f"model.name_or_path={FIXTURE}",
        f"output_dir={folder}",
        f"datasets.0.folder_path={folder / 'data'}",
        "device=cpu",
        "train.steps=2",
        "train.lr_warmup_steps=0",
        "train.batch_size=2",
        "network.linear=2",
        "sample.sample_steps=1",
        "logging.visualdl=false",
        *more,
    )
    return [flag for value in values for flag in ("--set", value)]


def test_a_whole_small_run(tmp_path, quick, monkeypatch, capsys):
    stale = tmp_path / "quickstart" / "checkpoints" / "stale"
    stale.mkdir(parents=True)
    (tmp_path / "quickstart" / "config.yaml").touch()
    judged = []

    def judge(_, pictures):
        judged.append(len(pictures))
        return {"motif": np.array((["gold star", "none"] * 9)[: len(pictures)])}

    monkeypatch.setattr(quickstart_module, "classify", judge)
    assert run("quickstart", ["--samples", "3", *overrides(tmp_path)]) == 0
    printed = capsys.readouterr().out

    assert not stale.exists(), "an old run was gone on with"
    captions = [file.read_text() for file in sorted((tmp_path / "data").glob("*.txt"))]
    assert len(captions) == 5 and all(caption.startswith("[trigger] a ") for caption in captions)
    losses = {}
    for name in ("quickstart", "quickstart_off"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = np.mean([line["loss"] for line in lines])
        assert len(lines) == 2
        assert len(load_file(tmp_path / name / f"{name}.safetensors")) == 78
    shown = re.search(r"final loss .*?(\d\.\d{4}) +(\d\.\d{4})", printed)
    assert shown.groups() == tuple(f"{loss:.4f}" for loss in losses.values())
    assert judged == [3, 3, 3] and printed.count("67%") == 3
    kept = re.search(r"activations kept for backward, MiB +([\d.]+) +([\d.]+)", printed)
    assert 0 < float(kept[1]) < 0.6 * float(kept[2])
    assert Image.open(tmp_path / "before_after.png").size == (70 + 3 * 128, 2 * 128)
    assert len(list((tmp_path / "quickstart" / "samples").glob("*.png"))) == 2  # of the last step


def test_rates_and_grid_are_of_the_pictures_they_name(tmp_path, quick, monkeypatch):
    """Pictures are painted by what they are drawn with: 1 of 4 with a star before, 3 after, 2 untriggered."""
    transformer = FluxPipeline.from_pretrained(FIXTURE).transformer
    inject_lora(transformer, rank=2, alpha=2.0)
    save_lora(tmp_path / "lora.safetensors", transformer)
    stars = {(False, True): 1, (True, True): 3, (True, False): 2}  # (LoRA on, trigger word) -> pictures

    def paint(pipeline, prompts, config, first):
        has_lora = bool(lora_layers(pipeline.transformer))
        count = stars[has_lora, all(prompt.startswith("sks a ") for prompt in prompts)]
        numbers = range(first, first + len(prompts))
        return [Image.new("RGB", (64, 64), "gold" if i < count else "grey") for i in numbers]

    def judge(_, pictures):
        gold = [picture.getpixel((0, 0)) == (255, 215, 0) for picture in pictures]
        return {"motif": np.where(gold, "gold star", "none")}

    monkeypatch.setattr(quickstart_module, "draw_prompts", paint)
    monkeypatch.setattr(quickstart_module, "classify", judge)
    config = load_config(CONFIG, [f"model.name_or_path={FIXTURE}"])
    rates, grid = draw_and_score(config, tmp_path / "lora.safetensors", 4)
    assert rates == {"off": 0.25, "on": 0.75, "no_trigger": 0.5}
    pixels = [[grid.getpixel((70 + 128 * x, 128 * y)) for x in range(4)] for y in range(2)]
    assert [row.count((255, 215, 0)) for row in pixels] == [1, 3]


def test_the_two_runs_differ_in_coat_alone(tmp_path, quick, monkeypatch):
    configs = []

    def stop_after_two(config):
        configs.append(config)
        if len(configs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(quickstart_module, "train_lora", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run("quickstart", overrides(tmp_path))
    on, off = (config.model_dump() for config in configs)
    assert on.pop("coat").pop("enabled") and not off.pop("coat").pop("enabled")
    assert (on.pop("name"), off.pop("name")) == ("quickstart", "quickstart_off")
    on["sample"].pop("sample_every"), off["sample"].pop("sample_every")  # previews change no number
    assert on == off


def test_the_shipped_config_is_what_it_says():
    config = load_config(CONFIG)
    assert config.coat.enabled and config.trigger_word == "sks"
    assert config.model.name_or_path == "ppcoat/assets/tiny_flux"
    assert all("[trigger]" in prompt for prompt in config.sample.prompts)


def test_pictures_that_quickstart_did_not_draw_survive(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(quickstart_module, "train_lora", pytest.fail)
    photo = tmp_path / "data" / "wedding.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"the only copy")
    assert run("quickstart", overrides(tmp_path)) == 2
    assert photo.read_bytes() == b"the only copy"


def test_a_missing_model_leaves_earlier_results(tmp_path, capsys):
    for name in ("quickstart", "quickstart_off"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    overrides = [f"output_dir={tmp_path}", "model.name_or_path=nowhere"]
    assert run("quickstart", [argument for one in overrides for argument in ("--set", one)]) == 2
    assert "no model folder nowhere" in capsys.readouterr().err
    assert all((tmp_path / name / "config.yaml").exists() for name in ("quickstart", "quickstart_off"))
