"""`accuracy weights`: a line per Linear and the output's error, printed and as JSON. `accuracy bases`: what
it measures and with what, that it goes on where it stopped, its table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ppcoat.bench import base_quality
from ppcoat.cli.main import main
from ppcoat.models.quantized_base import OutputErrors, WeightError

pytestmark = pytest.mark.usefixtures("encoders_read_once")

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"


BASES = ("fp8", "int8", "nf4", "fp4")


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr(base_quality, "tune_host", lambda: None)


def test_every_linear_has_a_line_and_the_output_has_one(tmp_path, capsys):
    file = tmp_path / "new" / "errors.json"
    assert main(["accuracy", "weights", "--model", str(FOLDER), "--output", str(file)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    rows = found["weights"]
    inside = 2 * 14 + 3 * 6
    assert sum(row["in_block"] for row in rows) == inside and len(rows) > inside
    assert f"{len(rows)} Linears, {inside} of them in blocks" in shown
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(f"{row['path']} "))
        assert line.endswith(f"{row['relative_rms']:.5f}") and str(row["shape"]) in line
        assert 0.015 < row["relative_rms"] < 0.035  # of E4M3: 2^-4 / sqrt(3) / 1.36, rounding of 3 bits
    seconds = sum(row["seconds"] for row in rows) / sum(2e-9 * np.prod(row["shape"]) for row in rows)
    assert seconds > 0 and f"reading and quantising: {seconds:.1f} s of CPU time a GB" in shown
    assert 0 < found["output"]["in_blocks"] < found["output"]["all_linears"] < 0.3
    assert f"{found['output']['all_linears']:.4f} with all Linears" in shown


def test_formats_keep_their_order(capsys):
    """Of the mean error of all Linears: int8, fp8, fp4, nf4."""
    means = []
    for base in ("int8", "fp8", "fp4", "nf4"):
        assert main(["accuracy", "weights", "--model", str(FOLDER), "--weights_only", "--base", base]) == 0
        means.append(float(re.search(r"mean (\d\.\d+)", capsys.readouterr().out)[1]))
    assert means == sorted(means) and means[2] < 0.85 * means[3]


def test_the_output_can_be_left_out(capsys):
    assert main(["accuracy", "weights", "--model", str(FOLDER), "--weights_only"]) == 0
    assert "random inputs" not in capsys.readouterr().out


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path, capsys):
    assert main(["accuracy", "weights", "--model", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "model_index.json is missing" in shown and shown.count("\n") == 1


def test_a_model_file_has_the_errors_of_its_folder(capsys):
    tables = []
    for name in ("transformer", "flux_bfl_bf16.safetensors"):
        model = str(FOLDER.parent / "single_file" / name)
        assert main(["accuracy", "weights", "--model", model, "--weights_only", "--base", "nf4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum("s of CPU time a GB" in line for line in lines) == 1
        tables.append(sorted(line for line in lines if "CPU time" not in line))
    assert tables[0] == tables[1] and len(tables[0]) > 30


@pytest.fixture
def measured(monkeypatch):
    """What `accuracy bases` measures, in order; nothing is computed."""
    done = []

    def note(name, made):
        def measure(*given, base=None, **_):
            done.append((name, base or given[-1]))
            return made(given, base or given[-1])

        return measure

    rows = [WeightError("a", [128, 256], 0.25, True, 1.0), WeightError("b", [128, 768], 0.5, True, 1.0)]
    monkeypatch.setattr(base_quality, "weight_errors", note("weights", lambda given, base: rows))
    outputs = note("output", lambda given, base: OutputErrors(0.125, 0.1))
    monkeypatch.setattr(base_quality, "output_errors", outputs)
    apart = {"false": 0.0, "false, other seeds": 3.0}  # the mean of the features; the distance is its square
    features = np.random.default_rng(0).standard_normal([6, 2])
    drawn = note("drawn", lambda given, row: features + np.array([apart.get(row, 2.0), 0.0]))
    monkeypatch.setattr(base_quality, "_drawn_features", drawn)
    loss = {"false": (0.5, 0.8), "int8": (0.51, 0.8)}
    trains = note(
        "trained", lambda given, run: {"loss": loss.get(run.model.quantize or "false", (1, 1))[run.seed]}
    )
    monkeypatch.setattr(base_quality, "trained", trains)
    monkeypatch.setattr(base_quality, "draw_data", lambda run: Path(run.data.folder_path).mkdir(parents=True))
    return done


def bases(folder, *more):
    return main(["accuracy", "bases", "--steps", "7", "--samples", "6", "--output_dir", str(folder), *more])


def test_every_format_is_measured_and_has_a_row(measured, tmp_path, capsys):
    assert bases(tmp_path / "out", "--seeds", "0", "1") == 0
    runs = [what for name, what in measured if name == "trained"]
    assert [(run.model.quantize or "false", run.seed) for run in runs] == [
        (base, seed) for seed in (0, 1) for base in ("false", *BASES)
    ]
    assert {run.train.steps for run in runs} == {7} and all(run.coat.enabled for run in runs)
    assert len({run.run_dir for run in runs}) == 10 and len({run.data.folder_path for run in runs}) == 1
    drawn = [what for name, what in measured if name == "drawn"]
    assert drawn == ["false", "false, other seeds", *BASES]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = {
        cells[0]: cells for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table[2:])
    }
    assert list(rows) == ["false", "false, other seeds", *BASES]
    assert rows["false"][5] == "0.6500" and rows["false, other seeds"][4] == "9.00"
    assert rows["int8"][1:] == ["8.25", "0.3750 (0.5000)", "0.125", "4.00", "0.6550", "+1.00 %", "+2.00 %"]


def test_bases_go_on_after_a_stop_and_refuse_other_settings(measured, tmp_path, capsys):
    assert bases(tmp_path, "--seeds", "0") == 0
    content = json.loads((tmp_path / "bases.json").read_text())
    del content["results"]["loss/fp4/0"], content["results"]["Frechet/nf4"]
    (tmp_path / "bases.json").write_text(json.dumps(content))
    measured.clear()
    assert bases(tmp_path, "--seeds", "0") == 0
    assert [name for name, _ in measured] == ["drawn", "trained"] and measured[0][1] == "nf4"
    assert bases(tmp_path, "--set", "train.lr=1e-3") == 2
    assert "bases.json has results of other settings" in capsys.readouterr().err
    for wrong in (
        ["--steps", "0"],
        ["--samples", "1"],
        ["--seeds", "-1"],
        ["--set", "model.name_or_path=no"],
    ):
        assert bases(tmp_path / "new", *wrong) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1, shown
    assert not (tmp_path / "new").exists()


def test_pictures_come_from_the_format_and_the_seeds_of_their_row(tmp_path, monkeypatch):
    monkeypatch.setattr(base_quality, "STEPS", 1)
    flags = base_quality.BaseFlags(samples=2, output_dir=str(tmp_path))
    config = base_quality.lora_config(flags, "false", 0)
    drawn = {
        row: base_quality._drawn_features(flags, config, row)
        for row in ("false", "false, other seeds", "nf4")
    }
    exact = drawn["false"]
    assert exact.shape == (2, 128) and exact.dtype == np.float64
    assert all(np.abs(drawn[row] - exact).max() > 0.1 for row in ("nf4", "false, other seeds"))
    assert len(list(tmp_path.glob("pictures *.png"))) == 3
