"""The full-size measurement, by the same code on a small model: written, trained, found again, deleted."""

import dataclasses
import json
import shutil

import numpy as np
import paddle
import pytest
from safetensors import safe_open

from ppcoat.bench import full_size
from ppcoat.bench.full_size import FullSizeCase
from ppcoat.cli.main import main
from ppcoat.errors import ConfigError
from ppcoat.lora import read_lora_file
from ppcoat.models.flux.transformer import FluxTransformer2DModel

SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 40,
    "axes_dims_rope": [8, 12, 12],
    "guidance_embeds": True,
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command with a small model -> its arguments, FullSizeCase."""
    monkeypatch.setattr("ppcoat.plan.model.FLUX_DEV", SMALL)
    monkeypatch.setattr(full_size, "tune_host", lambda: None)
    folder, output = tmp_path / "made", tmp_path / "new" / "numbers.json"
    flags = ["--folder", str(folder), "--text_tokens", "8", "--output", str(output)]
    return ["benchmark", "full_size", *flags], FullSizeCase(folder, text_tokens=8, settings=SMALL)


def numbers(arguments):
    with open(arguments[-1], encoding="utf-8") as file:
        return json.load(file)


def test_the_command_trains_twice_and_finds_what_it_wrote(small, capsys, caplog):
    arguments, case = small
    assert main(arguments) == 0
    first = numbers(arguments)
    shown = capsys.readouterr().out
    assert first["weights"]["what"] == "written" and first["loading"]["what"] == "quantised, copied"
    assert len(first["steps"]) == 2 and (case.folder / "transformer-fp4").is_dir()
    assert all(0.1 < step["loss"] < 10 and step["seconds"] > 0 for step in first["steps"])
    assert first["peak_bytes"] is None or first["peak_bytes"] >= max(s["peak_bytes"] for s in first["steps"])
    assert f"planned for the steps: {first['planned_peak_bytes'] / 1e9:.2f} GB" in shown
    file = read_lora_file(first["lora"]["file"])
    assert len(file.modules) == first["lora"]["modules"] == 2 * 12 + 2 * 5 and not file.unknown
    with safe_open(first["lora"]["file"], framework="np") as opened:
        assert all(name.startswith("transformer.") and ".lora_" in name for name in opened.keys())  # noqa: SIM118
    assert any(module.norm() > 0 for module in file.modules.values())

    assert main([*arguments, "--delete"]) == 0
    again = numbers(arguments)
    assert again["weights"]["what"] == "found" and again["loading"]["what"] == "from its copy"
    assert [s["loss"] for s in again["steps"]] == [s["loss"] for s in first["steps"]]
    assert not case.folder.exists() and not caplog.records


def test_only_the_flags_are_refused_that_make_no_sense(small, capsys):
    arguments, case = small
    for flag, value, said in (
        ("--steps", "0", "steps: came 0, wanted 1 to 1000"),
        ("--text_tokens", "513", "text_tokens: came 513, wanted 1 to 512"),
        ("--output", "x.txt", "must name a .json file"),
    ):
        assert main([*arguments, flag, value]) == 2
        shown = capsys.readouterr().err
        assert said in shown and shown.count("\n") == 1
    assert not case.folder.exists()


def test_a_full_disk_is_told_before_anything_is_written(small, capsys, monkeypatch):
    arguments, case = small
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "GB free: make room there" in shown and shown.count("\n") == 1
    assert not any(case.folder.iterdir())


def test_delete_leaves_what_it_has_not_made(small):
    _, case = small
    case.weights.mkdir(parents=True)
    (case.folder / "mine.txt").touch()
    full_size.delete(case)
    assert [path.name for path in case.folder.iterdir()] == ["mine.txt"]


def test_a_loss_that_is_not_finite_ends_it(small, monkeypatch, capsys):
    arguments, _ = small
    nothing = full_size.random_cache

    def with_nan(case):
        cache = nothing(case)
        return dataclasses.replace(cache, latents=[x * np.nan for x in cache.latents])

    monkeypatch.setattr(full_size, "random_cache", with_nan)
    assert main(arguments) == 1
    assert "step 1: loss nan or its gradient is not finite" in capsys.readouterr().err


def test_full_size_is_flux_dev_by_default(tmp_path):
    case = FullSizeCase(tmp_path, base="fp8")
    with paddle.LazyGuard():
        model = FluxTransformer2DModel(**case.settings)
    assert sum(p.size for p in model.parameters()) == 11_901_408_320
    planned = full_size.planned_phases(case)
    assert [phase.name for phase in planned] == ["forward, backward", "update"]
    assert 12.3e9 < max(phase.total for phase in planned) < 17e9
    four_bits = full_size.planned_phases(FullSizeCase(tmp_path))
    assert max(phase.total for phase in four_bits) < 10.3e9 and four_bits[0].parts["base"] < 6.71e9
    assert 11.90e9 < full_size._copy_bytes(planned, case) < 11.93e9
    cache = full_size.random_cache(case)
    assert cache.latents[0].shape == [16, 16, 16]
    assert [x.shape for x in cache.embeddings[full_size.CAPTION]] == [[64, 4096], [768]]


def test_numbers_out_of_range():
    with pytest.raises(ConfigError, match="seed: came -1"):
        FullSizeCase(None, seed=-1)


def test_the_peak_is_the_highest_that_the_system_told(monkeypatch, capsys):
    told = iter((3_000_000_000, 2_900_000_000))
    monkeypatch.setattr(full_size.HostMeter, "peak_memory", lambda self: next(told))
    watch = full_size._Watch()
    assert [watch.note(part)["peak_bytes"] for part in "ab"] == [3_000_000_000] * 2
    assert "peak so far 3.00 GB" in capsys.readouterr().out
