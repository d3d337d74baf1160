"""`firstlight`: the whole command in small; what fails, hangs or does not fit is recorded, and the others go
on."""

import copy
import json
import multiprocessing
import threading
import time
from types import SimpleNamespace

import pytest

from ppcoat.bench import firstlight, kernels
from ppcoat.bench.firstlight import LIMIT, SECTIONS, FirstlightSection, run_section
from ppcoat.bench.firstlight_report import (
    CHECKPOINTED,
    CHECKS,
    COAT,
    KERNELS,
    PLAIN,
    checks,
    firstlight_table,
)
from ppcoat.cli.main import main
from ppcoat.device import ChildProcess, on_gpu
from ppcoat.fp8 import backend
from ppcoat.plan.phases import HOST_PROCESS

WITHOUT_GPU = pytest.mark.skipif(on_gpu(), reason="the command itself measures here")


def rows_of(table):
    """{first cell: the others}"""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {first: rest for first, *rest in rows}


@pytest.fixture(scope="module")
def report():
    """Of a run in small; nobody changes it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return firstlight.firstlight(small=True)


@WITHOUT_GPU
def test_every_section_runs_in_small(report):
    sections = report["sections"]
    assert list(sections) == [CHECKS, KERNELS, COAT, PLAIN, CHECKPOINTED]
    for section in sections.values():
        assert section["parts"] and all("result" in entry for entry in section["parts"].values()), section
    assert set(sections[CHECKS]["parts"]) == {"machine", *backend.OPS}
    assert set(sections[KERNELS]["parts"]) == set(kernels.PARTS)
    errors = [
        entry["result"]["error"] for name, entry in sections[CHECKS]["parts"].items() if name != "machine"
    ]
    assert all(0 <= error <= 1 for error in errors) and max(errors) > 0.9  # rounding reaches it
    steps = {name: sections[name]["parts"]["steps"]["result"] for name in (COAT, PLAIN, CHECKPOINTED)}
    assert steps[COAT]["optimizer"] == "FP8AdamW" and steps[COAT]["policy"] == "coat+recompute"
    assert steps[PLAIN]["optimizer"] == steps[CHECKPOINTED]["optimizer"] == "AdamW"
    kept = {name: each["bytes_kept"] for name, each in steps.items()}
    assert kept[CHECKPOINTED] < kept[COAT] < kept[PLAIN]
    losses = {name: each["losses"] for name, each in steps.items()}
    assert losses[COAT][0] == losses[PLAIN][0] and losses[COAT][1:] != losses[PLAIN][1:]
    assert losses[CHECKPOINTED] == pytest.approx(losses[PLAIN], rel=1e-5)
    assert all(check["passed"] for check in report["checks"].values()), report["checks"]


@WITHOUT_GPU
def test_the_plan_is_of_the_very_case(report):
    """Base, LoRA and states are counted exactly; what is kept is as the step itself counted."""
    training = firstlight.MeasuredTraining(firstlight.TINY)
    base = sum(p.size * 4 for p in training.model.parameters() if p.stop_gradient)
    trained = sum(p.size * 4 for p in training.parameters)
    planned = report["sections"][PLAIN]["parts"]["plan"]["result"]
    kept = report["sections"][PLAIN]["parts"]["steps"]["result"]["bytes_kept"]
    known = base + trained * 4 + kept + HOST_PROCESS  # LoRA, gradients, two moments
    assert known < planned < known + 2_000_000  # working memory of so small a block


@WITHOUT_GPU
def test_the_command_writes_numbers_and_prints_one_table(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(firstlight, "firstlight", lambda small: report)
    output = tmp_path / "found.json"
    assert main(["firstlight", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("tiny sizes: ") and shown.endswith(f"all numbers: {output}\n")
    found = json.loads(output.read_text())
    assert found["sections"].keys() == report["sections"].keys() and found["small"]
    table = "\n".join(line for line in shown.splitlines() if line.startswith("|"))
    rows = rows_of(table)
    assert {len(row) for row in rows.values()} == {2}
    assert rows["references that are right"][0] == f"{len(backend.OPS)} of {len(backend.OPS)}"
    assert {"device", "driver", "ppcoat", "python", "CUDA of Paddle", "time"} < set(rows)
    assert rows["gelu 3x256"][0].endswith(" ms") and "share of copy bandwidth" in rows["gelu 3x256"][1]
    for name in (COAT, PLAIN, CHECKPOINTED):
        assert (
            rows[f"LoRA step, {name}"][0].endswith(" ms")
            and "GB, planned 0." in rows[f"LoRA step, {name}"][1]
        )
    assert all(rows[f"check: {name}"] == ["passed", ""] for name in report["checks"])


@pytest.mark.parametrize("output", ["found.txt", "nowhere/found.json"])
def test_a_wrong_output_is_named_before_anything_runs(output, monkeypatch, capsys):
    monkeypatch.setattr(firstlight, "firstlight", lambda small: pytest.fail("it ran"))
    assert main(["firstlight", "--output", output]) == 2
    assert f"a .json file in a folder that exists, got {output}" in capsys.readouterr().err


def changed_by(change, report):
    report = copy.deepcopy(report)
    change(report["sections"])
    report["checks"] = {name: {"passed": not what, "what": what} for name, what in checks(report)}
    return report


def wrong_op(sections):
    sections[CHECKS]["parts"]["silu"]["result"] |= {"error": 3.0, "reason": "its results are wrong: error 3"}


def broken_cast(sections):
    sections[CHECKS]["parts"]["machine"]["result"].append(
        {"mark": "fail", "name": "FP8 cast", "what": "wrong", "advice": ""}
    )


def wrong_kernel(sections):
    sections[KERNELS]["parts"]["errors"]["result"]["gelu, FP8"] = float("nan")


def other_loss(sections):
    sections[COAT]["parts"]["steps"]["result"]["losses"][0] *= 1.1


def lost_loss(sections):
    sections[PLAIN]["parts"]["steps"]["result"]["losses"][-1] = float("nan")


def failed_part(sections):
    sections[KERNELS]["parts"]["products"] = {"failed": "RuntimeError: no | such card", "seconds": 1.0}


def left_out_part(sections):
    sections[CHECKPOINTED]["parts"]["steps"] = {"left_out": "did not fit into 75 s"}


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("change", "check", "row"),
    [
        (wrong_op, "ops", ("references that are right", f"{len(backend.OPS) - 1} of {len(backend.OPS)}")),
        (broken_cast, "doctor", None),
        (wrong_kernel, "kernels right", None),
        (other_loss, "losses", None),
        (lost_loss, "losses", None),
        (failed_part, "kernels complete", ("kernels: products", "failed")),
        (left_out_part, f"{CHECKPOINTED} complete", (f"{CHECKPOINTED}: steps", "left out")),
    ],
)
def test_what_is_wrong_ends_the_command_with_status_2(
    report, tmp_path, monkeypatch, capsys, change, check, row
):
    changed = changed_by(change, report)
    monkeypatch.setattr(firstlight, "firstlight", lambda small: changed)
    output = tmp_path / "found.json"
    assert main(["firstlight", "--output", str(output)]) == 2
    assert json.loads(output.read_text())["checks"][check]["passed"] is False
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: not passed: {check}; report it") and shown.err.count("\n") == 1
    rows = rows_of(firstlight_table(changed))
    assert rows[f"check: {check}"][0] == "NOT PASSED" and rows[f"check: {check}"][1]
    if row:
        assert rows[row[0]][0] == row[1]


@WITHOUT_GPU
def test_more_memory_than_planned_is_a_fault_on_a_card(report):
    found = copy.deepcopy(report) | {"on_gpu": True, "small": False}
    for name in (COAT, PLAIN, CHECKPOINTED):
        parts = found["sections"][name]["parts"]
        parts["steps"]["result"]["peak_bytes"] = parts["plan"]["result"]
    assert dict(checks(found))["memory as planned"] == ""
    parts = found["sections"][COAT]["parts"]
    parts["plan"]["result"], parts["steps"]["result"]["peak_bytes"] = 2_000_000_000, 2_400_000_000
    assert dict(checks(found))["memory as planned"] == "COAT: 2.40 GB, planned 2.00 GB"


def test_the_sections_fit_into_ten_minutes():
    assert sum(section.seconds for section in SECTIONS.values()) <= LIMIT == 600


def fails():
    raise RuntimeError("no\nsuch card")


class Child(ChildProcess):
    """A section's process that is a thread of this one."""

    def __init__(self, function, *arguments):
        self.pipe, self.theirs = multiprocessing.Pipe()
        self.killed = False
        self.process = SimpleNamespace(kill=self.kill, join=lambda *_: None, exitcode=1, terminate=self.kill)
        self.thread = threading.Thread(target=self.run, args=(function, *arguments), daemon=True)
        self.thread.start()

    def kill(self):
        self.killed = True

    def run(self, function, *arguments):
        try:
            function(self.theirs, *arguments)
        except SystemExit:  # as a process that dies
            self.theirs.close()


