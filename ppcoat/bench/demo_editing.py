"""Two demonstrations of LoRAs trained on pairs: edits of a picture ("make it blue", "add a star")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.bench.demo import Demo, Measure, Shown
from ppcoat.bench.quickstart import MOTIF, contact_sheet, draw_in_halves
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.data.garments import COLOURS, Garment
from ppcoat.device import set_device
from ppcoat.infer.garment_scores import GarmentClassifier, classify
from ppcoat.models.flux.kontext import FluxKontextPipeline

PAIRS, DATA_SEED, UNSEEN_SEED = 384, 11, 30_000_000
AT_ONCE, COLUMNS = 50, 10


@dataclass(frozen=True)
class EditPair:
    """A garment, the colour that it shall have or None for a star, and the seed of both drawings."""

    garment: Garment
    colour: str | None
    seed: int

    @property
    def prompt(self) -> str:
        """What is asked for; it names no kind."""
        return "add a star" if self.colour is None else f"make it {self.colour}"

    @property
    def before(self) -> Image.Image:
        return garments.draw(self.garment, self.seed)

    @property
    def after(self) -> Image.Image:
        if self.colour is None:
            return garments.draw(self.garment, self.seed, motif=MOTIF)
        return garments.draw(replace(self.garment, colour=self.colour), self.seed)


def edit_pairs(count: int, seed: int, unseen: bool = False) -> list[EditPair]:
    """Half "make it ...", half "add a star". unseen: garments that no training saw."""
    candidates, rng = garments.split_garments()[unseen], np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        garment = garments.choose(candidates, rng)
        others = [c for c in COLOURS if c not in (garment.colour, garment.pattern_colour)]
        colour = others[rng.integers(len(others))]
        pairs.append(EditPair(garment, colour if i % 2 == 0 else None, seed * 1000 + i))
    return pairs


class Edit(Demo):
    """ "make it blue", "add a star" """

    folders = {"datasets.0.folder_path": "after", "datasets.0.control_path.0": "before"}

    def write_data(self, data: Path) -> None:
        write_pairs(data, edit_pairs(PAIRS, DATA_SEED))

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        pairs = edit_pairs(samples, UNSEEN_SEED, unseen=True)
        drawn = draw_in_halves(_draw_edits, config, lora_file, samples)
        return judged(pairs, drawn)


def judged(pairs: list[EditPair], drawn: dict[str, list[Image.Image]]) -> Shown:
    judge = GarmentClassifier.load()
    seen = {name: classify(judge, pictures) for name, pictures in drawn.items()}
    true = classify(judge, [pair.after for pair in pairs])
    kinds = np.array([pair.garment.kind for pair in pairs])
    colours = np.array([pair.colour or pair.garment.colour for pair in pairs])
    recolour = np.array([pair.colour is not None for pair in pairs])
    star = ~recolour
    rows = []
    for name, found in {"true drawings": true, **seen}.items():
        rows += [
            Measure(f"{name}: kind kept", float((found["kind"] == kinds).mean()), 0.8),
            Measure(f"{name}: recolour: kind", float((found["kind"] == kinds)[recolour].mean()), 0.8),
            Measure(f"{name}: colour as asked", float((found["colour"] == colours)[recolour].mean()), 0.8),
            Measure(f"{name}: star", float((found["motif"] == MOTIF)[star].mean()), 0.8),
            Measure(f"{name}: star: colour kept", float((found["colour"] == colours)[star].mean()), 0.8),
            Measure(
                f"{name}: star where none asked", float((found["motif"] == MOTIF)[recolour].mean()), None, 0.1
            ),
        ]
    few = slice(0, COLUMNS)
    sheet = contact_sheet(
        [[pair.before for pair in pairs[few]], drawn["edited"][few], [pair.after for pair in pairs[few]]],
        ["reference", "output", "wanted"],
        heads=[pair.prompt for pair in pairs[few]],
    )
    return Shown(rows, {"edit": sheet})


def write_pairs(data: Path, pairs: list[EditPair]) -> None:
    for name in ("before", "after"):
        (data / name).mkdir()
    for i, pair in enumerate(pairs):
        pair.before.save(data / "before" / f"{i:04d}.png")
        pair.after.save(data / "after" / f"{i:04d}.png")
        (data / "after" / f"{i:04d}.txt").write_text(pair.prompt + "\n", encoding="utf-8")


def _draw_edits(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list[Image.Image]]:
    set_device(config.device)
    pipeline = FluxKontextPipeline.from_pretrained(config.model.name_or_path, **config.model.beside)
    pipeline.load_lora_weights(lora_file)
    pairs = edit_pairs(stop + 1, UNSEEN_SEED, unseen=True)
    prompts = [pair.prompt for pair in pairs[start:stop]]
    own = [[pair.before] for pair in pairs[start:stop]]
    others = [[pair.before] for pair in pairs[start + 1 : stop + 1]]
    return {
        "edited": draw_after(pipeline, prompts, own, config, start),
        "other's reference": draw_after(pipeline, prompts, others, config, start),
    }


def draw_after(
    pipeline: FluxKontextPipeline,
    prompts: list[str],
    references: list[list[Image.Image]],
    config: RunConfig,
    first: int = 0,
) -> list[Image.Image]:
    """One picture per prompt after its references."""
    sample, pictures = config.sample, []
    for start in range(0, len(prompts), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        pictures += pipeline(
            references[few],
            prompts[few],
            height=sample.height,
            width=sample.width,
            num_inference_steps=sample.sample_steps,
            guidance_scale=sample.guidance_scale,
            seed=sample.seed + first + start,
            max_area=sample.height * sample.width,
            _auto_resize=False,
        ).images
    return pictures
