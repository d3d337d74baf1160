"""What an FP8 base costs: the error of each Linear's weight, and of the transformer's output.

    python -m ppcoat accuracy weights --model ppcoat/assets/tiny_flux

Errors are relative RMS errors: RMS(FP8 - exact) / RMS(exact). The output is a velocity for random inputs,
with all Linears in FP8 and with those of the blocks alone; it wants the transformer in memory twice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ppcoat.errors import ConfigError
from ppcoat.host import tune_host
from ppcoat.models.fp8_base import OutputErrors, WeightError, output_errors, weight_errors

SEEDS = 3  # random inputs over which the output's error is averaged


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=Path("ppcoat/assets/tiny_flux"), help="FLUX folder")
    parser.add_argument("--no_output", action="store_true", help="leave the output out, for large models")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON, too")


def run_command(arguments: argparse.Namespace) -> None:
    folder = arguments.model / "transformer"
    if not folder.is_dir():
        raise ConfigError(f"--model {arguments.model} has no folder transformer: name a FLUX pipeline folder")
    tune_host()
    rows = list(weight_errors(folder))
    output = None if arguments.no_output else output_errors(folder, seeds=range(SEEDS))
    print(table(rows, output))
    if arguments.output:
        content = {"weights": [row._asdict() for row in rows], "output": output and output._asdict()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {arguments.output}")


def table(rows: list[WeightError], output: OutputErrors | None) -> str:
    """One line per Linear in the order of the files, their mean, and the output."""
    width = max(len(row.path) for row in rows)
    lines = [f"{'Linear':{width}s}  {'[in, out]':>16s}  relative RMS error"]
    lines += [f"{row.path:{width}s}  {str(row.shape):>16s}  {row.relative_rms:.5f}" for row in rows]
    errors = np.array([row.relative_rms for row in rows])
    inside = sum(row.in_block for row in rows)
    lines.append(
        f"{len(rows)} Linears, {inside} of them in blocks: mean {errors.mean():.5f}, least "
        f"{errors.min():.5f}, largest {errors.max():.5f}"
    )
    if output is not None:
        lines.append(
            f"output, mean of {SEEDS} random inputs: {output.all_linears:.4f} with all Linears in FP8, "
            f"{output.in_blocks:.4f} with those of the blocks"
        )
    return "\n".join(lines)
