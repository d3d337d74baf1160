"""Scores of folders of pictures with features that can be computed by hand, prompts, the table, refusals."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import ppcoat.infer.evaluate as evaluate_module
from ppcoat.cli.main import run
from ppcoat.errors import ConfigError
from ppcoat.infer.evaluate import (
    FolderScores,
    features_named,
    folder_table,
    own_prompt,
    prompts_of,
    score_folders,
)
from ppcoat.infer.garment_scores import GarmentClassifier, pictures_to_tensor


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr(evaluate_module, "tune_host", lambda: None)


def fill(folder, colours, prompt="a {}"):
    folder.mkdir()
    for i, colour in enumerate(colours):
        note = PngInfo()
        note.add_itxt("prompt", prompt.format(i))
        Image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{i:03d}.png", pnginfo=note)
    return folder


def mean_colour(pictures):
    return np.stack([np.asarray(picture, np.float32).mean((0, 1)) for picture in pictures])


class Judge:
    """Stands for CLIP: a picture's embedding is its colour, that of "a <i>" the colour wanted of it."""

    def __init__(self, wanted):
        self.wanted = wanted

    def embed_pictures(self, pictures):
        return mean_colour(pictures)

    def embed_prompts(self, prompts):
        return np.array([self.wanted[int(prompt.split()[1])] for prompt in prompts], np.float32)


def test_distances_and_cosines_are_those_of_the_pictures(tmp_path):
    rng = np.random.default_rng(0)
    reference, near, far = (rng.integers(40, 200, (9, 3)) for _ in range(3))
    folders = {"near": fill(tmp_path / "n", near), "far": fill(tmp_path / "f", far)}
    goal = fill(tmp_path / "goal", reference)
    found = score_folders(folders, goal, mean_colour, Judge(far), batch_size=4)

    for score, colours in zip(found, (near, far), strict=True):
        a, b = colours.astype(float), reference.astype(float)
        s1, s2 = np.cov(a.T), np.cov(b.T)
        roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
        distance = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * roots
        assert score.frechet == pytest.approx(distance, rel=1e-5)
        cosines = (a * far).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(far, axis=1)
        assert score.clip == pytest.approx(cosines.mean(), abs=1e-6)
    assert [score.method for score in found] == ["near", "far"] and found[1].clip == pytest.approx(1)
    (only,) = score_folders({"near": folders["near"]}, None, None, Judge(far))
    assert only.frechet is None and only.clip == found[0].clip
    (same,) = score_folders({"goal": goal}, goal, mean_colour, None)
    assert 0 <= same.frechet < 1e-6  # not below
    fill(tmp_path / "n" / "sheet", near[:1])  # generate's contact sheet is none of the pictures
    next((tmp_path / "n" / "sheet").glob("*.png")).rename(tmp_path / "n" / "contact.png")
    (tmp_path / "n" / "pictures.jsonl").write_text("")
    (again,) = score_folders({"near": folders["near"]}, goal, mean_colour, None)
    assert again.frechet == found[0].frechet


def test_a_prompt_is_beside_the_picture_in_it_or_in_a_list(tmp_path):
    folder = fill(tmp_path / "p", [(1, 2, 3)] * 2, prompt="inside {}")
    files = sorted(folder.glob("*.png"))
    files[0].with_suffix(".txt").write_text("beside\n")
    assert prompts_of(files, None) == ["beside", "inside 1"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\nsecond\n")
    assert prompts_of(files, prompts) == ["first", "second"]
    prompts.write_text("first\n")
    with pytest.raises(ConfigError, match="has 1 prompts for 2 pictures"):
        prompts_of(files, prompts)
    Image.new("RGB", (4, 4)).save(folder / "bare.jpg")
    with pytest.raises(ConfigError, match="bare.jpg has no prompt: give --prompts"):
        own_prompt(folder / "bare.jpg")


def test_the_table_has_flux_lightnings_form():
    scores = [FolderScores("FLUX-Lightning (ours)", 8.0182, 0.3294), FolderScores("TDD", 18.383, None)]
    assert folder_table(scores, "inception").splitlines() == [
        "| Method                | FID-FLUX ↓ | CLIP ↑ |",
        "|-----------------------|------------|--------|",
        "| FLUX-Lightning (ours) | 8.0182     | 0.3294 |",
        "| TDD                   | 18.3830    | -      |",
    ]
    assert "| Frechet (garments) ↓ |" in folder_table(scores, "garments")


def test_garment_features_are_the_classifiers():
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    wanted = GarmentClassifier.load().features(pictures_to_tensor(pictures)).numpy()
    np.testing.assert_array_equal(features_named("garments", None, None)(pictures), wanted)


def test_the_command_prints_the_table_and_warns_of_few_pictures(tmp_path, capsys):
    rng = np.random.default_rng(0)
    student, teacher = (fill(tmp_path / name, rng.integers(0, 256, (4, 3))) for name in "st")
    output = tmp_path / "scores.json"
    flags = f"--pictures Student={student} {teacher} --references {teacher} --output {output}"
    assert run("evaluate", flags.split()) == 0
    said = capsys.readouterr().out
    rows = [line.split("|")[1:4] for line in said.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["Method", "Student", "t"]
    assert rows[0][1].strip() == "Frechet (garments) ↓"
    scores = json.loads(output.read_text())
    assert scores[0]["frechet"] > 1 and scores[1]["frechet"] == pytest.approx(0, abs=1e-3)
    assert scores[0]["clip"] is None
    assert "4 pictures for 128 features" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pictures A", "nothing to score --pictures by"),
        ("--pictures nowhere --references A", "no folder of pictures at nowhere"),
        ("--pictures A --references EMPTY", "has 0 pictures"),
        ("--pictures A A --references A", "have one name"),
        ("--pictures A --references A --batch_size 0", "batch_size: came 0"),
        ("--pictures A --references A --features inception", "give --inception <file.safetensors>"),
        ("--pictures A --references A --features clip", "give --clip <folder of a CLIP>"),
        ("--pictures A --clip nowhere", "config.json is missing: give the local folder of a CLIP"),
        ("--pictures TORN --references A", "1.png: the picture cannot be decoded"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
    fill(tmp_path / "A", [(1, 2, 3)] * 2)
    (tmp_path / "EMPTY").mkdir()
    torn = fill(tmp_path / "TORN", [(1, 2, 3)] * 2)
    whole = (torn / "001.png").read_bytes()
    (torn / "001.png").write_bytes(whole[: len(whole) // 2])
    flags = re.sub(r"\b(A|EMPTY|TORN)\b", lambda match: str(tmp_path / match[0]), flags)
    assert run("evaluate", flags.split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
