"""Two demonstrations of drawing from a picture: inpainting what a mask marks, and a style laid over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from ppcoat.bench.demo import Demo, Measure, Shown, through_autoencoder
from ppcoat.bench.demo_editing import overlap
from ppcoat.bench.quickstart import MOTIF, contact_sheet, draw_in_halves, draw_prompts, loaded
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.data.garments import PAPER, Garment
from ppcoat.infer.garment_scores import GarmentClassifier, classify, held_out_garments
from ppcoat.models.flux.editing import FluxImg2ImgPipeline, FluxInpaintPipeline

TRIGGER = "[trigger] "
PICTURES, INPAINT_SEED, STYLE_SEED = 192, 17, 19
UNSEEN_SEED = 40_000_000
COLUMNS = 10
STRENGTHS = (0.4, 0.6, 0.7, 0.8, 1.0)
STRENGTH = 0.7  # of the measures
# Bounds of `is_pen`, in the gaps between true drawings of both styles after the autoencoder.
PAPER_SHARE, DARK_SHARE = 0.7, 0.55


@dataclass(frozen=True)
class Unseen:
    """A garment that no training saw and the seed of its drawings."""

    garment: Garment
    seed: int

    @cached_property
    def picture(self) -> Image.Image:
        return garments.draw(self.garment, self.seed)

    @cached_property
    def starred(self) -> Image.Image:
        return garments.draw(self.garment, self.seed, motif=MOTIF)

    @cached_property
    def penned(self) -> Image.Image:
        return garments.draw(self.garment, self.seed, pen=True)

    @cached_property
    def chest(self) -> Image.Image:
        """Mask of a box around the place of a star."""
        return changed_box(self.picture, self.starred)

    @cached_property
    def half(self) -> Image.Image:
        """Mask of the lower half of the picture, or of the right one."""
        mask = Image.new("L", self.picture.size)
        width, height = mask.size
        mask.paste(255, (0, height // 2, width, height) if self.seed % 2 else (width // 2, 0, width, height))
        return mask

    @cached_property
    def silhouette(self) -> np.ndarray:
        """bool [H, W]: where the cloth is, which is what changes with its colour."""
        red, blue = (garments.draw(Garment(self.garment.kind, colour, "plain"), self.seed)
                     for colour in ("red", "blue"))  # fmt: skip
        return np.asarray(ImageChops.difference(red, blue), int).sum(-1) > 60


def unseen(start: int, stop: int) -> list[Unseen]:
    """Numbers `start` to `stop`."""
    held_out = held_out_garments(stop)
    return [Unseen(held_out[i], UNSEEN_SEED + i) for i in range(start, stop)]


def changed_box(before: Image.Image, after: Image.Image, margin: int = 2) -> Image.Image:
    """Mask: white in the box around what differs, and `margin` pixels more."""
    difference = ImageChops.difference(before, after).convert("L").point(lambda level: 255 * (level > 10))
    left, top, right, bottom = difference.getbbox()
    mask = Image.new("L", before.size)
    mask.paste(255, (left - margin, top - margin, right + margin, bottom + margin))
    return mask


class Inpaint(Demo):
    """The half of a garment, by the model itself; a star on its chest, by a LoRA."""

    folders = {"datasets.0.folder_path": "stars", "datasets.0.mask_path": "masks"}

    def write_data(self, data: Path) -> None:
        for name in ("stars", "masks"):
            (data / name).mkdir()
        for i, garment in _trained(INPAINT_SEED):
            one = Unseen(garment, INPAINT_SEED * 100_000 + i)
            one.chest.save(data / "masks" / f"{i:04d}.png")
            garments.write_captioned(data / "stars", i, one.starred, TRIGGER + garment.caption)

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        drawn = draw_in_halves(_draw_inpainted, config, lora_file, samples)
        return judged_inpainting(unseen(0, samples), drawn)


def _draw_inpainted(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list]:
    """Sets of pictures `start` to `stop`: what the autoencoder makes of the inputs, of these with a hole or
    true star, and what is drawn."""
    pipeline = loaded(config, FluxInpaintPipeline)
    ones = unseen(start, stop)
    pictures, halves, chests = ([getattr(one, name) for one in ones] for name in ("picture", "half", "chest"))
    captions = [one.garment.caption for one in ones]
    triggered = [f"{config.trigger_word} {caption}" for caption in captions]

    def draw(prompts: list[str], masks: list[Image.Image]) -> list[Image.Image]:
        return draw_prompts(pipeline, prompts, config, start, image=pictures, mask_image=masks, strength=1.0)

    sets = {"as the VAE has it": through_autoencoder(pipeline, pictures)}
    sets["true star"] = through_autoencoder(pipeline, [one.starred for one in ones])
    sets["half"], sets["LoRA off"] = draw(captions, halves), draw(triggered, chests)
    pipeline.load_lora_weights(lora_file)
    return sets | {"LoRA on": draw(triggered, chests)}


def judged_inpainting(ones: list[Unseen], drawn: dict[str, list[Image.Image]]) -> Shown:
    """The table and the sheet of what `_draw_inpainted` drew."""
    pictures, before = [one.picture for one in ones], drawn["as the VAE has it"]
    halves, chests = [one.half for one in ones], [one.chest for one in ones]
    holes = hidden(pictures, halves)
    rates = {name: shares(some, ones) for name, some in (drawn | {"hole": holes}).items()}
    measures = [
        *(Measure(f"true drawings: {what}", rates["as the VAE has it"][what]) for what in ("kind", "colour")),
        Measure("true drawings: star, with one", rates["true star"]["star"]),
        Measure("half of it grey: kind", rates["hole"]["kind"]),
        Measure("half of it filled: kind", rates["half"]["kind"], 0.8),
        Measure("half of it filled: colour", rates["half"]["colour"], 0.8),
        *_edges("half of it filled", before, drawn["half"], halves),
        Measure("chest, LoRA on: star", rates["LoRA on"]["star"], 0.8),
        Measure("chest, LoRA off: star", rates["LoRA off"]["star"], None, 0.1),
        Measure("chest, LoRA on: kind", rates["LoRA on"]["kind"], 0.8),
        Measure("chest, LoRA on: colour", rates["LoRA on"]["colour"], 0.8),
        *_edges("chest, LoRA on", before, drawn["LoRA on"], chests),
    ]
    few = slice(0, COLUMNS)
    shown = {
        "picture": pictures,
        "a half": holes,
        "filled": drawn["half"],
        "the chest": hidden(pictures, chests),
    }
    shown |= {name: drawn[name] for name in ("LoRA off", "LoRA on")}
    return Shown(measures, {"inpaint": contact_sheet([row[few] for row in shown.values()], list(shown))})


def _edges(
    what: str, before: list[Image.Image], after: list[Image.Image], masks: list[Image.Image]
) -> list[Measure]:
    """How much the rest changed, and how hard the border of the masks is, beside what a patch of the next
    picture would give."""
    outside = [change_outside(*each) for each in zip(before, after, masks, strict=True)]
    patched = [Image.composite(*each) for each in zip(before[1:] + before[:1], before, masks, strict=True)]
    true, seam, patch = (np.mean([border_steps(*each) for each in zip(pictures, masks, strict=True)])
                         for pictures in (before, after, patched))  # fmt: skip
    return [
        Measure(f"{what}: mean change outside", float(np.mean(outside)), None, 5, "of 255"),
        Measure(f"{what}: steps across the border", float(seam / true), None, 1.5, "x the picture's"),
        Measure("  another picture's patch there: steps", float(patch / true), None, None, "x the picture's"),
    ]


def change_outside(before: Image.Image, after: Image.Image, mask: Image.Image, margin: int = 4) -> float:
    """Mean difference in levels of 255, more than `margin` pixels outside of the mask."""
    near = np.asarray(mask.filter(ImageFilter.MaxFilter(2 * margin + 1))) > 0
    difference = np.abs(np.asarray(before, np.float32) - np.asarray(after, np.float32))
    return float(difference[~near].mean()) if (~near).any() else 0.0


def border_steps(picture: Image.Image, mask: Image.Image) -> float:
    """Mean difference in levels of pixels side by side of which one is in the mask."""
    pixels, inside = np.asarray(picture, np.float32), np.asarray(mask) > 0
    across = inside[1:] != inside[:-1], inside[:, 1:] != inside[:, :-1]
    steps = np.abs(np.diff(pixels, axis=0))[across[0]], np.abs(np.diff(pixels, axis=1))[across[1]]
    return float(np.concatenate(steps).mean())


def hidden(pictures: list[Image.Image], masks: list[Image.Image]) -> list[Image.Image]:
    """The pictures with grey where the masks are white."""
    grey = Image.new("RGB", pictures[0].size, (128, 128, 128))
    return [Image.composite(grey, *each) for each in zip(pictures, masks, strict=True)]


class Style(Demo):
    """A LoRA of pen drawings, with which other drawings are drawn over."""

    folders = {"datasets.0.folder_path": "pen"}

    def write_data(self, data: Path) -> None:
        (data / "pen").mkdir()
        for i, garment in _trained(STYLE_SEED):
            plain = Garment(garment.kind, garment.colour, "plain")
            penned = garments.draw(plain, STYLE_SEED * 100_000 + i, pen=True)
            garments.write_captioned(data / "pen", i, penned, TRIGGER + plain.caption)

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        drawn = draw_in_halves(_draw_styled, config, lora_file, samples)
        return judged_style(unseen(0, samples), drawn)


def _draw_styled(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list]:
    """Sets of pictures `start` to `stop`: true drawings of both styles as the autoencoder has them, what is
    drawn without the LoRA, and with it at each of STRENGTHS, by prompts that say the kind and that do not."""
    pipeline, ones = loaded(config, FluxImg2ImgPipeline), unseen(start, stop)
    pictures = [one.picture for one in ones]
    unnamed = [f"{config.trigger_word} a plain {one.garment.colour}" for one in ones]
    prompts = [f"{prompt} {one.garment.kind}" for prompt, one in zip(unnamed, ones, strict=True)]

    def draw(prompts: list[str], strength: float) -> list[Image.Image]:
        return draw_prompts(pipeline, prompts, config, start, image=pictures, strength=strength)

    sets = {"ordinary": through_autoencoder(pipeline, pictures)}
    sets["pen"] = through_autoencoder(pipeline, [one.penned for one in ones])
    sets["LoRA off"] = draw(prompts, STRENGTH)
    pipeline.load_lora_weights(lora_file)
    sets |= {str(strength): draw(prompts, strength) for strength in STRENGTHS}
    return sets | {f"unsaid {strength}": draw(unnamed, strength) for strength in STRENGTHS}


def judged_style(ones: list[Unseen], drawn: dict[str, list[Image.Image]]) -> Shown:
    """The table and the sheet of what `_draw_styled` drew."""
    masks = [one.silhouette for one in ones]
    rows = {name: style_rates(pictures, ones, masks) for name, pictures in drawn.items()}
    others = style_rates(drawn["pen"], ones, masks[1:] + masks[:1])
    on, off = f"LoRA on, strength {STRENGTH}", f"LoRA off, strength {STRENGTH}"
    best = rows[str(STRENGTH)]
    measures = [
        Measure("true pen drawings: judged as pen", rows["pen"]["pen"]),
        Measure("ordinary drawings: judged as pen", rows["ordinary"]["pen"]),
        Measure("true pen drawings: kind", rows["pen"]["kind"]),
        Measure("true pen drawings: overlap with the picture's garment", rows["pen"]["overlap"]),
        Measure("  with another picture's", others["overlap"]),
        Measure(f"{on}: pen", best["pen"], 0.8),
        Measure(f"{on}: kind kept", best["kind"], 0.8),
        Measure(f"{on}: colour kept", best["colour"], 0.8),
        Measure(f"{on}: overlap", best["overlap"]),
        Measure(f"{on}: kind kept, unsaid by the prompt", rows[f"unsaid {STRENGTH}"]["kind"]),
        Measure(f"{off}: pen", rows["LoRA off"]["pen"], None, 0.1),
    ]
    columns = ("pen", "kind", "colour", "overlap")
    notes = ["strength" + "".join(f"{name:>9s}" for name in columns) + "  unsaid kind"]
    for strength in map(str, STRENGTHS):
        found = "".join(f"{rows[strength][name]:9.0%}" for name in columns)
        notes.append(f"{strength:>8s}{found}{rows[f'unsaid {strength}']['kind']:13.0%}")
    few = slice(0, COLUMNS)
    shown = {"input": [one.picture for one in ones], f"off, {STRENGTH}": drawn["LoRA off"]}
    shown |= {f"on, {strength}": drawn[str(strength)] for strength in STRENGTHS}
    shown["true pen"] = [one.penned for one in ones]
    sheet = contact_sheet([row[few] for row in shown.values()], list(shown))
    return Shown(measures, {"style": sheet}, [*notes, ""])


def style_rates(pictures: list[Image.Image], ones: list[Unseen], masks: list[np.ndarray]) -> dict[str, float]:
    """`shares`, and of how many are pen drawings; the mean overlap of what stands on paper with the masks,
    bool [H, W]."""
    covered = [overlap(on_paper(picture), mask) for picture, mask in zip(pictures, masks, strict=True)]
    pens = [is_pen(picture) for picture in pictures]
    return shares(pictures, ones) | {"pen": float(np.mean(pens)), "overlap": float(np.mean(covered))}


def is_pen(picture: Image.Image) -> bool:
    """Whether there is paper around and a dark line along the silhouette."""
    pixels = np.asarray(picture, np.float32) / 255
    frame = np.ones(pixels.shape[:2], bool)
    frame[4:-4, 4:-4] = False
    paper = (np.abs(pixels - PAPER).max(-1) < 0.12)[frame].mean()
    shape = on_paper(picture)
    inner = np.asarray(Image.fromarray(shape).filter(ImageFilter.MinFilter(7)))
    edge = shape & ~inner
    dark = (pixels.mean(-1) < 0.6)[edge].mean() if edge.any() else 0.0
    return bool(paper >= PAPER_SHARE and dark >= DARK_SHARE)


def on_paper(picture: Image.Image) -> np.ndarray:
    """bool [H, W]: what paper does not reach from the edge of the picture."""
    near = np.abs(np.asarray(picture, np.float32) / 255 - PAPER).max(-1) < 0.2
    field = Image.fromarray(np.pad(near, 1, constant_values=True).astype(np.uint8)).copy()
    ImageDraw.floodfill(field, (0, 0), 2)
    return np.asarray(field)[1:-1, 1:-1] != 2


def shares(pictures: list[Image.Image], ones: Sequence[Unseen]) -> dict[str, float]:
    """In how many the classifier finds the garment's kind and colour, and a star."""
    found = classify(GarmentClassifier.load(), pictures)
    wanted = {name: [getattr(one.garment, name) for one in ones] for name in ("kind", "colour")}
    rates = {name: float(np.mean(found[name] == np.array(names))) for name, names in wanted.items()}
    return rates | {"star": float(np.mean(found["motif"] == MOTIF))}


def _trained(seed: int) -> Iterator[tuple[int, Garment]]:
    candidates, rng = garments.split_garments()[0], np.random.default_rng(seed)
    for i in range(PICTURES):
        yield i, garments.choose(candidates, rng)
