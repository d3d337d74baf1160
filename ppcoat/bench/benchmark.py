"""Standard and COAT training, interleaved on this machine: memory, time per step, losses.

    python -m ppcoat benchmark --hidden_size 1024 --num_layers 8 --batch_size 4 --num_steps 50 \\
        --use_fp8_activation --output benchmark_results.json

"standard" is Paddle's AdamW with ordinary activations, "coat" is FP8AdamW and, with --use_fp8_activation, a
saving policy; everything else is the same in both. Writes JSON with every step, and a plot beside it; prints
a table. All numbers are measured in this call. `benchmark full_size` and
`benchmark kernels` are other measurements: full_size.py, kernels.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np

from ppcoat.atomic import whole_file, write_text
from ppcoat.bench import full_size, kernels
from ppcoat.bench.bench_worker import (
    PROBE_STEPS,
    largest_batch,
    measured_peak,
    run_interleaved,
)
from ppcoat.bench.flags import BenchmarkCase, BenchmarkFlags
from ppcoat.config.flags import from_flags
from ppcoat.errors import ConfigError
from ppcoat.progress import Progress

LAST_STEPS = 5  # the final loss is their mean
MIB = 2**20


def run_command(arguments: argparse.Namespace) -> None:
    if arguments.other == "full_size":
        full_size.run_command(arguments)
        return
    if arguments.other == "kernels":
        kernels.run_command(arguments)
        return
    flags = from_flags(BenchmarkFlags, arguments)
    cases, output = cases_of(from_flags(BenchmarkCase, arguments), flags), _output_file(flags.output)
    budget = flags.memory_budget_gb
    settings = {**vars(arguments), "policy": cases["coat"].policy}
    try:
        found = search_batches(cases, budget) if budget is not None else {}
        report = {"settings": settings, **benchmark(cases, flags.num_steps)}
    except MemoryError as error:
        raise ConfigError(
            f"out of memory ({error}): lower --batch_size, --tokens, --hidden_size or --num_layers"
        ) from error
    for name, search in found.items():
        report["variants"][name]["largest_batch"] = search
    write_text(output, json.dumps(report, indent=1) + "\n")
    picture = output.with_suffix(".png")
    _plot(report, picture)
    print(benchmark_table(report))
    print(f"\nall numbers: {output}\nplot: {picture}")


def cases_of(standard: BenchmarkCase, flags: BenchmarkFlags) -> dict[str, BenchmarkCase]:
    """The variants "standard", which is given, and "coat"."""
    policy = (flags.policy or "coat") if flags.use_fp8_activation else "none"
    return {"standard": standard, "coat": dataclasses.replace(standard, fp8_states=True, policy=policy)}


def _output_file(name: str) -> Path:
    """The JSON file to write. Raises ConfigError for another suffix."""
    file = Path(name)
    if file.suffix != ".json":
        raise ConfigError(f"--output must name a .json file, got {name}")
    return file


def search_batches(cases: dict[str, BenchmarkCase], budget_gb: float) -> dict[str, dict]:
    """{variant: {"batch": largest batch within the budget, "budget_gb", "measured_peak_bytes": {batch:
    peak}}}.

    Raises ConfigError if no variant fits with a batch of 1.
    """
    found: dict[str, dict] = {}
    for name, case in cases.items():

        def peak_of(batch: int, name: str = name, case: BenchmarkCase = case) -> float:
            Progress.write(f"{name}: measuring a batch of {batch}", file=sys.stderr)
            return measured_peak(dataclasses.replace(case, batch_size=batch), budget_gb * 1e9)

        batch, peaks = largest_batch(peak_of, budget_gb * 1e9)
        # JSON has no infinity: null is a batch that the device could not run at all
        measured = {str(size): peak if math.isfinite(peak) else None for size, peak in sorted(peaks.items())}
        found[name] = {"batch": batch, "budget_gb": budget_gb, "measured_peak_bytes": measured}
    if not any(search["batch"] for search in found.values()):
        least = min(peak for search in found.values() if (peak := search["measured_peak_bytes"]["1"]))
        raise ConfigError(
            f"memory_budget_gb: {budget_gb:g} is too small, a batch of 1 takes {least / 1e9:.2f} GB"
        )
    return found


def benchmark(cases: dict[str, BenchmarkCase], num_steps: int) -> dict:
    """Run the variants interleaved -> the report: model, environment, variants, comparison."""
    with Progress(total=num_steps * len(cases), unit="step", desc="starting") as progress:

        def on_turn(name: str, steps: int) -> None:
            progress.set_description(name)
            progress.update(steps)

        facts, variants = run_interleaved(cases, num_steps, on_turn)
    warm_up = min(3, num_steps // 3)
    for result in variants.values():
        records = result.pop("steps")
        times = [record.milliseconds for record in records[warm_up:]]
        quartiles = np.percentile(times, [25, 50, 75]).tolist()
        result["step_ms"] = {"min": min(times), **dict(zip(("q1", "median", "q3"), quartiles, strict=True))}
        result["final_loss"] = float(np.mean([record.loss for record in records[-LAST_STEPS:]]))
        result["steps"] = [dataclasses.asdict(record) for record in records]
    standard, coat = variants["standard"], variants["coat"]
    return {
        **facts,
        "timed_without_first_steps": warm_up,
        "variants": variants,
        "comparison": {
            "final_loss_relative_difference": coat["final_loss"] / standard["final_loss"] - 1,
            "step_time_ratio": coat["step_ms"]["median"] / standard["step_ms"]["median"],
        },
    }


def benchmark_table(report: dict) -> str:
    """The report as plain text."""
    settings, model, machine = report["settings"], report["model"], report["environment"]
    standard, coat = report["variants"]["standard"], report["variants"]["coat"]
    width, height = model["picture_pixels"]
    trained = "all of them" if settings["full_training"] else f"{model['trained_parameters']:,}"
    peak = "peak allocated" if machine["device"].startswith("gpu") else "peak resident (with Python)"
    lines = [
        f"{model['double_blocks']} double + {model['single_blocks']} single blocks, {model['heads']} heads "
        f"x 64: {model['parameters']:,} parameters, trained: {trained}",
        f"batch {settings['batch_size']}, {settings['tokens']} image tokens (a picture of {width} x {height} "
        f"pixels) + {settings['text_tokens']} text tokens, {model['dtype']}",
        f"{machine['device_name']}, {machine['cores']} cores, paddle {machine['paddle']} {machine['device']}",
        *(f"{name}: {v['optimizer']}, policy {v['policy']}" for name, v in report["variants"].items()),
        "",
        f"{'':44s}{'standard':>12s}{'coat':>12s}{'coat / standard':>18s}",
    ]
    for label, path, unit, form in (
        ("optimizer states, MiB", ("optimizer_bytes",), MIB, ".2f"),
        ("optimizer states, bytes per parameter", ("optimizer_bytes_per_parameter",), 1, ".3f"),
        ("kept for backward, MiB, as run", ("bytes_kept",), MIB, ".2f"),
        ("kept for backward, MiB, as bfloat16", ("bytes_kept_bf16",), MIB, ".2f"),
        (f"{peak}, MiB", ("peak_bytes",), MIB, ".1f"),
        ("  growth over the loaded model, MiB", ("growth_bytes",), MIB, ".1f"),
        ("step, ms: median", ("step_ms", "median"), 1, ".1f"),
        ("  minimum", ("step_ms", "min"), 1, ".1f"),
        ("  first quartile", ("step_ms", "q1"), 1, ".1f"),
        ("  third quartile", ("step_ms", "q3"), 1, ".1f"),
        (f"final loss (mean of last {LAST_STEPS} steps)", ("final_loss",), 1, ".5f"),
    ):
        lines.append(_row(label, _at(standard, path), _at(coat, path), unit, form))
    lines.append(
        f"difference of final losses: {100 * report['comparison']['final_loss_relative_difference']:+.3f} %"
    )
    if report["timed_without_first_steps"]:
        lines.append(f"times are without the first {report['timed_without_first_steps']} steps")
    for name, variant in report["variants"].items():
        if "largest_batch" in variant:
            lines += ["", _search_text(name, variant["largest_batch"])]
    return "\n".join(lines)


def _search_text(name: str, search: dict) -> str:
    batch, peaks = search["batch"], search["measured_peak_bytes"]
    measured = ", ".join(
        f"{size}: {peak / 1e9:.3f} GB" if peak else f"{size}: out of memory" for size, peak in peaks.items()
    )
    above = "measured" if str(batch + 1) in peaks else "predicted by the line through the largest two"
    return (
        f"{name}: the largest batch within {search['budget_gb']:g} GB is {batch}; that {batch + 1} does not "
        f"fit is {above}\n  peaks of {PROBE_STEPS} steps in a fresh process each, by batch: {measured}"
    )


def _at(variant: dict, path: tuple[str, ...]) -> float | None:
    for key in path:
        variant = variant[key]
    return variant


def _row(label: str, standard: float | None, coat: float | None, unit: int, form: str) -> str:
    if standard is None or coat is None:
        return f"{label:44s}{'-':>12s}{'-':>12s}"
    numbers = "".join(f"{value / unit:>12{form}}" for value in (standard, coat))
    return f"{label:44s}{numbers}{f'{coat / standard:>18.3f}' if standard else ''}"


def _plot(report: dict, file: Path) -> None:
    """One PNG: bars of memory, step times, loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, times, losses) = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1.5, 1, 1.3))
    variants = report["variants"]
    _plot_memory(memory, variants)
    labels = [f"{name}\n{variant['step_ms']['median']:.1f} ms" for name, variant in variants.items()]
    first = report["timed_without_first_steps"]
    for place, (name, variant) in enumerate(variants.items()):
        steps = variant["steps"]
        milliseconds = [step["milliseconds"] for step in steps[first:]]
        median = {"color": "black", "linewidth": 2}
        times.boxplot(milliseconds, positions=[place], widths=0.5, showfliers=False, medianprops=median)
        spread = np.linspace(-0.15, 0.15, len(milliseconds))
        times.plot(place + spread, milliseconds, ".", markersize=4, alpha=0.6, color=f"C{place}")
        style = {"linewidth": 3, "alpha": 0.5} if place == 0 else {"linewidth": 1.2}
        curve = [step["loss"] for step in steps]
        losses.plot(range(1, len(steps) + 1), curve, label=name, color=f"C{place}", **style)
    times.set(title="step time and its median", ylabel="ms", xlim=(-0.6, len(variants) - 0.4), ylim=(0, None))
    times.set_xticks(range(len(variants)), labels)
    difference = 100 * report["comparison"]["final_loss_relative_difference"]
    losses.set(title=f"loss; final difference {difference:+.3f} %", xlabel="step")
    losses.legend()
    model = report["model"]
    figure.suptitle(
        f"{model['parameters'] / 1e6:.1f} M parameters, batch {report['settings']['batch_size']}, "
        f"{report['environment']['device_name']}, coat: policy {variants['coat']['policy']}"
    )
    figure.tight_layout()
    with whole_file(file) as draft:
        figure.savefig(draft, dpi=110)
    plt.close(figure)


def _plot_memory(axes, variants: dict[str, dict]) -> None:
    bars = {
        "optimizer\nstates": "optimizer_bytes",
        "kept for\nbackward\n(as run)": "bytes_kept",
        "kept for\nbackward\n(as bf16)": "bytes_kept_bf16",
        "growth over\nloaded model": "growth_bytes",
    }
    bars = {label: key for label, key in bars.items() if all(v[key] is not None for v in variants.values())}
    for place, (name, variant) in enumerate(variants.items()):
        heights = [variant[key] / MIB for key in bars.values()]
        left = np.arange(len(bars)) + 0.4 * (place - 0.5)
        drawn = axes.bar(left, heights, 0.38, label=name, color=f"C{place}")
        axes.bar_label(drawn, fmt="{:.3g}", fontsize=8)
    axes.set_xticks(range(len(bars)), bars)
    axes.set(title="memory, MiB", ylabel="MiB")
    axes.margins(y=0.1)
    axes.legend()