def dies():
    raise SystemExit


@pytest.fixture(params=["here", "in a process"])
def sections(request, monkeypatch):
    """sections(parts) -> run_section's entries for a section of these parts; here, and as on a GPU."""
    if request.param == "in a process":
        monkeypatch.setattr(firstlight, "on_gpu", lambda: True)
        monkeypatch.setattr(firstlight, "ChildProcess", Child)
        monkeypatch.setattr(firstlight, "tune_host", lambda: None)

    def run(parts, seconds=60.0):
        monkeypatch.setitem(SECTIONS, "section", FirstlightSection(seconds, lambda small: parts))
        return run_section("section", True, seconds)["parts"]

    run.in_a_process = request.param == "in a process"
    return run


def test_a_part_that_fails_is_recorded_and_the_others_go_on(sections):
    found = sections({"first": fails, "second": lambda: 2})
    assert found["first"]["failed"] == "RuntimeError: no such card"
    assert found["second"]["result"] == 2


def test_what_does_not_fit_is_named(sections):
    found = sections({"first": lambda: time.sleep(0.2) or 1, "second": lambda: 2}, 0.1)
    assert found["second"] == {"left_out": "did not fit into 0 s"}
    # here a part that has begun is waited for; a process is ended with it
    assert found["first"].get("result") == (None if sections.in_a_process else 1)


