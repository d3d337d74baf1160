"""parity: which runs it makes, that it goes on where it stopped, and what its table says."""

import json
from pathlib import Path

import pytest

import ppcoat.bench.parity as parity
from ppcoat.bench.parity import parity_table
from ppcoat.cli.main import run


@pytest.fixture
def trained(monkeypatch, one_process):
    """Configs of the runs made; nothing is trained."""
    configs = []

    def train(config):
        configs.append(config)
        return {"loss": 0.5, "kept_mib": 1.0, "seconds": 1.0}

    monkeypatch.setattr(parity, "tune_host", lambda: None)
    one_process(parity)
    monkeypatch.setattr(parity, "trained", train)
    monkeypatch.setattr(parity, "rate_of", lambda config, samples: samples / 100)
    monkeypatch.setattr(parity, "draw_data", lambda config: Path(config.data.folder_path).mkdir(parents=True))
    return configs


def call(folder, *more):
    short = ["--steps", "7", "--set", "train.lr_warmup_steps=0", "--samples", "50"]
    return run("parity", [*short, "--output_dir", str(folder), *more])


def test_every_policy_and_seed_with_the_same_data(trained, tmp_path):
    assert call(tmp_path / "out", "--seeds", "3", "4") == 0
    assert [(c.seed, c.coat.enabled, c.coat.activation.policy) for c in trained] == [
        (seed, enabled, policy)
        for seed in (3, 4)
        for enabled, policy in (
            (False, "coat"),
            (True, "coat"),
            (True, "coat+recompute"),
            (True, "coat+recompute+attention"),
        )
    ]
    assert {c.train.steps for c in trained} == {7} and len({c.run_dir for c in trained}) == 8
    assert {c.data.folder_path for c in trained} == {str(tmp_path / "out" / "data")}


def test_it_goes_on_after_a_stop_and_refuses_other_settings(trained, tmp_path, capsys):
    assert call(tmp_path, "--seeds", "0") == 0
    content = json.loads((tmp_path / "parity.json").read_text())
    del content["results"]["coat/0"]
    (tmp_path / "parity.json").write_text(json.dumps(content))
    trained.clear()
    assert call(tmp_path, "--seeds", "0") == 0
    assert [c.coat.activation.policy for c in trained] == ["coat"]
    assert call(tmp_path, "--set", "train.lr=1e-3") == 2
    assert "parity.json has results of other settings" in capsys.readouterr().err
    assert call(tmp_path, "--steps", "0") == 2


def test_another_number_of_samples_is_drawn_again_without_training(trained, tmp_path):
    assert call(tmp_path, "--seeds", "0") == 0
    trained.clear()
    assert call(tmp_path, "--seeds", "0", "--samples", "80") == 0
    results = json.loads((tmp_path / "parity.json").read_text())["results"]
    assert not trained and {(r["motif"], r["samples"], r["loss"]) for r in results.values()} == {
        (0.8, 80, 0.5)
    }


def test_table_gives_means_and_the_furthest_difference():
    losses = {"float32": (0.5, 0.4), "coat": (0.505, 0.396)}
    results = {
        f"{policy}/{seed}": {
            "loss": losses.get(policy, losses["float32"])[seed],
            "motif": motif,
            "kept_mib": 2.0,
        }
        for policy, motif in (
            ("float32", 0.8),
            ("coat", 0.83),
            ("coat+recompute", 0.78),
            ("coat+recompute+attention", 0.8),
        )
        for seed in (0, 1)
    }
    rows = parity_table(results, [0, 1]).splitlines()
    assert rows[1].split() == ["float32", "0.4500", "+0.00%", "80.0%", "+0.0", "+0.0", "2.00"]
    assert rows[2].split() == ["coat", "0.4505", "+1.00%", "83.0%", "+3.0", "+3.0", "2.00"]
    assert rows[3].split()[-3:] == ["-2.0", "-2.0", "2.00"]
