"""What a run's folder tells of it, while it is written and after."""

import json
import os

import pytest

from ppcoat.studio import run_log
from ppcoat.studio.access import Roots
from ppcoat.studio.run_log import RunLog, progress_of, smoothed, thinned
from ppcoat.studio.runs import ChildRun, Note, birth


def lines(first, last, **more):
    return "".join(
        json.dumps({"step": step, "loss": 1 / step, "lr": 1e-3, **more}) + "\n"
        for step in range(first, last + 1)
    )


def test_the_log_is_read_as_it_grows(tmp_path):
    log, file = RunLog(tmp_path), tmp_path / "log.jsonl"
    log.read()
    assert log.step == 0 and log.rate is None
    file.write_text(lines(1, 3) + '{"step": 4, "lo')
    log.read()
    assert log.steps == [1, 2, 3] and log.losses == [1, 1 / 2, 1 / 3]
    with open(file, "a") as more:
        more.write(
            'ss": "nan", "lr": 0.5, "validation_loss": 0.25}\nnonsense\n[]\n{"step": "x"}\n{"step": 1e999}\n'
        )
        more.write("[" * 9000 + "\n")
    log.read()
    assert log.step == 4 and log.losses[3] != log.losses[3] and log.rates[3] == 0.5
    assert log.validation == [(4, 0.25)] and log.last == {"step": 4, "lr": 0.5, "validation_loss": 0.25}


def test_a_log_that_was_cut_is_read_anew(tmp_path):
    log, file = RunLog(tmp_path), tmp_path / "log.jsonl"
    file.write_text(lines(1, 9))
    log.read()
    other = tmp_path / "other"  # what a resumed run does: a whole new file in its place
    other.write_text(lines(1, 5) + lines(6, 9, again=1))
    os.replace(other, file)
    log.read()
    assert log.steps == list(range(1, 10)) and log.last["again"] == 1


def test_the_rate_is_steps_by_the_times_of_the_file(tmp_path):
    log, file = RunLog(tmp_path), tmp_path / "log.jsonl"
    for last, when in ((1, 1000.0), (5, 1002.0), (201, 1100.0)):
        file.write_text(file.read_text() + lines(log.step + 1, last) if file.exists() else lines(1, last))
        os.utime(file, (when, when))
        log.read()
    assert log.rate == pytest.approx(2.0)  # 196 steps in 98 s: the first look is more than a minute ago


@pytest.mark.parametrize(
    ("step", "stop", "alive", "waits", "printed", "status"),
    [
        (0, False, True, False, "", "running"),
        (3, True, True, False, "", "stopping"),
        (3, True, False, False, "", "stopped"),
        (3, True, False, True, "", "waiting"),
        (9, False, False, False, "", "finished"),
        (3, False, False, False, "a\nerror: no room on the disk", "failed"),
    ],
)
def test_how_far_a_run_is(tmp_path, step, stop, alive, waits, printed, status):
    (tmp_path / "config.yaml").write_text("train:\n  steps: 9\n")
    (tmp_path / "log.jsonl").write_text(lines(1, step))
    (tmp_path / "studio.log").write_text(printed)
    born = birth(os.getpid()) if alive else "before"
    ChildRun(tmp_path)._keep(Note(("train",), str(tmp_path), os.getpid(), born, stop))
    log = RunLog(tmp_path)
    log.read()
    found = progress_of(ChildRun(tmp_path), log, waits)
    assert (found.status, found.step, found.total) == (status, step, 9)
    assert found.error == ("no room on the disk" if status == "failed" else "")


def test_a_run_that_a_shell_trains_is_running_as_long_as_its_log_grows(tmp_path):
    (tmp_path / "log.jsonl").write_text(lines(1, 3))
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    log = RunLog(tmp_path)
    log.read()
    assert progress_of(ChildRun(tmp_path), log).status == "running"
    os.utime(tmp_path / "log.jsonl", (1000, 1000))
    log.read()
    assert progress_of(ChildRun(tmp_path), log).status == "stopped"


def test_steps_of_a_run_are_those_of_its_own_config(tmp_path):
    assert run_log.total_steps(tmp_path) == 0
    (tmp_path / "studio.yaml").write_text("train: {num_epochs: 3}\n")
    assert run_log.total_steps(tmp_path) == 0  # not known before it has counted its pictures
    (tmp_path / "studio.yaml").write_text("name: x\n")
    assert run_log.total_steps(tmp_path) == 1000
    (tmp_path / "config.yaml").write_text("train: {num_epochs: 3, steps: 24}\n")
    assert run_log.total_steps(tmp_path) == 24
    (tmp_path / "config.yaml").write_text("lora_rank: 8\nmax_train_steps: 28652\n")  # FLUX-Lightning's
    assert run_log.total_steps(tmp_path) == 28652


def test_runs_previews_and_weights_are_found_by_their_files(tmp_path):
    run = tmp_path / "output/a"
    (run / "samples").mkdir(parents=True)
    (run / "log.jsonl").touch()
    hidden = tmp_path / ".hidden/b"
    hidden.mkdir(parents=True)
    (hidden / "log.jsonl").touch()
    deep = tmp_path / "1/2/3/4"
    deep.mkdir(parents=True)
    (deep / "log.jsonl").touch()
    assert run_log.find_runs(Roots([tmp_path])) == [run]
    for name, target in (("linked", "/etc/hostname"), ("nowhere", "/no/such")):
        (tmp_path / "output" / name).mkdir()
        (tmp_path / "output" / name / "log.jsonl").symlink_to(target)
    assert run_log.find_runs(Roots([tmp_path])) == [run]
    names = ("000000010_00.png", "000000010_01.png", "000000020_00.png", "other.png")
    for name in names:
        (run / "samples" / name).touch()
    found = run_log.previews_of(run)
    assert list(found) == [10, 20] and list(found[10]) == [0, 1] and found[20][0].name == names[2]
    for name in (
        "a.safetensors",
        "a_000000020.safetensors",
        "a_000000010.safetensors",
        "a_kohya.safetensors",
    ):
        (run / name).touch()
    assert list(run_log.lora_files(run)) == ["10", "20", "end"]
    assert run_log.lora_files(run)["end"].name == "a.safetensors"


def test_smoothing_is_the_mean_without_the_pull_to_zero():
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    values, weight = [1.0, 3.0, float("nan"), 5.0], 0.5
    expected = (5 * 0.5 + 3 * 0.25 + 1 * 0.125) / 0.875
    assert smoothed(values, weight)[-1] == pytest.approx(expected)
    assert smoothed([], 0.9) == [] and smoothed([7.0], 0.0) == [7.0]


def test_a_long_curve_is_thinned_and_keeps_its_end():
    points = [(step, float(step)) for step in range(2501)]
    found = thinned(points, 1000)
    assert len(found) <= 1000 and found[-1] == points[-1] and found == sorted(found)
    assert thinned(points[:3], 1000) == points[:3] and thinned([]) == []
