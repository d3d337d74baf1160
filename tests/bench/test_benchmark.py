"""The benchmark: one real run of two processes, read from all sides; and flags that are refused."""

import argparse
import json
import math

import numpy as np
import pytest
from PIL import Image

from ppcoat.bench import benchmark
from ppcoat.bench.flags import add_benchmark_arguments
from ppcoat.cli.main import main
from ppcoat.config.flags import from_flags

STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fork_children):
    """A tiny run through the command line -> (its folder, stdout)."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("benchmark")
    flags = (
        "--hidden_size 64 --num_layers 2 --batch_size 2 --tokens 64 --text_tokens 16 --rank 4 --device cpu"
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        fork_children(patch)
        output = str(folder / "new" / "results.json")
        status = main(["benchmark", *flags.split(), "--num_steps", str(STEPS), "--use_fp8_activation",
                       "--output", output])  # fmt: skip
    assert status == 0
    return folder / "new", printed.getvalue()


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[0] / "results.json").read_text(encoding="utf-8"))


def test_json_holds_settings_machine_and_every_step(report):
    assert report["settings"]["hidden_size"] == 64 and report["settings"]["policy"] == "coat"
    assert report["environment"]["device"] == "cpu" and report["environment"]["cores"] >= 1
    assert report["model"]["double_blocks"] == report["model"]["single_blocks"] == 1
    assert report["model"]["picture_pixels"] == [128, 128]
    for variant in report["variants"].values():
        assert len(variant["steps"]) == STEPS
        assert all(math.isfinite(step["loss"]) and step["milliseconds"] > 0 for step in variant["steps"])


def test_processes_take_turns_and_never_run_parallel(report):
    spans = sorted(
        (step["started_at"], step["started_at"] + step["milliseconds"] / 1e3, name)
        for name, variant in report["variants"].items()
        for step in variant["steps"]
    )
    assert [name for _, _, name in spans] == ["standard", "coat"] * STEPS
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))


def test_bytes_are_those_of_adamw_and_of_coat(report):
    standard, coat = report["variants"]["standard"], report["variants"]["coat"]
    assert (standard["optimizer"], standard["policy"]) == ("AdamW", "none")
    assert (coat["optimizer"], coat["policy"]) == ("FP8AdamW", "coat")
    assert standard["optimizer_bytes"] == 8 * report["model"]["trained_parameters"]
    assert 2.06 < coat["optimizer_bytes"] / report["model"]["trained_parameters"] < 2.3
    for key in ("bytes_kept", "bytes_kept_bf16"):
        assert 0 < coat[key] < 0.7 * standard[key]
    assert 0.4 < standard["bytes_kept_bf16"] / standard["bytes_kept"] < 0.6
    for variant in (standard, coat):
        assert variant["peak_bytes"] - variant["loaded_bytes"] == variant["growth_bytes"] > 0


def test_summaries_follow_from_the_steps(report):
    finals = {}
    for name, variant in report["variants"].items():
        times = [step["milliseconds"] for step in variant["steps"][1:]]  # of three, the first only warms up
        assert variant["step_ms"]["min"] == min(times)
        assert variant["step_ms"]["median"] == pytest.approx(sum(times) / 2)
        assert variant["step_ms"]["min"] <= variant["step_ms"]["q1"] <= variant["step_ms"]["q3"] <= max(times)
        finals[name] = np.mean([step["loss"] for step in variant["steps"]])
        assert variant["final_loss"] == pytest.approx(finals[name])
    difference = report["comparison"]["final_loss_relative_difference"]
    assert difference == pytest.approx(finals["coat"] / finals["standard"] - 1) and abs(difference) < 1e-3
    firsts = [variant["steps"][0]["loss"] for variant in report["variants"].values()]
    assert firsts[0] == firsts[1]  # same weights, same data


def test_the_table_shows_the_measured_numbers(finished, report):
    printed = finished[1]
    assert f"{report['model']['parameters']:,} parameters" in printed
    assert "128 x 128 pixels" in printed
    rows = {line[:44].strip(): line[44:].split() for line in printed.splitlines()}
    coat = report["variants"]["coat"]
    assert rows["optimizer states, bytes per parameter"][:2] == ["8.000", "2.078"]
    assert rows["step, ms: median"][1] == f"{coat['step_ms']['median']:.1f}"
    assert rows["peak resident (with Python), MiB"][1] == f"{coat['peak_bytes'] / 2**20:.1f}"
    assert "expected" not in printed


def test_the_plot_is_beside_the_json(finished):
    with Image.open(finished[0] / "results.png") as picture:
        assert picture.width > 800 and picture.height > 300
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours}  # bars of both variants
    assert sorted(path.name for path in finished[0].iterdir()) == ["results.json", "results.png"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden_size", "100"], ["hidden_size", "100", "64"]),
        (["--num_layers", "0"], ["num_layers", "at least 1"]),
        (["--num_steps", "0"], ["num_steps", "at least 1"]),
        (["--policy", "coat"], ["--policy coat", "--use_fp8_activation"]),
        (["--policy", "cota", "--use_fp8_activation"], ["'cota'", "'coat'"]),
        (["--policy", "coat+recompute", "--use_fp8_activation", "--full_training"], ["full_training"]),
        (["--memory_budget_gb", "0"], ["memory_budget_gb", "positive"]),
        (["--memory_budget_gb", "nan"], ["memory_budget_gb", "nan"]),
        (["--output", "results.txt"], ["--output", "results.txt", ".json"]),
    ],
)
def test_wrong_flags_are_answered_in_one_line_before_anything_runs(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "run_interleaved", None)
    monkeypatch.setattr(benchmark, "measured_peak", None)
    assert main(["benchmark", *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert all(word in shown.err for word in words)


def test_output_inside_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["benchmark", "--output", str(tmp_path / "file" / "new" / "x.json")]) == 2
    assert "is a file" in capsys.readouterr().err


def cases_of(*flags):
    parser = argparse.ArgumentParser()
    add_benchmark_arguments(parser)
    arguments = parser.parse_args(flags)
    return benchmark.cases_of(
        from_flags(benchmark.BenchmarkCase, arguments), from_flags(benchmark.BenchmarkFlags, arguments)
    )


def test_flags_become_cases():
    cases = cases_of("--seed", "3", "--use_fp8_activation", "--full_training")
    standard, coat = cases["standard"], cases["coat"]
    sizes = (standard.hidden_size, standard.num_layers, standard.batch_size, standard.tokens)
    assert sizes == (1024, 8, 4, 256) and standard.seed == coat.seed == 3
    assert standard.full_training and coat.full_training
    assert (standard.fp8_states, standard.policy) == (False, "none")
    assert (coat.fp8_states, coat.policy) == (True, "coat")
    without = cases_of()["coat"]
    assert (without.fp8_states, without.policy) == (True, "none")


def test_batches_are_searched_for_each_variant(monkeypatch):
    """1 GB and 0.5 GB per picture over 2 GB; the third batch size is one that the line predicts."""
    slopes = {False: 1.0e9, True: 0.5e9}
    monkeypatch.setattr(
        benchmark, "measured_peak", lambda case, budget: 2e9 + slopes[case.fp8_states] * case.batch_size
    )
    found = benchmark.search_batches(cases_of(), 6.2)
    assert (found["standard"]["batch"], found["coat"]["batch"]) == (4, 8)
    assert list(found["coat"]["measured_peak_bytes"]) == ["1", "2", "8"]
    text = benchmark._search_text("coat", found["coat"])
    assert "within 6.2 GB is 8" in text and "that 9 does not fit is predicted" in text
    assert "8: 6.000 GB" in text
    with pytest.raises(benchmark.ConfigError, match="2.4 is too small, a batch of 1 takes 2.50 GB"):
        benchmark.search_batches(cases_of(), 2.4)


def test_out_of_memory_is_answered_in_one_line(monkeypatch, capsys):
    def full(*_):
        raise MemoryError("a measuring process got no more")

    monkeypatch.setattr(benchmark, "run_interleaved", full)
    assert main(["benchmark"]) == 2
    assert "out of memory" in (error := capsys.readouterr().err) and "--batch_size" in error


def test_what_was_not_measured_is_a_dash():
    assert benchmark._row("peak", None, None, 1, ".1f").split() == ["peak", "-", "-"]
