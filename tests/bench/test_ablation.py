"""The ablation: each student has its losses and as many LoRA steps, and is trained once."""

import json
from types import SimpleNamespace

import pytest

from ppcoat.bench import ablation
from ppcoat.cli.main import run
from ppcoat.infer.garment_scores import SampleScores


@pytest.fixture
def trained(monkeypatch, one_process):
    """Configs of the students that were trained; nothing is trained or drawn."""
    configs = []

    def train(config):
        configs.append(config)
        run = config.run_config(config.data_path)
        file = run.run_dir / f"{run.name}.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        return SimpleNamespace(lora_file=file)

    def compare(model, files, count, batch_size):
        assert all(file.exists() for file in files.values())
        rows = [
            SampleScores("teacher", 28, 0.9, 0.8, 0.7, 0.0),
            SampleScores("teacher", 4, 0.9, 0.8, 0.7, 8.0),
        ]
        return rows + [SampleScores(name, 4, 0.9, 0.8, 0.7, 2.0) for name in files], []

    monkeypatch.setattr(ablation, "train_flux_lightning", train)
    monkeypatch.setattr(ablation, "compare_students", compare)
    monkeypatch.setattr(ablation, "tune_host", lambda: None)
    one_process(ablation)
    return configs


def command(folder, *more) -> int:
    flags = ["--data_path", "pictures", "--output_dir", str(folder), "--lora_steps", "30", *more]
    return run("ablation", flags)


def test_every_student_has_one_loss_more_and_as_many_lora_steps(tmp_path, trained, capsys):
    assert command(tmp_path) == 0
    losses = [(c.adv_weight, c.use_dmd_loss, c.apply_reflow_loss) for c in trained]
    assert losses == [(0, False, False), (0.02, False, False), (0.02, True, False), *[(0.02, True, True)] * 2]
    assert [config.generator_steps for config in trained] == [30] * 5
    assert [config.max_train_steps for config in trained] == [30, 60, 60, 60, 60]
    assert len({config.phase_delta for config in trained}) == 2, "the last one has the published behaviour"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == [
        "all,",
        "--compat",
        "reference,",
        "4",
        "steps",
        *(["90.0%", "80.0%", "70.0%", "2.00", "0.25"]),
    ]
    assert len(json.loads((tmp_path / "ablation.json").read_text())["scores"]) == 7


def test_a_second_call_finds_its_students_and_refuses_others(tmp_path, trained, capsys):
    assert command(tmp_path) == 0 and command(tmp_path) == 0
    assert len(trained) == 5
    assert command(tmp_path, "--seed", "1") == 0  # students of their own
    assert len(trained) == 10
    assert command(tmp_path, "--model", "another") == 2
    assert "students of other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lora_steps", "--samples"])
def test_numbers_below_1_are_refused(tmp_path, trained, flag, capsys):
    assert command(tmp_path, flag, "0") == 2
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err and not trained
