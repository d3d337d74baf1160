"""A LoRA that leaves alone what it was not asked about: `python -m ppcoat demo preserve`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.bench.demo import Demo, Measure, Shown
from ppcoat.bench.parallel_jobs import Job, run_parallel
from ppcoat.bench.quickstart import (
    DATA_SEED,
    GRID_COLUMNS,
    MOTIF,
    PICTURES,
    contact_sheet,
    draw_in_halves,
    draw_prompts,
    loaded,
    motif_rate,
)
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.infer.garment_scores import held_out_garments
from ppcoat.train.run import train_lora

SETS = {  # of pictures -> how the sheet calls them
    "base": "base,\nno 'sks'",
    "plain, with": "LoRA,\n'sks'",
    "plain, without": "LoRA,\nno 'sks'",
    "preserved, with": "preserved,\n'sks'",
    "preserved, without": "preserved,\nno 'sks'",
}


class Preserve(Demo):
    """The quickstart's star, with and without `train.diff_output_preservation`."""

    folders = {"datasets.0.folder_path": "with_star"}

    def write_data(self, data: Path) -> None:
        folder = data / self.folders["datasets.0.folder_path"]
        garments.write_folder(folder, PICTURES, DATA_SEED, 64, MOTIF, "[trigger] ")

    def train(self, config: RunConfig) -> Path:
        """Both LoRAs at the same time -> the file of the one with preservation."""
        plain = _without(config)
        log = Path(config.output_dir) / f"{plain.name}.log"
        jobs = [
            Job("with preservation", train_lora, (config,)),
            Job("without: same seed, same data", train_lora, (plain,), log),
        ]
        return run_parallel(jobs, config.device)[0].lora_file

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        drawn = draw_in_halves(_draw_sets, config, lora_file, samples)
        star = {name: motif_rate(pictures) for name, pictures in drawn.items()}
        word = f"'{config.trigger_word}'"
        measures = [
            Measure(f"star: base, without {word}", star["base"], at_most=0.1),
            Measure(f"star: LoRA, with {word}", star["plain, with"]),
            Measure(f"star: LoRA, without {word}", star["plain, without"]),
            Measure(f"star: LoRA with preservation, with {word}", star["preserved, with"], 0.8),
            Measure(f"star: LoRA with preservation, without {word}", star["preserved, without"], at_most=0.2),
            *(
                Measure(
                    f"distance from base, without {word}: {name}",
                    _levels(drawn[f"{key}, without"], drawn["base"]),
                    unit="levels",
                )
                for key, name in (("plain", "LoRA"), ("preserved", "LoRA with preservation"))
            ),
        ]
        rows = [drawn[name][:GRID_COLUMNS] for name in SETS]
        note = "distance: mean difference of two pictures of one prompt and seed, in 255 levels"
        return Shown(measures, {"preserve": contact_sheet(rows, list(SETS.values()))}, [note])


def _without(config: RunConfig) -> RunConfig:
    """The same run without preservation."""
    train = config.train.model_copy(update={"diff_output_preservation": False})
    return config.model_copy(update={"name": f"{config.name}_plain", "train": train})


def _draw_sets(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list[Image.Image]]:
    """Pictures `start` to `stop` of all SETS; one seed for each prompt in all of them."""
    pipeline = loaded(config)
    without = [garment.caption for garment in held_out_garments(stop)[start:]]
    prompts = {"with": [f"{config.trigger_word} {caption}" for caption in without], "without": without}
    pictures = {"base": draw_prompts(pipeline, without, config, start)}
    plain = _without(config)
    files = {"plain": plain.run_dir / f"{plain.name}.safetensors", "preserved": lora_file}
    for kind, file in files.items():
        pipeline.load_lora_weights(file)
        for name, asked in prompts.items():
            pictures[f"{kind}, {name}"] = draw_prompts(pipeline, asked, config, start)
        pipeline.unload_lora_weights()
    return pictures


def _levels(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Mean absolute difference of two lists of pictures, of 255."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(np.float32(one) - np.float32(other)).mean() for one, other in pairs]))
