"""The command on the random reference FLUX: every score is printed and written."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ppcoat.infer.evaluate as evaluate_module
import ppcoat.infer.garment_scores as garment_scores
from ppcoat.cli.main import run

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"
FACTS = ("kind", "colour", "pattern")
NAMES = {"autoencoder PSNR, dB", "Frechet 4 steps / 28 steps"}
NAMES |= {f"{name}, {where}" for name in FACTS for where in ("drawings", "4 steps", "28 steps")}
NAMES |= {f"Frechet distance, {steps} steps" for steps in (4, 28)}
pytestmark = pytest.mark.usefixtures("quick_and_untrained", "encoders_read_once")


def test_the_command_prints_and_writes_every_score(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_module, "tune_host", lambda: None)
    output, contact_sheet = tmp_path / "scores.json", tmp_path / "sheet.png"
    flags = f"--model {FIXTURE} --samples 4 --batch_size 3 --output {output} --sheet {contact_sheet}"
    assert run("evaluate", flags.split()) == 0
    scores = json.loads(output.read_text())
    assert set(scores) == NAMES
    assert all(np.isfinite(value) for value in scores.values())
    assert all(0 <= value <= 1 for name, value in scores.items() if name.split(",")[0] in FACTS)
    few, many = (scores[f"Frechet distance, {steps} steps"] for steps in (4, 28))
    assert few > 0 and many > 0
    assert scores["Frechet 4 steps / 28 steps"] == pytest.approx(few / many)
    printed = capsys.readouterr().out
    for name, value in scores.items():
        assert f"{name:28s} {value:.4g}" in printed
    assert Image.open(contact_sheet).size == (16 * 64, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pictures a={0} --references {0} --student x", "--student has no effect with --pictures"),
        ("--model {0} --clip x", "--clip has no effect with --model"),
        ("--model {0} --samples 1", "samples: came 1, wanted 2 to"),
        ("--model {0} --samples 1000000000000", "samples: came 1000000000000, wanted 2 to"),
        ("--model {0}/model_index.json", "model_index.json is a file, wanted a FLUX folder"),
        ("--model {0} --sheet {0}", "is a folder; name a file"),
        ("--model {0} --student {0}/none.safetensors", "none.safetensors"),
    ],
)
def test_mistakes_are_named_before_anything_is_drawn(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(garment_scores.FluxPipeline, "from_pretrained", lambda *_: pytest.fail("loaded"))
    assert run("evaluate", flags.format(FIXTURE).split()) == 2
    assert message in capsys.readouterr().err
