"""Demonstrations: pairs that are in place, judges that are right about true drawings, whole small runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ppcoat.bench.demo as demo
import ppcoat.bench.quickstart as quickstart_module
from ppcoat.bench import demo_editing
from ppcoat.bench.demo import Measure, measures_table
from ppcoat.bench.demo_editing import (
    Edit,
    TryOn,
    edit_pairs,
    edit_rates,
    overlap,
    overlap_of_changes,
    recognised,
    seen_on,
    silhouette,
    worn_pairs,
    worn_rates,
)
from ppcoat.bench.flags import DEMOS
from ppcoat.cli.main import run
from ppcoat.config.flags import CONFIGS
from ppcoat.config.load import load_config
from ppcoat.data.figures import draw_figure
from ppcoat.data.garments import KINDS
from ppcoat.models.flux import prompt_encoding

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"


def array(picture):
    return np.asarray(picture, np.int32)


def test_a_table_says_what_was_wanted_and_missed():
    rows = [
        Measure("kind", 0.79, at_least=0.8),
        Measure("star", 0.1, at_most=0.1),
        Measure("far", 2.5, unit="px"),
    ]
    lines = [line.split() for line in measures_table(rows).splitlines()]
    assert lines == [
        ["measure", "wanted", "found"],
        ["kind", "at", "least", "80%", "79%", "missed"],
        ["star", "at", "most", "10%", "10%"],
        ["far", "2.50", "px"],
    ]


def test_edits_are_in_place_and_say_no_kind():
    pairs = edit_pairs(12, 3, unseen=False)
    assert pairs == edit_pairs(12, 3, unseen=False)
    for pair in pairs:
        assert not any(kind in pair.prompt for kind in KINDS)
        (before,), after = pair.references, pair.wanted
        changed = np.abs(array(before) - array(after)).sum(-1) > 30
        assert 0.01 < changed.mean() < 0.8
        assert not changed[[0, 0, -1, -1], [0, -1, 0, -1]].all(), "the background changed"
    seen, unseen = ({pair.garment for pair in edit_pairs(300, 3, each)} for each in (False, True))
    assert len(seen) == 36 and len(unseen) == 12 and not seen & unseen


def test_the_judge_of_edits_is_right_about_true_drawings():
    pairs = edit_pairs(24, 5, unseen=True)
    assert min(edit_rates(pairs, [pair.wanted for pair in pairs]).values()) > 0.94
    unchanged = edit_rates(pairs, [pair.references[0] for pair in pairs])
    assert unchanged["kind kept"] > 0.9 and unchanged["add a star: star found"] < 0.06
    assert unchanged["make it ...: colour as asked"] < 0.06
    assert overlap_of_changes(pairs, [pair.wanted for pair in pairs]) == 1.0
    assert overlap_of_changes(pairs, [pair.references[0] for pair in pairs]) == 0.0
    turned = edit_rates(pairs, [pair.wanted for pair in pairs[1:] + pairs[:1]])
    assert turned["kind kept"] < 0.4


def test_the_judge_of_figures_is_right_about_true_drawings():
    pairs = worn_pairs(6, 5, unseen=True)
    seen = seen_on(pairs, [pair.wanted for pair in pairs])
    rates, places = worn_rates(pairs, seen)
    assert places == 1.0 and set(rates.values()) == {1.0}
    others = [*pairs[1:], pairs[0]]
    chance, places = worn_rates(others, seen)
    same = [one.garment.kind == other.garment.kind for one, other in zip(pairs, others, strict=True)]
    assert chance["kind recognised"] == np.mean(same) and chance["pose kept"] == 0
    assert 0.38 < places < 0.5, "whatever their backgrounds"
    bare, places = worn_rates(pairs, seen_on(pairs, [draw_figure(pair.pose, None) for pair in pairs]))
    assert bare == {"kind recognised": 0, "colour recognised": 0, "pose kept": 1} and places < 0.95
    noise = np.random.default_rng(0)
    for pair in pairs[:3]:
        other = KINDS[(KINDS.index(pair.garment.kind) + 1) % 6]
        worn = replace(pair, garment=replace(pair.garment, kind=other)).wanted
        rough = Image.fromarray(
            (array(worn) + noise.normal(0, 12, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        )
        assert recognised(rough, pair).kind == other


def test_another_pose_is_another_place():
    """Of 300 such neighbours 3 reach the bound, one of them among these 15."""
    pairs = worn_pairs(16, 6, unseen=True)
    reached = []
    for pair, other in zip(pairs[:-1], pairs[1:], strict=True):
        moved = replace(other.pose, background=pair.pose.background)
        found = silhouette(draw_figure(moved, pair.garment, pair.seed), pair)
        reached.append(overlap(found, silhouette(pair.wanted, pair)) >= demo_editing.SAME_PLACE)
    assert sum(reached) <= 1


def test_every_demonstration_has_its_config():
    for name in DEMOS:
        config = load_config(CONFIGS / f"demo_{name}.yaml")
        assert config.output_dir == f"output/demo/{name}" and config.model.name_or_path.endswith("tiny_flux")


@pytest.mark.parametrize("name", ["edit", pytest.param("try_on", marks=pytest.mark.slow)])
def test_a_whole_small_run(name, tmp_path, monkeypatch, one_process, capsys):
    monkeypatch.setattr(demo, "tune_host", lambda: None)
    monkeypatch.setattr(prompt_encoding, "MAX_T5_TOKENS", 16)
    one_process(quickstart_module)
    for each in (Edit, TryOn):
        monkeypatch.setattr(each, "count", 4)
    settings = {
        "model.name_or_path": FIXTURE,
        "device": "cpu",
        "train.steps": 2,
        "train.batch_size": 2,
        "network.linear": 2,
        "sample.sample_steps": 1,
        "logging.visualdl": "false",
    }
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    assert run("demo", [name, "--samples", "2", "--output_dir", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    assert "1 of 3" in printed and "2 of 3: training 2 steps" in printed and "kind" in printed
    references = 1 if name == "edit" else 2
    assert Image.open(tmp_path / name / f"{name}.png").size == (70 + 2 * 128, 16 + (references + 2) * 128)
    assert (tmp_path / name / f"{name}_lora" / "config.yaml").exists()
    assert len(list((tmp_path / name / "data").iterdir())) == 2 + references  # the sign, too


def test_wrong_calls_are_refused_and_remove_nothing(tmp_path, capsys):
    photo = tmp_path / "edit" / "data" / "wedding.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"the only copy")
    flags = ["--output_dir", str(tmp_path), "--set", f"model.name_or_path={FIXTURE}"]
    assert run("demo", ["edit", *flags]) == 2
    assert "is not from an earlier call" in capsys.readouterr().err and photo.exists()
    assert run("demo", ["edit", "--samples", "0", *flags]) == 2
    assert "--samples 0: wanted at least 1" in capsys.readouterr().err
