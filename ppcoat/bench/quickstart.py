"""The main job on a CPU in minutes: teach the built-in tiny FLUX a motif that it has never seen, and
measure it.

    drawings with a gold star, trigger word "sks"  ->  LoRA with COAT, and the same run without  ->
    pictures  ->  numbers

On a CPU both runs train in parallel, on half of the cores each. Everything that is printed is computed in
this call: the folders of an earlier call are removed first.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ppcoat.atomic import whole_file
from ppcoat.bench.flags import QuickstartFlags
from ppcoat.bench.parallel_jobs import Job, run_parallel
from ppcoat.config.flags import from_flags
from ppcoat.config.load import load_config
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.device import set_device, tune_host
from ppcoat.errors import ConfigError
from ppcoat.infer.garment_scores import GarmentClassifier, classify, held_out_garments
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.train.checkpoint import check_run_folder
from ppcoat.train.run import train_lora
from ppcoat.train.trainer import TrainingResult

MOTIF = garments.MOTIFS[0]
PICTURES, DATA_SEED = 96, 7
GRID_COLUMNS, DRAWN_AT_ONCE = 8, 50
DRAWN = ".drawn_by_quickstart"  # file in a data folder that marks it as made here


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(QuickstartFlags, arguments)
    tune_host()
    if flags.samples < 1:
        raise ConfigError(f"--samples: came {flags.samples}, wanted at least 1")
    quickstart(flags.config, flags.overrides, flags.samples)


def quickstart(config_file: str, overrides: list[str], samples: int) -> None:
    """Draw, train twice, draw again, measure, print."""
    with_coat = load_config(config_file, overrides)
    without = load_config(
        config_file, [*overrides, f"name={with_coat.name}_off", "coat.enabled=false", "sample.sample_every=0"]
    )
    model = with_coat.model  # looked for before earlier results are removed
    check_folder(FluxFiles.found(model.name_or_path, "model.name_or_path", **model.beside))
    check_run_folder(with_coat.run_dir)
    folder = Path(with_coat.output_dir)
    for config in (with_coat, without):
        remove_earlier(config.run_dir, "config.yaml")
    draw_data(with_coat)
    what, log = f"training {with_coat.train.steps} steps", folder / f"{without.name}.log"
    jobs = [
        Job(f"{what} with COAT", train_lora, (with_coat,)),
        Job(f"{what} without COAT: same seed, same data", train_lora, (without,), log),
    ]
    coat, plain = run_parallel(jobs, with_coat.device)
    rates, grid = draw_and_score(with_coat, coat.lora_file, samples)
    picture = folder / "before_after.png"
    with whole_file(picture) as draft:
        grid.save(draft)
    print(quickstart_summary(with_coat, coat, plain, rates, samples, picture))


def draw_data(config: RunConfig) -> None:
    """Write drawings with the motif into the run's data folder."""
    data = Path(config.data.folder_path)
    remove_earlier(data, DRAWN)
    print(f"drawing {PICTURES} garments with a {MOTIF} into {data}")
    data.mkdir(parents=True)
    (data / DRAWN).touch()
    garments.write_folder(data, PICTURES, DATA_SEED, config.data.resolution, MOTIF, "[trigger] ")


