"""What is scored of a tiny FLUX and of a student: counted right, on captions that nobody was trained on."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

import ppcoat.infer.garment_scores as garment_scores
from ppcoat.data import garments
from ppcoat.infer.garment_scores import (
    GuidanceScales,
    SampleScores,
    compare_students,
    comparison_table,
    evaluate,
    held_out_garments,
    sheet,
)
from ppcoat.infer.scores import frechet_distance
from ppcoat.lora import inject_lora, save_lora
from ppcoat.models.flux.pipeline import FluxPipeline

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"
pytestmark = pytest.mark.usefixtures("quick_and_untrained")


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

        def __call__(
            self, captions, num_inference_steps, guidance_scale, true_cfg_scale, seed, height, width
        ):
            assert (guidance_scale, true_cfg_scale) == (2.5, 1.5)
            self.calls.append((num_inference_steps, seed, len(captions)))
            pictures = [Image.new("RGB", (width, height), "black") for _ in captions]
            return type("Output", (), {"images": pictures})

        def encode_image(self, pixels):
            return pixels

        def decode_latents(self, latents):
            return latents * 0.9

    painter = Painter()
    monkeypatch.setattr(garment_scores, "classify", judge)
    monkeypatch.setattr(garment_scores.FluxPipeline, "from_pretrained", lambda _: painter)
    scores, samples = evaluate("anything", 7, 3, GuidanceScales(2.5, 1.5))
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

    monkeypatch.setattr(garment_scores.FluxPipeline, "__call__", note)
    evaluate(str(FIXTURE), 4, 4)
    assert len(captions) == 2 * 4 and captions[:4] == captions[4:]  # the same ones at 4 and at 28 steps
    assert set(captions) <= {garment.caption for garment in held_out}
    assert not set(captions) & {garment.caption for garment in trained}


def test_sheet_fills_rows_from_the_left():
    colours = [(i, 0, 0) for i in range(5)]
    picture = sheet([Image.new("RGB", (4, 3), colour) for colour in colours], columns=3)
    assert picture.size == (12, 6)
    assert [picture.getpixel((x, y)) for y in (0, 3) for x in (0, 4, 8)] == [*colours, (255, 255, 255)]


def test_students_are_compared_with_the_first_row(monkeypatch, tmp_path):
    """Teacher at 28 and 4 steps without a LoRA, students at 4 with theirs; distances are to the first row."""
    pipeline = FluxPipeline.from_pretrained(str(FIXTURE))
    layers = inject_lora(pipeline.transformer, rank=2, alpha=2.0, seed=0)
    for layer in layers.values():
        layer.lora_B.set_value(paddle.full(layer.lora_B.shape, 0.1))
    save_lora(tmp_path / "student.safetensors", pipeline.transformer)
    strengths, features, rng = [], [], np.random.default_rng(0)

    def note(self, prompt, num_inference_steps, **_):
        inside = [sub for sub in self.transformer.sublayers() if hasattr(sub, "lora_B")]
        strengths.append((num_inference_steps, bool(inside)))
        return type("Output", (), {"images": [Image.new("RGB", (64, 64)) for _ in prompt]})

    def judge(_, pictures):
        features.append(rng.standard_normal((len(pictures), 3)))
        facts = {name: np.array(["none"] * len(pictures)) for name in ("kind", "colour", "pattern")}
        return {**facts, "features": features[-1]}

    monkeypatch.setattr(garment_scores.FluxPipeline, "__call__", note)
    monkeypatch.setattr(garment_scores, "classify", judge)
    files = dict.fromkeys(("student", "another"), tmp_path / "student.safetensors")
    scores, pictures = compare_students(str(FIXTURE), files, 6, 6)
    assert strengths == [(28, False), (4, False), (4, True), (4, True)]
    assert [row.who for row in scores] == ["teacher", "teacher", "student", "another"]
    assert [len(row) for row in pictures] == [6, 6, 6, 6]
    wanted = [0.0] + [frechet_distance(found, features[0]) for found in features[1:]]
    assert [row.frechet for row in scores] == pytest.approx(wanted)


def test_the_table_says_what_part_of_the_distance_is_left():
    rows = [
        SampleScores("teacher", 28, 0.9, 0.8, 0.7, 0.0),
        SampleScores("teacher", 4, 0.8, 0.7, 0.6, 8.0),
        SampleScores("student", 4, 0.85, 0.75, 0.65, 2.0),
    ]
    lines = comparison_table(rows).splitlines()
    assert lines[-1] == "the student's distance is 0.25 of the teacher's at 4 steps"
    assert lines[2].split() == ["teacher,", "4", "steps", "80.0%", "70.0%", "60.0%", "8.00"]
