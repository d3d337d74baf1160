"""Scores of a model folder on the random reference FLUX: all there, finite, and counted right."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import ppcoat.infer.evaluate as evaluate_module
from ppcoat.cli.main import run
from ppcoat.data import garments
from ppcoat.infer.evaluate import evaluate, held_out_garments, sheet
from ppcoat.infer.garment_classifier import GarmentClassifier
from ppcoat.models import flux_pipeline

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"
FACTS = ("kind", "colour", "pattern")
NAMES = {"autoencoder PSNR, dB", "Frechet 4 steps / 28 steps"}
NAMES |= {f"{name}, {where}" for name in FACTS for where in ("drawings", "4 steps", "28 steps")}
NAMES |= {f"Frechet distance, {steps} steps" for steps in (4, 28)}


@pytest.fixture(autouse=True)
def quick_and_untrained(monkeypatch):
    """Scores need no good judge to be counted, and captions no 512 tokens."""
    monkeypatch.setattr(flux_pipeline, "MAX_T5_TOKENS", 16)

    def load():
        paddle.seed(0)
        return GarmentClassifier()

    monkeypatch.setattr(evaluate_module.GarmentClassifier, "load", staticmethod(load))


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


def test_shares_are_counted_against_the_captions(monkeypatch):
    """A judge that says "red shirt" of every drawing and "dotted blue hat" of every (black) sample is
    right as often as those are wanted. The calls show that a batch has the seed of its first picture."""
    of_drawings = {"kind": "shirt", "colour": "red", "pattern": "plain"}
    of_samples = {"kind": "hat", "colour": "blue", "pattern": "dots"}
    rng = np.random.default_rng(0)

    def judge(_, pictures):
        said = of_samples if pictures[0].getextrema() == ((0, 0),) * 3 else of_drawings
        answers = {name: np.array([value] * len(pictures)) for name, value in said.items()}
        return answers | {"features": rng.standard_normal((len(pictures), 3))}

    class Painter:
        """Stands for the pipeline: notes captions and seeds, draws black, and its autoencoder loses 0.1."""

        calls = []

        def set_progress_bar_config(self, desc):
            pass

        def __call__(self, captions, num_inference_steps, guidance_scale, seed, height, width):
            assert guidance_scale == 2.5
            self.calls.append((num_inference_steps, seed, len(captions)))
            pictures = [Image.new("RGB", (width, height), "black") for _ in captions]
            return type("Output", (), {"images": pictures})

        def encode_image(self, pixels):
            return pixels

        def decode_latents(self, latents):
            return latents * 0.9

    painter = Painter()
    monkeypatch.setattr(evaluate_module, "classify", judge)
    monkeypatch.setattr(evaluate_module.FluxPipeline, "from_pretrained", lambda _: painter)
    scores, samples = evaluate("anything", 7, 3, guidance_scale=2.5)
    assert len(samples) == 7
    assert painter.calls == [(4, 0, 3), (4, 3, 3), (4, 6, 1), (28, 0, 3), (28, 3, 3), (28, 6, 1)]
    wanted = held_out_garments(7)
    for where, said in (("drawings", of_drawings), ("4 steps", of_samples), ("28 steps", of_samples)):
        for name, value in said.items():
            share = sum(getattr(garment, name) == value for garment in wanted) / 7
            assert scores[f"{name}, {where}"] == pytest.approx(share)


def test_captions_are_those_that_pretraining_left_out(monkeypatch):
    trained, held_out = garments.split_garments()
    captions = []

    def note(self, prompt, **_):
        captions.extend(prompt)
        return type("Output", (), {"images": [Image.new("RGB", (64, 64)) for _ in prompt]})

    monkeypatch.setattr(evaluate_module.FluxPipeline, "__call__", note)
    evaluate(str(FIXTURE), 4, 4)
    assert len(captions) == 2 * 4 and captions[:4] == captions[4:]  # the same ones at 4 and at 28 steps
    assert set(captions) <= {garment.caption for garment in held_out}
    assert not set(captions) & {garment.caption for garment in trained}


def test_sheet_fills_rows_from_the_left():
    colours = [(i, 0, 0) for i in range(5)]
    picture = sheet([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert picture.size == (12, 6)
    assert [picture.getpixel((x, y)) for y in (0, 3) for x in (0, 4, 8)] == [*colours, (255, 255, 255)]