def remove_earlier(folder: Path, sign: str) -> None:
    """Remove a folder of an earlier call, which contains the file `sign`. Raises ConfigError for any other
    folder that is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / sign).exists():
        raise ConfigError(f"{folder} is not from an earlier call of this: move it, or choose another folder")
    shutil.rmtree(folder, ignore_errors=True)


def draw_and_score(config: RunConfig, lora_file: Path, samples: int) -> tuple[dict[str, float], Image.Image]:
    """Draw `samples` pictures of each set (see _draw_sets) -> ({set: motif rate}, grid of the first pictures,
    LoRA off above, on below)."""
    pictures = draw_in_halves(_draw_sets, config, lora_file, samples)
    rates = {name: motif_rate(drawn) for name, drawn in pictures.items()}
    grid = [pictures[name][:GRID_COLUMNS] for name in ("off", "on")]
    return rates, contact_sheet(grid, ["LoRA off", "LoRA on"])


def draw_in_halves(
    draw_sets: Callable[[RunConfig, Path, int, int], dict[str, list]],
    config: RunConfig,
    lora_file: Path,
    samples: int,
) -> dict[str, list]:
    """The sets that draw_sets(config, lora_file, start, stop) draws, each of `samples` pictures, in two jobs
    of half of them."""
    half = -(-samples // 2)
    parts = [(0, half), (half, samples)] if samples > 1 else [(0, 1)]
    log = Path(config.output_dir) / "drawing.log"
    jobs = [
        Job(
            f"drawing, pictures {start + 1} to {stop}",
            draw_sets,
            (config, lora_file, start, stop),
            log if start else None,
        )
        for start, stop in parts
    ]
    done = run_parallel(jobs, config.device)
    return {name: [picture for each in done for picture in each[name]] for name in done[0]}


def _draw_sets(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list[Image.Image]]:
    """Pictures `start` to `stop` of three sets: the LoRA off, on, and on without the trigger word."""
    pipeline = loaded(config)
    captions = [garment.caption for garment in held_out_garments(stop)[start:]]
    with_trigger = [f"{config.trigger_word} {caption}" for caption in captions]
    off = draw_prompts(pipeline, with_trigger, config, start)
    pipeline.load_lora_weights(lora_file)
    on, no_trigger = (
        draw_prompts(pipeline, with_trigger, config, start),
        draw_prompts(pipeline, captions, config, start),
    )
    return {"off": off, "on": on, "no_trigger": no_trigger}


def motif_rate(pictures: list[Image.Image]) -> float:
    """Share of the pictures in which the detector finds the motif."""
    return float(np.mean(classify(GarmentClassifier.load(), pictures)["motif"] == MOTIF))


def loaded(config: RunConfig, kind: type[FluxPipeline] = FluxPipeline) -> FluxPipeline:
    """The model of the config on its device, as a pipeline of that kind."""
    set_device(config.device)
    pipeline = kind.from_pretrained(config.model.name_or_path, **config.model.beside)
    pipeline.set_progress_bar_config(desc="drawing")
    return pipeline


def draw_prompts(
    pipeline: FluxPipeline, prompts: list[str], config: RunConfig, first: int = 0, **given: list | float
) -> list[Image.Image]:
    """One picture per prompt; picture i is drawn from the config's seed + first + i. given: what else the
    pipeline takes, lists of one a prompt or numbers for all."""
    sample, pictures = config.sample, []
    for start in range(0, len(prompts), DRAWN_AT_ONCE):
        few = slice(start, start + DRAWN_AT_ONCE)
        pictures += pipeline(
            prompt=prompts[few],
            **{name: value[few] if isinstance(value, list) else value for name, value in given.items()},
            height=sample.height,
            width=sample.width,
            num_inference_steps=sample.sample_steps,
            guidance_scale=sample.guidance_scale,
            seed=sample.seed + first + start,
        ).images
    return pictures


def contact_sheet(
    rows: list[list[Image.Image]], names: list[str], scale: int = 2, heads: Sequence[str] = ()
) -> Image.Image:
    """Rows of pictures, enlarged `scale` times, with the name of each row on the left, and heads above the
    columns."""
    width, height = (side * scale for side in rows[0][0].size)
    margin, top = 70, 16 if heads else 0
    sheet = Image.new("RGB", (margin + width * len(rows[0]), top + height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for x, head in enumerate(heads):
        pen.text((margin + x * width + 3, 2), head, fill="black")
    for y, (row, name) in enumerate(zip(rows, names, strict=True)):
        pen.text((6, top + y * height + height // 2), name, fill="black")
        for x, picture in enumerate(row):
            place = margin + x * width, top + y * height
            sheet.paste(picture.resize((width, height), Image.NEAREST), place)
    return sheet


def final_loss(result: TrainingResult, steps: int = 50) -> float:
    """Mean loss of the last `steps` steps, in which both runs have the same pictures, noise and noise
    levels."""
    return float(np.mean(result.losses[-steps:]))


def quickstart_summary(
    config: RunConfig,
    coat: TrainingResult,
    plain: TrainingResult,
    rates: dict[str, float],
    samples: int,
    picture: Path,
) -> str:
    """The table that quickstart prints at its end."""
    parameters = sum(np.prod(shape) for shape in _lora_shapes(coat.lora_file))
    losses = [final_loss(result) for result in (coat, plain)]
    rows = [
        ("", "COAT on", "COAT off"),
        ("final loss (mean of last 50 steps)", *(f"{loss:.4f}" for loss in losses)),
        ("activations kept for backward, MiB", *(f"{r.bytes_kept / 2**20:.2f}" for r in (coat, plain))),
        (
            "optimizer states, bytes per parameter",
            *(f"{r.optimizer_bytes / parameters:.3f}" for r in (coat, plain)),
        ),
        ("training seconds, with previews", *(f"{r.seconds:.0f}" for r in (coat, plain))),
    ]
    lines = [f"{name:40s}{on:>10s}{off:>10s}" for name, on, off in rows]
    difference = 100 * (losses[0] / losses[1] - 1)
    lines += [
        f"difference of final losses: {difference:+.2f} % (wanted: within 3 %)",
        "",
        f"pictures in which the detector finds the {MOTIF}, of {samples} each:",
        f"  LoRA on, with '{config.trigger_word}'      {rates['on']:6.0%}   (wanted: at least 80 %)",
        f"  LoRA off, with '{config.trigger_word}'     {rates['off']:6.0%}   (wanted: at most 10 %)",
        f"  LoRA on, without '{config.trigger_word}'   {rates['no_trigger']:6.0%}",
        "",
        f"LoRA: {coat.lora_file}",
        f"before and after: {picture}",
    ]
    return "\n" + "\n".join(lines)


def _lora_shapes(file: Path) -> list[list[int]]:
    from safetensors import safe_open

    with safe_open(str(file), framework="np") as tensors:
        return [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
