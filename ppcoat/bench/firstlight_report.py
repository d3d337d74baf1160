"""What `firstlight` found: which checks passed, and the table to paste into an issue."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ppcoat.bench import kernels
from ppcoat.plan import GB

# Sections of the report; MACHINE is a part of the first, STEPS are those of LoRA steps.
CHECKS, KERNELS, MACHINE = "self-checks", "kernels", "machine"
STEPS = COAT, PLAIN, CHECKPOINTED = "COAT", "plain", "gradient checkpointing"
AS_LARGE_AS_PLANNED = 1.1  # times what is planned, which measured memory may be
AS_GOOD_AS_EQUAL = 0.02  # relative difference of the first losses, whose forward passes round alike


def checks(report: dict) -> Iterator[tuple[str, str]]:
    """Name of each check, and what is wrong: "" where it passed."""
    for name, section in report["sections"].items():
        missing = [part for part, entry in section["parts"].items() if "result" not in entry]
        yield f"{name} complete", f"missing: {', '.join(missing)}" if missing else ""
    found = _results(report, CHECKS)
    failed = [f"{f['name']}: {f['what']}" for f in found.pop(MACHINE, []) if f["mark"] == "fail"]
    yield "doctor", "; ".join(failed)
    yield "ops", "; ".join(f"{name}: {each['reason']}" for name, each in found.items() if each["reason"])
    errors = _results(report, KERNELS).get("errors", {})
    yield "kernels right", ", ".join(kernels.wrong_kernels({"errors": errors}))
    steps = {name: _results(report, name) for name in STEPS}
    losses = {name: each["steps"]["losses"] for name, each in steps.items() if "steps" in each}
    yield "losses", _unequal(losses)
    if report["on_gpu"] and not report["small"]:
        yield "memory as planned", "; ".join(_larger_than_planned(steps))


def _unequal(losses: dict[str, list[float]]) -> str:
    """What is wrong with the losses of the ways to train: the first ones are of equal weights."""
    first = [each[0] for each in losses.values()]
    if not all(math.isfinite(loss) for each in losses.values() for loss in each):
        return f"not finite: {losses}"
    if first and max(first) - min(first) > AS_GOOD_AS_EQUAL * max(first):
        return "the first ones differ: " + ", ".join(f"{name} {each[0]:.4f}" for name, each in losses.items())
    return ""


def _larger_than_planned(steps: dict[str, dict]) -> Iterator[str]:
    for name, found in steps.items():
        if {"steps", "plan"} <= set(found):
            measured, planned = found["steps"]["peak_bytes"], found["plan"]
            if measured > AS_LARGE_AS_PLANNED * planned:
                yield f"{name}: {measured / GB:.2f} GB, planned {planned / GB:.2f} GB"


def firstlight_table(report: dict) -> str:
    """The report in Markdown: machine, ops, kernels, steps, what failed or was left out, checks."""
    steps = {name: _results(report, name) for name in STEPS}
    rows = [
        ["firstlight" + ", tiny sizes" * report["small"], "found", "beside it"],
        ["---"] * 3,
        *([name, what, ""] for name, what in report["machine"].items()),
        _op_row(report),
        *_kernel_rows(_results(report, KERNELS)),
        *(_step_row(name, found) for name, found in steps.items() if "steps" in found),
        *_missing_rows(report["sections"]),
        *(
            [f"check: {name}", "passed" if check["passed"] else "NOT PASSED", check["what"]]
            for name, check in report["checks"].items()
        ),
        ["time", f"{report['seconds']:.0f} s", ""],
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def _op_row(report: dict) -> list[str]:
    ops = {name: each for name, each in _results(report, CHECKS).items() if name != MACHINE}
    right = [each["error"] for each in ops.values() if not each["reason"]]
    largest = f"largest error {max(right):.3f} of 1 allowed" if right else ""
    title = "ops that run in their kernels" if report["on_gpu"] else "references that are right"
    return [title, f"{len(right)} of {len(ops)}", largest]


def _kernel_rows(found: dict[str, Any]) -> Iterator[list[str]]:
    for part, entries in found.items():
        for row in entries if part != "errors" else ():
            beside = [f"{name} {value:.2f}" for name, (value, _) in row["targets"].items()]
            beside += [f"{name} {mib:.0f} MiB" for name, mib in row["peak_mib"].items()]
            title = f"{row['kernel']} {'x'.join(map(str, row['shape']))}"
            yield [title, f"{row['ms']:.4f} ms", ", ".join(beside)]


def _missing_rows(sections: dict[str, dict]) -> Iterator[list[str]]:
    for name, section in sections.items():
        for part, entry in section["parts"].items():
            for state in ("failed", "left_out"):
                if state in entry:
                    yield [f"{name}: {part}", state.replace("_", " "), entry[state]]


def _step_row(name: str, found: dict) -> list[str]:
    steps, planned = found["steps"], found.get("plan")
    peak = "unknown" if steps["peak_bytes"] is None else f"{steps['peak_bytes'] / GB:.2f} GB"
    plan = "no plan" if planned is None else f"planned {planned / GB:.2f} GB"
    losses = f"loss {steps['losses'][0]:.4f} to {steps['losses'][-1]:.4f}"
    return [f"LoRA step, {name}", f"{steps['milliseconds']:.1f} ms", f"peak {peak}, {plan}; {losses}"]


def _results(report: dict, section: str) -> dict[str, Any]:
    """Results of a section's parts that have one."""
    parts = report["sections"][section]["parts"]
    return {name: entry["result"] for name, entry in parts.items() if "result" in entry}
