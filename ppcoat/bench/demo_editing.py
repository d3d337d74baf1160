"""Two demonstrations of LoRAs that learn from pairs to look at references: edits of a picture ("make it
blue", "add a star"), and a garment put on a figure in a pose.

The captions of the edits tell no kind of garment, so that it can only come from the reference; what is drawn
after another one's shows it. "wear the dress" tells the kind and no colour.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.bench.demo import Demo, Measure, Shown, through_autoencoder
from ppcoat.bench.quickstart import MOTIF, contact_sheet, draw_in_halves, draw_prompts, loaded
from ppcoat.config.schema import RunConfig
from ppcoat.data import garments
from ppcoat.data.figures import Pose, draw_figure, draw_pose
from ppcoat.data.garments import COLOURS, KINDS, Garment
from ppcoat.infer.garment_scores import GarmentClassifier, classify
from ppcoat.models.flux.editing import FluxKontextPipeline

DATA_SEED, UNSEEN_SEED = 11, 30_000
COLUMNS = 10
# Of two silhouettes: in both, of in either. 1 % of other poses reach it, too; a figure that wears nothing
# does (0.88 in the mean), so it is of the pose alone.
SAME_PLACE = 0.7


class DrawnPair(ABC):
    """What a LoRA learns from: references, a caption and the picture that is wanted."""

    prompt: str

    @property
    @abstractmethod
    def references(self) -> list[Image.Image]:
        """In the order of the config's folders."""

    @property
    @abstractmethod
    def wanted(self) -> Image.Image:
        """The true drawing."""


@dataclass(frozen=True)
class EditPair(DrawnPair):
    """A garment, and itself in another colour or, where that is None, with a star. seed: of both drawings."""

    garment: Garment
    colour: str | None
    seed: int

    @property
    def prompt(self) -> str:
        return "add a star" if self.colour is None else f"make it {self.colour}"

    @cached_property
    def references(self) -> list[Image.Image]:
        return [garments.draw(self.garment, self.seed)]

    @cached_property
    def wanted(self) -> Image.Image:
        if self.colour is None:
            return garments.draw(self.garment, self.seed, motif=MOTIF)
        return garments.draw(replace(self.garment, colour=self.colour), self.seed)


@dataclass(frozen=True)
class WornPair(DrawnPair):
    """A garment, and a figure in a pose that wears it. seed: of the drawings and of the pose."""

    garment: Garment
    seed: int

    @property
    def prompt(self) -> str:
        """It names the kind, as people do; this model does not learn it from the garment's picture."""
        return f"wear the {self.garment.kind}"

    @cached_property
    def pose(self) -> Pose:
        return Pose.random(self.seed)

    @cached_property
    def references(self) -> list[Image.Image]:
        return [draw_pose(self.pose), garments.draw(self.garment, self.seed)]

    @cached_property
    def wanted(self) -> Image.Image:
        return draw_figure(self.pose, self.garment, self.seed)


def edit_pairs(count: int, seed: int, unseen: bool) -> list[EditPair]:
    """Half of them "make it ...", half "add a star". unseen: of garments that no training saw."""
    rng, pairs = np.random.default_rng([seed, 1]), []
    for number, garment in enumerate(_garments(count, seed, unseen)):
        others = [each for each in COLOURS if each != garment.colour]
        colour = others[rng.integers(len(others))]
        pairs.append(EditPair(garment, None if number % 2 else colour, seed * 10_000 + number))
    return pairs


def worn_pairs(count: int, seed: int, unseen: bool) -> list[WornPair]:
    """Garments on figures. unseen: garments that no training saw."""
    return [
        WornPair(garment, seed * 10_000 + number)
        for number, garment in enumerate(_garments(count, seed, unseen))
    ]


def _garments(count: int, seed: int, unseen: bool) -> list[Garment]:
    """Plain ones, for so small a model. Each kind keeps two of its eight colours for `unseen`."""
    candidates = [
        Garment(kind, colour, "plain")
        for row, kind in enumerate(KINDS)
        for column, colour in enumerate(COLOURS)
        if ((row + column) % 4 == 0) == unseen
    ]
    return [candidates[i] for i in np.random.default_rng(seed).integers(len(candidates), size=count)]


