"""demo inpaint and demo style: their data, what judges them on true drawings, and small whole runs."""

import numpy as np
import pytest
from PIL import Image

import ppcoat.bench.demo as demo_module
import ppcoat.bench.demo_pictures as pictures_module
import ppcoat.bench.quickstart as quickstart_module
from ppcoat.bench.demo_pictures import (
    Inpaint,
    Style,
    border_steps,
    change_outside,
    is_pen,
    on_paper,
    style_rates,
    unseen,
)
from ppcoat.cli.main import run
from ppcoat.models.flux import prompt_encoding
from tests.conftest import FIXTURE

ONES = unseen(0, 12)


def pixels(picture):
    return np.asarray(picture, np.int32)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(pictures_module, "PICTURES", 3)


@pytest.mark.parametrize("demo", [Inpaint, Style])
def test_data_is_a_function_of_constants(tmp_path, few, demo):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        demo().write_data(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 6 + 3 * (demo is Inpaint)
    assert {str(path.parent) for path in files} == set(demo.folders.values())
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_the_mask_of_a_chest_holds_all_of_the_star_and_little_else():
    for one in ONES[:6]:
        changed = np.abs(pixels(one.picture) - pixels(one.starred)).sum(-1) > 30
        chest = pixels(one.chest) > 0
        assert changed.sum() > 50 and not (changed & ~chest).any()
        assert chest.sum() < 3.5 * changed.sum()


def test_a_pen_draws_the_same_garment_in_its_place():
    for one in ONES[:6]:
        drawn, silhouette = pixels(one.penned), one.silhouette
        assert 0.04 < silhouette.mean() < 0.6
        assert np.abs(drawn - 255 * pictures_module.PAPER).max(-1)[~silhouette].mean() < 30
        assert (drawn.sum(-1) < 250)[silhouette].mean() > 0.1, "no dark lines"


def test_the_judges_know_true_drawings():
    """As printed by the demonstration after the autoencoder, too: pens 100 %, others 0 %."""
    masks = [one.silhouette for one in ONES]
    pens = [one.penned for one in ONES]
    own, others = style_rates(pens, ONES, masks), style_rates(pens, ONES, masks[1:] + masks[:1])
    assert own["overlap"] > 0.8 and others["overlap"] < 0.6
    assert min(own["kind"], own["colour"]) >= 0.8 and own["star"] == 0
    assert own["pen"] == 1 and not any(is_pen(one.picture) for one in ONES)


def test_a_pen_drawing_without_lines_or_on_grey_is_none():
    picture, garment = pixels(ONES[0].penned), on_paper(ONES[0].penned)[..., None]
    flat = np.where(garment, 240, picture).astype(np.uint8)
    grey = np.where(garment, picture, 120).astype(np.uint8)
    assert not is_pen(Image.fromarray(flat)) and not is_pen(Image.fromarray(grey))


def test_change_and_steps_are_those_of_the_pixels():
    """A mask of the right half; 3 levels more on the left, and 40 beside the border."""
    before = np.zeros((16, 16, 3), np.uint8)
    after = before.copy()
    after[:, :4] += 3
    after[:, 8:] += 40
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    before, after = Image.fromarray(before), Image.fromarray(after)
    assert change_outside(before, after, mask, margin=4) == 3
    assert change_outside(before, after, mask, margin=2) == pytest.approx(2)
    assert (border_steps(before, mask), border_steps(after, mask)) == (0, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inpaint", "style"])
def test_a_whole_small_run(tmp_path, few, monkeypatch, one_process, capsys, name):
    monkeypatch.setattr(demo_module, "tune_host", lambda: None)
    monkeypatch.setattr(prompt_encoding, "MAX_T5_TOKENS", 16)
    monkeypatch.setattr(pictures_module, "STRENGTHS", (0.7,))
    one_process(quickstart_module)
    values = (
        f"model.name_or_path={FIXTURE}",
        "device=cpu",
        "train.steps=2",
        "train.batch_size=2",
        "network.linear=2",
        "sample.sample_steps=2",
        "logging.visualdl=false",
    )
    flags = [flag for value in values for flag in ("--set", value)]
    assert run("demo", [name, "--samples", "2", "--output_dir", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    with Image.open(tmp_path / name / f"{name}.png") as sheet:
        assert sheet.width == 70 + 2 * 128
    wanted = {"inpaint": "half of it filled: kind", "style": "LoRA on, strength 0.7: pen"}[name]
    assert f"{wanted} " in printed and "at least 80%" in printed
