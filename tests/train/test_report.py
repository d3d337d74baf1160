"""Reports: exact log, resumed log, curves that VisualDL reads back, pictures, closing."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image
from visualdl import LogReader

from ppcoat.errors import ConfigError
from ppcoat.train import report as report_module
from ppcoat.train.report import Report, SigmaBins


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def curve(run, tag, kind="scalar"):
    points = []
    for path in sorted((run / "logs").glob("vdlrecords.*")):
        reader = LogReader(file_path=str(path))
        if tag in reader.get_tags().get(kind, []):
            points += [(each.id, each.value) for each in reader.get_data(kind, tag)]
    return points


def train(run, steps, start=0, total=6, **options):
    with Report(run, total, log_every=2, start_step=start, **options) as report:
        for step in range(start + 1, steps + 1):
            report.step(step, {"loss": 1 / step, "lr": 1e-3, "grad_norm": step * 0.1})
    return report


def test_every_step_is_logged_exactly(tmp_path):
    train(tmp_path, 6, visualdl=False)
    assert lines(tmp_path) == [
        {"step": s, "loss": 1 / s, "lr": 1e-3, "grad_norm": s * 0.1} for s in range(1, 7)
    ]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', "not json\n"])
def test_a_resumed_run_leaves_the_log_of_an_unbroken_one(tmp_path, tail):
    train(tmp_path / "whole", 6, visualdl=False)
    train(tmp_path / "parts", 4, visualdl=False)  # killed after 4, last checkpoint at 2
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write(tail)
    train(tmp_path / "parts", 6, start=2, visualdl=False)
    assert (tmp_path / "parts/log.jsonl").read_bytes() == (tmp_path / "whole/log.jsonl").read_bytes()
    train(tmp_path / "parts", 1, visualdl=False)  # a run from the start
    assert len(lines(tmp_path / "parts")) == 1


def test_lines_are_on_disk_while_the_run_goes_on(tmp_path):
    with Report(tmp_path, 2, visualdl=False) as report:
        report.step(1, {"loss": 1.0})
        assert len(lines(tmp_path)) == 1


def test_curves_have_every_second_step_and_the_last(tmp_path):
    train(tmp_path, 5, total=5)
    points = curve(tmp_path, "train/loss")
    assert [step for step, _ in points] == [2, 4, 5]
    np.testing.assert_allclose([value for _, value in points], [1 / 2, 1 / 4, 1 / 5], rtol=1e-6)
    assert [step for step, _ in curve(tmp_path, "train/grad_norm")] == [2, 4, 5]


def test_a_resumed_run_adds_to_the_curves(tmp_path):
    train(tmp_path, 2)
    train(tmp_path, 6, start=2)
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [2, 4, 6]


def test_images_are_saved_with_their_prompts(tmp_path):
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    with Report(tmp_path, 5) as report:
        paths = report.images(3, images, ["a dress", "裙子"])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "samples/000000003_00.png",
        "samples/000000003_01.png",
    ]
    with Image.open(paths[1]) as saved:
        assert saved.text["prompt"] == "裙子" and saved.getpixel((0, 0)) == (0, 0, 255)
    assert [step for step, _ in curve(tmp_path, "sample/01", "image")] == [3]


def test_smoothed_loss_is_a_weighted_mean(tmp_path):
    report = train(tmp_path, 5, visualdl=False)
    weights = 0.98 ** np.arange(4, -1, -1)
    losses = 1 / np.arange(1, 6)
    assert report.smoothed_loss == pytest.approx((weights * losses).sum() / weights.sum(), rel=1e-12)


def test_loss_that_is_not_finite_is_logged_and_does_not_poison_the_mean(tmp_path):
    with Report(tmp_path, 3, log_every=1, visualdl=False) as report:
        report.step(1, {"loss": 2.0, "lr": 1e-3})
        report.step(2, {"loss": float("nan"), "lr": 1e-3})
        report.step(3, {"loss": float("inf")})
    assert [line["loss"] for line in lines(tmp_path)] == [2.0, "nan", "inf"]
    assert report.smoothed_loss == 2.0


def test_the_bar_shows_loss_rate_and_speed(tmp_path, capsys):
    with Report(tmp_path, 2, log_every=1, visualdl=False) as report:
        report.step(1, {"loss": 0.5, "lr": 1e-3})
        report.step(2, {"loss": 0.5, "lr": 1e-3})
        report.message("hello")
    shown = capsys.readouterr().err
    assert "loss=0.5000 lr=1.00e-03" in shown and "2/2" in shown and "step/s" in shown and "hello" in shown


def test_everything_is_closed_when_training_fails(tmp_path):
    with pytest.raises(RuntimeError), Report(tmp_path, 3) as report:
        report.step(2, {"loss": 1.0})
        raise RuntimeError("out of memory")
    assert report._log.closed and report._bar.disable and report._curves._file_writer is None
    report.close()


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'visualdl'"), PermissionError(13, "Permission denied", "/.visualdl")],
)
def test_visualdl_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, error):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "visualdl":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="logging.visualdl: false"):
        Report(tmp_path, 3)
    Report(tmp_path, 3, visualdl=False).close()


def test_the_log_of_a_run_that_goes_on_ends_where_it_is_damaged(tmp_path):
    train(tmp_path, 3, visualdl=False)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes().split(b"\n")[0] + b'\n\xff\xfe\n{"step": 2}\n')  # as a disk returns it
    train(tmp_path, 4, start=3, visualdl=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]


def test_visualdl_is_not_imported_with_the_module(fresh_process):
    assert "ppcoat.train.report" in fresh_process["modules"] and "visualdl" not in fresh_process["modules"]


def test_bins_are_quarters_and_empty_themselves():
    bins = SigmaBins()
    bins.add([0.0, 0.2499, 0.25, 1.0], [1.0, 3.0, 5.0, 7.0])
    again = SigmaBins()
    again.load_state_dict(json.loads(json.dumps(bins.state_dict())))
    for each in (bins, again):
        each.add([0.999], [8.0])
        wanted = {"loss_sigma_0.00_0.25": 2.0, "loss_sigma_0.25_0.50": 5.0, "loss_sigma_0.75_1.00": 7.5}
        assert each.take() == wanted
        assert each.take() == {}


def test_rare_values_go_to_the_log_and_to_the_curves_at_once(tmp_path):
    with Report(tmp_path, 9, log_every=5) as report:
        report.step(1, {"loss": 1.0})
        report.step(2, {"loss": 1.0}, {"validation_loss": 0.5})
    assert lines(tmp_path)[1] == {"step": 2, "loss": 1.0, "validation_loss": 0.5}
    assert curve(tmp_path, "train/validation_loss") == [(2, 0.5)] and not curve(tmp_path, "train/loss")


def test_speed_is_a_curve_and_not_in_the_log(tmp_path, monkeypatch):
    now = iter([0.0, 4.0, 9.0])
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: next(now))
    with Report(tmp_path, 9, log_every=2) as report:
        for step in (1, 2):
            report.step(step, {"loss": 1.0}, images=6)
    assert [round(value, 4) for _, value in curve(tmp_path, "train/images_per_second")] == [3.0]
    assert all(set(line) == {"step", "loss"} for line in lines(tmp_path))