class Edit(Demo):
    """ "make it blue", "add a star": the kind kept, the rest as asked, all in its place."""

    folders = {"datasets.0.folder_path": "wanted", "datasets.0.control_path.0": "reference_1"}
    count = 384

    def write_data(self, data: Path) -> None:
        write_pairs(data, edit_pairs(self.count, DATA_SEED, unseen=False))

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        pairs = edit_pairs(samples, UNSEEN_SEED, unseen=True)
        drawn = draw_in_halves(_draw_edits, config, lora_file, samples)
        own, others = drawn["after its own"], drawn["after another's"]
        kinds = [pair.garment.kind for pair in edit_pairs(samples + 1, UNSEEN_SEED, unseen=True)]
        seen = classify(GarmentClassifier.load(), others)["kind"]
        measures = [
            *_told("true drawings", edit_rates(pairs, [pair.wanted for pair in pairs])),
            *(Measure(name, rate, at_least=0.8) for name, rate in edit_rates(pairs, own).items()),
            Measure("mean overlap of what changed with what should", overlap_of_changes(pairs, own)),
            Measure("after another's picture: kind kept", float(np.mean(seen == kinds[:-1])), at_most=0.35),
            Measure("after another's picture: kind of that one", float(np.mean(seen == kinds[1:]))),
        ]
        return Shown(measures, {"edit": pair_sheet(pairs, own, ["picture"])})


class TryOn(Demo):
    """A garment from one picture on a figure in the pose of another."""

    folders = {
        "datasets.0.folder_path": "wanted",
        "datasets.0.control_path.0": "reference_1",
        "datasets.0.control_path.1": "reference_2",
    }
    count = 480

    def write_data(self, data: Path) -> None:
        write_pairs(data, worn_pairs(self.count, DATA_SEED, unseen=False))

    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        pairs = worn_pairs(samples, UNSEEN_SEED, unseen=True)
        drawn = draw_in_halves(_draw_worn, config, lora_file, samples)
        dressed, best = drawn["dressed"], "true drawings through the autoencoder"
        seen = seen_on(pairs, dressed)
        found, places = worn_rates(pairs, seen)
        true, true_places = worn_rates(pairs, seen_on(pairs, drawn["true"]))
        # each picture beside the garment and the pose of the next one
        chance, other_places = worn_rates([*pairs[1:], pairs[0]], seen)
        measures = [
            *_told(best, true | {"mean overlap of silhouettes": true_places}),
            *(Measure(name, rate, at_least=0.8) for name, rate in found.items()),
            Measure("mean overlap of silhouettes", places),
            *_told("by chance", chance | {"mean overlap of silhouettes": other_places}),
        ]
        return Shown(measures, {"try_on": pair_sheet(pairs, dressed, ["pose", "garment"])})


def _told(what: str, rates: dict[str, float]) -> list[Measure]:
    return [Measure(f"{what}: {name}", rate) for name, rate in rates.items()]


def write_pairs(data: Path, pairs: Sequence[DrawnPair]) -> None:
    """Write wanted/0000.png with its caption, reference_1/0000.png and so on into the folder `data`."""
    for number, pair in enumerate(pairs):
        pictures = {"wanted": pair.wanted}
        pictures |= {f"reference_{place + 1}": each for place, each in enumerate(pair.references)}
        for name, picture in pictures.items():
            (data / name).mkdir(exist_ok=True)
            picture.save(data / name / f"{number:04d}.png")
        (data / "wanted" / f"{number:04d}.txt").write_text(pair.prompt + "\n", encoding="utf-8")


def pair_sheet(pairs: Sequence[DrawnPair], drawn: list[Image.Image], names: list[str]) -> Image.Image:
    """Of the first pairs: references, with those names, what was drawn after them, and what is wanted."""
    few = pairs[:COLUMNS]
    rows = [list(row) for row in zip(*(pair.references for pair in few), strict=True)]
    rows += [drawn[:COLUMNS], [pair.wanted for pair in few]]
    return contact_sheet(rows, [*names, "drawn", "wanted"], heads=[pair.prompt for pair in few])


def edit_rates(pairs: Sequence[EditPair], pictures: list[Image.Image]) -> dict[str, float]:
    """Shares of pictures in which the classifier finds what is wanted."""
    seen = classify(GarmentClassifier.load(), pictures)
    star = np.array([pair.colour is None for pair in pairs])
    kind = seen["kind"] == np.array([pair.garment.kind for pair in pairs])
    colour = seen["colour"] == np.array([pair.colour or pair.garment.colour for pair in pairs])
    rates = {"kind kept": kind}
    if not star.all():
        rates["make it ...: colour as asked"] = colour[~star]
    if star.any():
        rates |= {
            "add a star: star found": (seen["motif"] == MOTIF)[star],
            "add a star: colour kept": colour[star],
        }
    return {name: float(np.mean(found)) for name, found in rates.items()}


