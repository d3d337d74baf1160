"""What a frozen base in a smaller format costs.

    python -m ppcoat accuracy weights --model ppcoat/assets/tiny_flux --base fp4

shows RMS(quantised - exact) / RMS(exact) of each Linear's weight and of the transformer's output, and how
long quantising takes. The output is a velocity for random inputs, once with all Linears quantised, once with
those of the blocks alone. It needs the transformer in memory twice.

    python -m ppcoat accuracy bases

has a row for every format on the built-in tiny FLUX: these errors; the Frechet distance between pictures of
28 steps and those of the unquantised model, from the same captions and seeds, by the features of the garment
classifier; and the final loss of quickstart's LoRA, with COAT, trained on that base. Results of each part are
written to bases.json in the output folder; a second call with the same settings goes on from there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ppcoat.atomic import whole_file, write_text
from ppcoat.bench.flags import BaseFlags, WeightFlags
from ppcoat.bench.parity import earlier_results, furthest, trained
from ppcoat.bench.quickstart import draw_data
from ppcoat.config.load import JSON_ENDINGS, YAML_ENDINGS, load_config, read_config_text
from ppcoat.config.schema import RunConfig
from ppcoat.device import set_device, tune_host
from ppcoat.errors import ConfigError
from ppcoat.infer.drawing import GUIDANCE
from ppcoat.infer.garment_scores import GarmentClassifier, classify, draw_samples, held_out_garments, sheet
from ppcoat.infer.scores import frechet_distance
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.models.quantized_base import (
    OutputErrors,
    WeightError,
    load_quantized_transformer,
    output_errors,
    weight_errors,
)
from ppcoat.nn.base_weight import BASES

INPUTS = 3  # random ones over which the output's error is averaged
FLOAT, OTHER_SEEDS = "false", "false, other seeds"  # rows of what is not quantised; as model.quantize has it
STEPS, DRAWN_AT_ONCE, SHOWN = 28, 50, 16
_GOAL = f"features/{FLOAT}"  # of the pictures that the others are compared with
SEED_APART = 10_000_000  # from any seed of the other pictures


def run_weights(flags: WeightFlags) -> None:
    """The command `accuracy weights`. Raises ConfigError for a wrong model."""
    folder = FluxFiles.found(flags.model, "--model")["transformer"]
    tune_host()
    rows = list(weight_errors(folder, flags.base))
    output = None if flags.weights_only else output_errors(folder, seeds=range(INPUTS), base=flags.base)
    print(_weight_table(rows, output, flags.base))
    if flags.output:
        content = {
            "base": flags.base,
            "weights": [row._asdict() for row in rows],
            "output": output and output._asdict(),
        }
        write_text(flags.output, json.dumps(content, indent=2) + "\n")
        print(f"\nwritten: {flags.output}")


def run_bases(flags: BaseFlags) -> None:
    """The command `accuracy bases`. Raises ConfigError for wrong settings, before anything is computed."""
    for name, least in (("steps", 1), ("samples", 2)):
        if getattr(flags, name) < least:
            raise ConfigError(f"--{name}: came {getattr(flags, name)}, wanted at least {least}")
    config, folder = lora_config(flags, FLOAT, flags.seeds[0]), Path(flags.output_dir)
    check_folder(FluxFiles.found(config.model.name_or_path, "model.name_or_path", **config.model.beside))
    settings = {
        "config": read_config_text(Path(flags.config), (*YAML_ENDINGS, *JSON_ENDINGS)),
        "overrides": flags.overrides,
        "steps": flags.steps,
        "samples": flags.samples,
    }
    file = folder / "bases.json"
    results = earlier_results(file, settings)
    tune_host()
    set_device(config.device)
    for key, measure in _parts(flags, config):
        if key not in results:
            print(key, flush=True)
            results[key] = measure(results)
            write_text(file, json.dumps({"settings": settings, "results": results}) + "\n")
    print(base_table(results, flags))


def lora_config(flags: BaseFlags, base: str, seed: int) -> RunConfig:
    """The settings of one LoRA run on a base: FLOAT or of BASES."""
    run = [
        f"name={base}_{seed}",
        f"output_dir={flags.output_dir}",
        f"datasets.0.folder_path={Path(flags.output_dir) / 'data'}",
        f"train.steps={flags.steps}",
        f"seed={seed}",
        "sample.sample_every=0",
        f"model.quantize={base}",
    ]
    return load_config(flags.config, [*flags.overrides, *run])


def _parts(flags: BaseFlags, config: RunConfig) -> list[tuple[str, Callable[[dict], object]]]:
    """All that is measured: its key in the results, and what measures it, given the results so far."""
    transformer = FluxFiles.found(config.model.name_or_path, **config.model.beside)["transformer"]

    def errors(base: str) -> dict:
        rows = list(weight_errors(transformer, base))
        bits = 8 * sum(BASES[base].bytes_of(row.shape) for row in rows)
        return {
            "bits": bits / sum(math.prod(row.shape) for row in rows),
            "mean": float(np.mean([row.relative_rms for row in rows])),
            "largest": max(row.relative_rms for row in rows),
            **output_errors(transformer, seeds=range(INPUTS), base=base)._asdict(),
        }

    def distance(row: str, results: dict) -> float:
        return frechet_distance(_drawn_features(flags, config, row), np.array(results[_GOAL]))

    def loss(base: str, seed: int) -> float:
        run = lora_config(flags, base, seed)
        if not Path(run.data.folder_path).exists():
            draw_data(run)
        return trained(run)["loss"]

    parts: list[tuple[str, Callable[[dict], object]]] = []
    parts += [(f"errors/{base}", lambda _, base=base: errors(base)) for base in BASES]
    parts.append((_GOAL, lambda _: _drawn_features(flags, config, FLOAT).round(5).tolist()))
    parts += [(f"Frechet/{row}", partial(distance, row)) for row in (OTHER_SEEDS, *BASES)]
    parts += [
        (f"loss/{base}/{seed}", lambda _, base=base, seed=seed: loss(base, seed))
        for seed in flags.seeds
        for base in (FLOAT, *BASES)
    ]
    return parts


def _drawn_features(flags: BaseFlags, config: RunConfig, row: str) -> np.ndarray:
    """[N, 128], float64, of the pictures of a row of the table; the first of them are written to a file."""
    files = FluxFiles.found(config.model.name_or_path, **config.model.beside)
    pipeline = FluxPipeline.from_pretrained(files)
    if row in BASES:
        pipeline.transformer = load_quantized_transformer(files["transformer"], base=row)
    seed = SEED_APART if row == OTHER_SEEDS else 0
    drawn = draw_samples(pipeline, held_out_garments(flags.samples), STEPS, GUIDANCE, DRAWN_AT_ONCE, seed)
    with whole_file(Path(flags.output_dir) / f"pictures {row}.png") as draft:
        sheet(drawn[:SHOWN]).save(draft)
    return classify(GarmentClassifier.load(), drawn)["features"].astype(np.float64)


def base_table(results: dict, flags: BaseFlags) -> str:
    """A Markdown table with a row for each format, and what is not quantised first.

    loss: mean over the seeds; then the difference from the unquantised base's, its mean and the one that is
    furthest from 0.
    """
    lines = [
        "| base | bits a weight | error of a weight, mean (largest) | of the output | Frechet distance | "
        "final loss | difference, mean | furthest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    exact = [results[f"loss/{FLOAT}/{seed}"] for seed in flags.seeds]
    lines.append(f"| {FLOAT} | - | 0 | 0 | 0 | {np.mean(exact):.4f} | | |")
    lines.append(f"| {OTHER_SEEDS} | - | | | {results[f'Frechet/{OTHER_SEEDS}']:.2f} | | | |")
    for base in BASES:
        errors = results[f"errors/{base}"]
        losses = [results[f"loss/{base}/{seed}"] for seed in flags.seeds]
        apart = [100 * (loss / other - 1) for loss, other in zip(losses, exact, strict=True)]
        lines.append(
            f"| {base} | {errors['bits']:.2f} | {errors['mean']:.4f} ({errors['largest']:.4f}) "
            f"| {errors['all_linears']:.3f} | {results[f'Frechet/{base}']:.2f} "
            f"| {np.mean(losses):.4f} | {np.mean(apart):+.2f} % | {furthest(apart):+.2f} % |"
        )
    lines.append(f"{flags.samples} pictures, LoRAs of {flags.steps} steps, seeds {flags.seeds}")
    return "\n".join(lines)


def seconds_a_gb(rows: list[WeightError]) -> float:
    """CPU time for reading and quantising 10^9 bytes of bfloat16 weights: the sum over all `rows`."""
    return 1e9 * sum(row.seconds for row in rows) / sum(2 * math.prod(row.shape) for row in rows)


def _weight_table(rows: list[WeightError], output: OutputErrors | None, base: str) -> str:
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
    lines.append(f"reading and quantising: {seconds_a_gb(rows):.1f} s of CPU time a GB of bfloat16")
    if output is not None:
        lines.append(
            f"output, mean of {INPUTS} random inputs: {output.all_linears:.4f} with all Linears in {base}, "
            f"{output.in_blocks:.4f} with those of the blocks"
        )
    return "\n".join(lines)
