"""`accuracy weights`: a line per Linear and the output's error, printed and as JSON."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ppcoat.bench import accuracy
from ppcoat.cli.main import main

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny_flux_fp32"


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr(accuracy, "tune_host", lambda: None)


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
        assert main(["accuracy", "weights", "--model", str(FOLDER), "--no_output", "--base", base]) == 0
        means.append(float(re.search(r"mean (\d\.\d+)", capsys.readouterr().out)[1]))
    assert means == sorted(means) and means[2] < 0.85 * means[3]


def test_the_output_can_be_left_out(capsys):
    assert main(["accuracy", "weights", "--model", str(FOLDER), "--no_output"]) == 0
    assert "random inputs" not in capsys.readouterr().out


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path, capsys):
    assert main(["accuracy", "weights", "--model", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "model_index.json is missing" in shown and shown.count("\n") == 1


def test_a_model_file_has_the_errors_of_its_folder(capsys):
    tables = []
    for name in ("transformer", "flux_bfl_bf16.safetensors"):
        model = str(FOLDER.parent / "single_file" / name)
        assert main(["accuracy", "weights", "--model", model, "--no_output", "--base", "nf4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum("s of CPU time a GB" in line for line in lines) == 1
        tables.append(sorted(line for line in lines if "CPU time" not in line))
    assert tables[0] == tables[1] and len(tables[0]) > 30