def overlap_of_changes(pairs: Sequence[EditPair], pictures: list[Image.Image]) -> float:
    """Mean over the pictures: where they differ from the reference, and where the true drawing does."""
    overlaps = []
    for pair, picture in zip(pairs, pictures, strict=True):
        before = np.asarray(pair.references[0], np.float32)
        overlaps.append(overlap(differs(picture, before), differs(pair.wanted, before)))
    return float(np.mean(overlaps))


def seen_on(
    pairs: Sequence[WornPair], pictures: list[Image.Image]
) -> list[tuple[Garment | None, np.ndarray]]:
    """Of each picture of a pair the garment that is `recognised` in it, and its silhouette, bool [H, W]."""
    return [(recognised(*each), silhouette(*each)) for each in zip(pictures, pairs, strict=True)]


def worn_rates(
    pairs: Sequence[WornPair], seen: Sequence[tuple[Garment | None, np.ndarray]]
) -> tuple[dict[str, float], float]:
    """What `seen_on` saw, beside these pairs -> (shares with the garment's kind, with its colour, and with
    the figure in its pose, mean overlap of silhouettes)."""
    garments_seen, silhouettes = zip(*seen, strict=True)
    places = [
        overlap(each, silhouette(pair.wanted, pair)) for each, pair in zip(silhouettes, pairs, strict=True)
    ]
    both = list(zip(garments_seen, [pair.garment for pair in pairs], strict=True))
    named = {
        "kind recognised": [one is not None and one.kind == other.kind for one, other in both],
        "colour recognised": [one is not None and one.colour == other.colour for one, other in both],
        "pose kept": [place >= SAME_PLACE for place in places],
    }
    return {name: float(np.mean(found)) for name, found in named.items()}, float(np.mean(places))


def silhouette(picture: Image.Image, pair: WornPair) -> np.ndarray:
    """bool [H, W]: where a picture is not the background of the pair's pose."""
    return differs(picture, 255 * np.float32(pair.pose.background))


def recognised(picture: Image.Image, pair: WornPair) -> Garment | None:
    """The garment of which a drawing in this pose is nearest to the picture: first of each kind, in the
    colours of the pair's garment, then of each colour. None where a figure that wears nothing is nearer."""
    worn = [None, *(replace(pair.garment, kind=kind) for kind in KINDS)]
    best = min(worn, key=lambda each: _distance(picture, pair, each))
    if best is None:
        return None
    colours = [replace(best, colour=each) for each in COLOURS]
    return min(colours, key=lambda each: _distance(picture, pair, each))


def _distance(picture: Image.Image, pair: WornPair, garment: Garment | None) -> float:
    drawing = draw_figure(pair.pose, garment, pair.seed)
    return float(np.abs(np.asarray(picture, np.float32) - np.asarray(drawing, np.float32)).mean())


def differs(picture: Image.Image, other: np.ndarray) -> np.ndarray:
    """bool [H, W]: where a picture is not `other`, float32 [H, W, 3] or a colour [3], in 0..255."""
    return np.abs(np.asarray(picture, np.float32) - other).sum(-1) > 60


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Of two areas, bool [H, W]: what is in both, of what is in either."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def _draw_edits(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list[Image.Image]]:
    pipeline = _with_lora(config, lora_file)
    pairs = edit_pairs(stop + 1, UNSEEN_SEED, unseen=True)
    own, others = pairs[start:stop], pairs[start + 1 :]
    return {
        "after its own": draw_after(pipeline, own, own, config, start),
        "after another's": draw_after(pipeline, own, others, config, start),
    }


def _draw_worn(config: RunConfig, lora_file: Path, start: int, stop: int) -> dict[str, list[Image.Image]]:
    pipeline = _with_lora(config, lora_file)
    pairs = worn_pairs(stop, UNSEEN_SEED, unseen=True)[start:]
    return {
        "true": through_autoencoder(pipeline, [pair.wanted for pair in pairs]),
        "dressed": draw_after(pipeline, pairs, pairs, config, start),
    }


def _with_lora(config: RunConfig, lora_file: Path) -> FluxKontextPipeline:
    pipeline = loaded(config, FluxKontextPipeline)
    pipeline.load_lora_weights(lora_file)
    return pipeline


def draw_after(
    pipeline: FluxKontextPipeline,
    pairs: Sequence[DrawnPair],
    shown: Sequence[DrawnPair],
    config: RunConfig,
    first: int,
) -> list[Image.Image]:
    """One picture for each pair's prompt after the references of one of `shown`, at their size; picture i is
    drawn from the config's seed + first + i."""
    return draw_prompts(
        pipeline,
        [pair.prompt for pair in pairs],
        config,
        first,
        image=[pair.references for pair in shown],
        max_area=config.sample.height * config.sample.width,
        _auto_resize=False,
    )