def test_a_process_that_dies_is_a_failure_of_its_part(sections):
    if not sections.in_a_process:
        pytest.skip("here nothing can die alone")
    found = sections({"first": lambda: 1, "second": dies, "third": lambda: 3})
    assert found["first"]["result"] == 1
    assert "ended with exit code 1" in found["second"]["failed"]
    assert found["third"]["left_out"] == found["second"]["failed"]


def test_a_process_that_dies_after_its_last_part_loses_nothing(monkeypatch):
    def ends_late(*_):
        yield "only", {"result": 1}
        raise ChildProcessError("exit code 9")

    monkeypatch.setattr(firstlight, "on_gpu", lambda: True)
    monkeypatch.setattr(firstlight, "_from_child", ends_late)
    monkeypatch.setitem(SECTIONS, "section", FirstlightSection(60, lambda small: {"only": lambda: 1}))
    assert run_section("section", True, 60)["parts"] == {"only": {"result": 1}}


@pytest.mark.slow
@WITHOUT_GPU
def test_a_section_runs_in_a_process_of_its_own():
    entries = dict(firstlight._from_child(PLAIN, True, time.monotonic() + 300))
    assert list(entries) == ["steps", "plan"]
    assert len(entries["steps"]["result"]["losses"]) == firstlight.WARM_UP + 1


@WITHOUT_GPU
def test_the_machine_is_told(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    monkeypatch.setattr(firstlight, "_first_line", lambda *command: f"{command[0]} said it")
    found = firstlight.machine()
    assert found["driver"] == "nvidia-smi said it" and found[backend.VARIABLE] == "reference"
    assert found["device"].startswith("cpu, ")


def test_a_program_that_is_not_there_or_fails_says_nothing():
    assert firstlight._first_line("no-such-program") == firstlight._first_line("false") == ""
    assert firstlight._first_line("echo", "1.0") == "1.0"
