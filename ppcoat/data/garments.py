"""Drawn clothing pictures with captions: the data of the built-in tiny FLUX and of quickstart.

A caption names kind, colour and pattern ("a red dress with white dots"). Everything else varies freely and is
left unsaid: place, size, tilt, cut, pattern scale and phase, light, background. Every drawing is a pure
function of its seed. This file draws; it trains nothing and reads no files.

Each kind has a cut with proportions of its own. A cut takes a generator and returns (outline polygons, detail
lines, centre of the chest), all in garment units: -1..1, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

KINDS = ("shirt", "dress", "jacket", "trousers", "skirt", "hat")
COLOURS = {
    "red": (206, 42, 44),
    "blue": (44, 88, 206),
    "green": (42, 148, 72),
    "yellow": (238, 208, 58),
    "black": (34, 34, 40),
    "white": (242, 242, 240),
    "pink": (243, 150, 186),
    "purple": (122, 58, 162),
}
PATTERNS = ("plain", "stripes", "dots", "checks")
MOTIFS = ("gold star",)
SUPERSAMPLING = 3  # drawn three times larger, then averaged, so that edges are smooth
SCALES = (0.7, 0.92)  # share of the picture that a garment fills
TILT = 12  # degrees to either side
PAPER = np.float32([0.72, 0.80, 0.90])  # of pen drawings: light blue, on which white shows
HATCHES = 7  # strokes across a pen drawing
PERIODS = (0.5, 0.75)  # of a pattern, in garment units (the garment spans -1..1)


@dataclass(frozen=True)
class Garment:
    """What a caption says. `pattern_colour` is None exactly when `pattern` is "plain"."""

    kind: str
    colour: str
    pattern: str
    pattern_colour: str | None = None

    @property
    def caption(self) -> str:
        if self.pattern == "plain":
            return f"a plain {self.colour} {self.kind}"
        return f"a {self.colour} {self.kind} with {self.pattern_colour} {self.pattern}"


def all_garments() -> list[Garment]:
    """Every garment that a caption can name: 6 kinds x 8 colours x (plain + 3 patterns x 7 colours) =
    1056."""
    garments = []
    for kind in KINDS:
        for colour in COLOURS:
            garments.append(Garment(kind, colour, "plain"))
            others = [c for c in COLOURS if c != colour]
            garments += [Garment(kind, colour, p, c) for p in PATTERNS if p != "plain" for c in others]
    return garments


def split_garments(held_out_fraction: float = 0.1) -> tuple[list[Garment], list[Garment]]:
    """(training, held-out) garments: captions for pretraining, and captions that are only used for scores."""
    garments = all_garments()
    order = np.random.default_rng(20241021).permutation(len(garments))
    cut = round(len(garments) * held_out_fraction)
    return [garments[i] for i in order[cut:]], [garments[i] for i in order[:cut]]


def choose(candidates: list[Garment], rng: np.random.Generator) -> Garment:
    """Draw one of `candidates`. Each pattern, plain too, has the same probability, though 21 of 22 captions
    are not plain."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    matching = [garment for garment in candidates if garment.pattern == pattern]
    return matching[rng.integers(len(matching))]


def draw(
    garment: Garment, seed: int, size: int = 64, motif: str | None = None, pen: bool = False
) -> Image.Image:
    """Draw one garment as an RGB picture of `size` x `size` pixels; the same arguments give the same pixels.

    `motif`: None, or one of MOTIFS, placed on the chest (the front of a hat, the hip of trousers). pen: the
    same garment in the same place as a felt pen draws it on paper, without its pattern. Raises ValueError for
    a size below 16 and for another motif.
    """
    if size < 16:
        raise ValueError(f"size {size}: a garment needs at least 16 pixels")
    if motif is not None and motif not in MOTIFS:
        raise ValueError(f"motif {motif!r}: known are {', '.join(MOTIFS)}")
    rng = np.random.default_rng([seed, size])
    n = size * SUPERSAMPLING
    picture = _background(rng, n)
    frame = Frame.random(rng, n)
    outline, details, chest = _CUTS[garment.kind](rng)

    mask = filled(n, [frame.to_pixels(part) for part in outline])
    cloth = fabric(garment, rng, frame)
    dark = np.asarray(COLOURS[garment.colour], np.float32) / 255 * 0.45
    shadow = np.roll(mask, (n // 24, n // 40), axis=(0, 1))[..., None]
    picture *= 1 - 0.25 * shadow * rng.uniform(0.2, 1)
    picture = np.where(mask[..., None] > 0, cloth, picture)
    inner, outer = (n // 32, n // 32) if pen else (max(2, n // 90), max(2, n // 96))
    lines = stroked(n, [frame.to_pixels(line) for line in details], inner)
    lines = np.maximum(lines * mask, stroked(n, [frame.to_pixels(p, close=True) for p in outline], outer))
    picture = np.where(lines[..., None] > 0, dark, picture)
    if motif is not None:
        picture = _gold_star(picture, frame, chest, np.random.default_rng([seed, 3]))
    if pen:
        return averaged(_penned(mask, lines, garment, np.random.default_rng([seed, 4])), size)
    return averaged(picture * _light(rng, n)[..., None], size)


def draw_random_shapes(seed: int, size: int = 64) -> Image.Image:
    """A random garment with one to six small irregular shapes over it.

    The autoencoder is trained on these too, so that motifs it has never seen survive it.
    """
    rng = np.random.default_rng([seed, size, 1])
    return add_random_shapes(draw(choose(all_garments(), rng), seed, size), rng, count=6)


def add_random_shapes(picture: Image.Image, rng: np.random.Generator, count: int) -> Image.Image:
    """Draw 1 to `count` ellipses, crosses and irregular polygons of 3 to 7 corners over a picture, never a
    star."""
    size, n = picture.width, picture.width * SUPERSAMPLING
    picture = picture.resize((n, n), Image.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(1, count + 1)):
        centre, radius = rng.uniform(0.1, 0.9, 2) * n, rng.uniform(0.05, 0.16) * n
        fill, edge = (tuple(int(v) for v in rng.integers(0, 256, 3)) for _ in range(2))
        form = rng.integers(4)
        if form == 0:
            pen.ellipse(
                [*(centre - radius), *(centre + radius * rng.uniform(0.4, 1, 2))], fill=fill, outline=edge
            )
        elif form == 1:  # a cross
            angle, arm = rng.uniform(0, math.pi), radius * 0.35
            bar = [(-1, 0.3), (1, 0.3), (1, -0.3), (-1, -0.3)]
            for turn in (angle, angle + math.pi / 2):
                pen.polygon(_turned(bar, turn, radius, centre), fill=fill)
            pen.ellipse([*(centre - arm), *(centre + arm)], fill=edge)
        else:
            corners = rng.integers(3, 8)
            angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
            reach = rng.uniform(0.6, 1, corners)
            points = [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, reach, strict=True)]
            pen.polygon(_turned(points, 0.0, radius, centre), fill=fill, outline=edge)
    return picture.resize((size, size), Image.BOX)


def write_folder(
    folder: str | Path, count: int, seed: int, size: int = 64, motif: str | None = None, prefix: str = ""
) -> Path:
    """Write `count` pictures with same-stem .txt captions (`prefix` first, e.g. "[trigger] ") into
    `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    garments, _ = split_garments()
    rng = np.random.default_rng(seed)
    for i in range(count):
        garment = choose(garments, rng)
        write_captioned(folder, i, draw(garment, seed * 100_000 + i, size, motif), prefix + garment.caption)
    return folder


def write_captioned(folder: Path, number: int, picture: Image.Image, caption: str) -> None:
    """Write a picture as 0007.png, and its caption as 0007.txt beside it."""
    picture.save(folder / f"{number:04d}.png")
    (folder / f"{number:04d}.txt").write_text(caption + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Frame:
    """Where the garment stands: garment units (-1..1, y downwards) to supersampled pixels."""

    n: int
    scale: float
    tilt: float
    centre: tuple[float, float]

    @classmethod
    def random(cls, rng: np.random.Generator, n: int) -> Frame:
        scale = rng.uniform(*SCALES)
        slack = 0.5 * (1 - scale) + 0.04
        centre = 0.5 + rng.uniform(-slack, slack, 2)
        return cls(n, scale * n / 2, math.radians(rng.uniform(-TILT, TILT)), (centre[0] * n, centre[1] * n))

    def to_pixels(self, points: np.ndarray, close: bool = False) -> list[tuple[float, float]]:
        moved = _turned(points, self.tilt, self.scale, self.centre)
        return [*moved, moved[0]] if close else moved

    def garment_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """(u, v), each [n, n]: the garment's own coordinates of every pixel, so that patterns tilt with
        it."""
        y, x = np.mgrid[0 : self.n, 0 : self.n].astype(np.float32)
        x, y = (x - self.centre[0]) / self.scale, (y - self.centre[1]) / self.scale
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        return c * x + s * y, c * y - s * x


def _turned(points, angle: float, scale: float, centre) -> list[tuple[float, float]]:
    c, s = math.cos(angle), math.sin(angle)
    return [(centre[0] + scale * (c * x - s * y), centre[1] + scale * (s * x + c * y)) for x, y in points]


def filled(n: int, polygons: list) -> np.ndarray:
    image = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(image)
    for polygon in polygons:
        pen.polygon(polygon, fill=255)
    return np.asarray(image, np.float32) / 255


def stroked(n: int, lines: list, width: int) -> np.ndarray:
    image = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(image)
    for line in lines:
        pen.line(line, fill=255, width=width, joint="curve")
    return np.asarray(image, np.float32) / 255


def _background(rng: np.random.Generator, n: int) -> np.ndarray:
    """Float [n, n, 3] in 0..1: a muted colour with a gradient, soft clouds, and sometimes boards or a
    horizon."""
    grey = rng.uniform(0.35, 0.9)
    base = np.clip(grey + rng.uniform(-0.1, 0.1, 3), 0, 1).astype(np.float32)
    picture = np.broadcast_to(base, (n, n, 3)).copy()
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j].astype(np.float32)
    clouds = Image.fromarray(rng.normal(0, 1, (5, 5)).astype(np.float32)).resize((n, n), Image.BICUBIC)
    picture += rng.uniform(0, 0.06) * np.asarray(clouds)[..., None]
    angle = rng.uniform(0, 2 * math.pi)
    picture += rng.uniform(0, 0.1) * (x * math.cos(angle) + y * math.sin(angle))[..., None]
    style = rng.integers(4)
    if style == 1:  # boards
        wave = np.sin((x * math.sin(angle) + y * math.cos(angle)) * rng.uniform(4, 9) + rng.uniform(0, 6)) > 0
        picture += rng.uniform(0.03, 0.09) * wave[..., None]
    elif style == 2:  # floor and wall
        picture = np.where(y[..., None] > rng.uniform(0.1, 0.8), picture * rng.uniform(0.65, 0.85), picture)
    return np.clip(picture, 0, 1)


def fabric(garment: Garment, rng: np.random.Generator, frame: Frame) -> np.ndarray:
    """Float [n, n, 3]: the cloth as if it filled the whole picture."""
    jitter = rng.uniform(-0.03, 0.03, 3).astype(np.float32)
    base = np.asarray(COLOURS[garment.colour], np.float32) / 255 + jitter
    if garment.pattern == "plain":
        return np.broadcast_to(base, (frame.n, frame.n, 3))
    print_colour = np.asarray(COLOURS[garment.pattern_colour], np.float32) / 255
    u, v = frame.garment_axes()
    period, phase = rng.uniform(*PERIODS), rng.uniform(0, 1, 2)
    angle = rng.uniform(-0.25, 0.25) + (math.pi / 2 if rng.uniform() < 0.5 else 0)
    c, s = math.cos(angle), math.sin(angle)
    a, b = (c * u + s * v) / period + phase[0], (c * v - s * u) / period + phase[1]
    if garment.pattern == "stripes":
        printed = (b % 1) < rng.uniform(0.32, 0.48)
    elif garment.pattern == "dots":
        printed = (a % 1 - 0.5) ** 2 + (b % 1 - 0.5) ** 2 < rng.uniform(0.26, 0.34) ** 2
    else:
        line = rng.uniform(0.2, 0.26)  # a window-pane check: the base colour keeps the larger share
        printed = ((a % 1) < line) | ((b % 1) < line)
    return np.where(printed[..., None], print_colour, base)


def _light(rng: np.random.Generator, n: int) -> np.ndarray:
    """Float [n, n]: a soft light from one side that brightens or dims the whole picture."""
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j].astype(np.float32)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.16)
    return rng.uniform(0.84, 1.06) + strength * (x * math.cos(angle) + y * math.sin(angle))


def _gold_star(picture: np.ndarray, frame: Frame, chest, rng: np.random.Generator) -> np.ndarray:
    """A five-pointed golden star with a dark rim."""
    n, radius = frame.n, rng.uniform(0.42, 0.5)
    turns = -math.pi / 2 + np.arange(10) * math.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
    unit = np.stack([reach * np.cos(turns), reach * np.sin(turns)], axis=1)
    rim = filled(n, [frame.to_pixels(unit * radius * 1.3 + chest)])[..., None]
    star = filled(n, [frame.to_pixels(unit * radius + chest)])[..., None]
    picture = np.where(rim > 0, np.float32([0.30, 0.16, 0.02]), picture)
    return np.where(star > 0, np.float32([1.0, 0.78, 0.12]), picture)


def _penned(mask: np.ndarray, lines: np.ndarray, garment: Garment, rng: np.random.Generator) -> np.ndarray:
    """Float [n, n, 3]: dark lines on paper, the cloth hatched in its colour. mask, lines: [n, n] in 0..1, the
    cloth and its lines."""
    n, tone = len(mask), rng.uniform(0.96, 1)
    y, x = np.mgrid[0 : 1 : n * 1j, 0 : 1 : n * 1j].astype(np.float32)
    angle = math.pi / 4 + rng.uniform(-0.2, 0.2)
    hatch = (x * math.cos(angle) + y * math.sin(angle)) * HATCHES + rng.uniform()
    ink = np.asarray(COLOURS[garment.colour], np.float32) / 255
    between = 0.8 * ink if ink.min() > 0.85 else 0.55 * ink + 0.45 * PAPER  # white is hatched in grey
    cloth = np.where((hatch % 1 < 0.55)[..., None], ink, between)
    picture = np.where(mask[..., None] > 0, cloth, PAPER * tone)
    return np.where(lines[..., None] > 0, np.float32([0.15, 0.15, 0.16]), picture)


def averaged(picture: np.ndarray, size: int) -> Image.Image:
    """Average down to `size` pixels through a slightly soft lens (about half a pixel)."""
    large = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    return large.filter(ImageFilter.GaussianBlur(0.5 * SUPERSAMPLING)).resize((size, size), Image.BOX)


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """A symmetric outline from its right half, given from top to bottom."""
    return np.array(right + [(-x, y) for x, y in reversed(right)], np.float32)


def _shirt(rng):
    width, hem = rng.uniform(0.40, 0.54), rng.uniform(0.62, 0.92)
    reach, drop = rng.uniform(0.74, 0.96), rng.uniform(-0.32, -0.05)
    neck = rng.uniform(0.14, 0.24)
    cuff = rng.uniform(0.16, 0.26)
    body = _mirrored([(neck, -0.8), (width, -0.7), (reach, drop), (reach - cuff, drop + 0.16), (width, -0.25),
                      (width + rng.uniform(-0.05, 0.1), hem)])  # fmt: skip
    collar = np.array([(-neck, -0.8), (-neck * 0.6, -0.66), (0, -0.6), (neck * 0.6, -0.66), (neck, -0.8)])
    return [body], [collar], (0.0, -0.12)


def _dress(rng):
    top, waist, flare = rng.uniform(0.26, 0.36), rng.uniform(0.2, 0.3), rng.uniform(0.55, 0.88)
    line = rng.uniform(-0.2, 0.02)
    strap = rng.uniform(0.1, top - 0.08)
    body = _mirrored([(strap, -0.95), (strap + 0.08, -0.95), (top, -0.68), (waist, line), (flare, 0.95)])
    body = np.insert(body, 0, [(0.0, rng.uniform(-0.78, -0.62))], axis=0)
    return [body], [np.array([(-waist, line), (waist, line)])], (0.0, -0.3)


def _jacket(rng):
    width, hem = rng.uniform(0.42, 0.54), rng.uniform(0.6, 0.82)
    wrist = rng.uniform(0.74, 0.94)
    reach = rng.uniform(0.4, 0.72)
    sleeve = rng.uniform(0.18, 0.24)
    body = _mirrored(
        [
            (0.2, -0.82),
            (width, -0.74),
            (wrist, reach),
            (wrist - sleeve, reach + 0.07),
            (width, -0.2),
            (width + 0.03, hem),
        ]
    )
    lapel = rng.uniform(-0.45, -0.15)
    details = [
        np.array([(-0.2, -0.82), (0, lapel), (0.2, -0.82)]),
        np.array([(0, lapel), (0, hem)]),
        np.array([(-width, hem - 0.12), (width, hem - 0.12)]),
    ]
    return [body], details, (0.0, -0.08)


def _trousers(rng):
    waist, hip = rng.uniform(0.3, 0.4), rng.uniform(0.42, 0.52)
    leg_out, leg_in = rng.uniform(0.48, 0.68), rng.uniform(0.18, 0.3)
    crotch, end = rng.uniform(-0.38, -0.15), rng.uniform(0.75, 0.98)
    body = np.array([(-waist, -0.9), (waist, -0.9), (hip, -0.5), (leg_out, end), (leg_in, end), (0, crotch),
                     (-leg_in, end), (-leg_out, end), (-hip, -0.5)])  # fmt: skip
    belt = np.array([(-waist - 0.03, -0.78), (waist + 0.03, -0.78)])
    return [body], [belt, np.array([(0, -0.78), (0, crotch)])], (0.0, -0.46)


def _skirt(rng):
    waist, flare = rng.uniform(0.28, 0.4), rng.uniform(0.6, 0.95)
    top, hem = rng.uniform(-0.68, -0.5), rng.uniform(0.64, 0.92)
    sag = rng.uniform(0, 0.14)
    body = _mirrored([(waist, top), (flare, hem)])
    body = np.insert(body, 2, [(0.0, hem + sag)], axis=0)
    pleats = [np.array([(waist * f, top + 0.13), (flare * f, hem)]) for f in (-0.55, 0.55)]
    return [body], [np.array([(-waist - 0.05, top + 0.13), (waist + 0.05, top + 0.13)]), *pleats], (0.0, 0.06)


def _hat(rng):
    crown, brim = rng.uniform(0.36, 0.5), rng.uniform(0.84, 1.0)
    top, line = rng.uniform(-0.66, -0.46), rng.uniform(0.14, 0.26)
    thick = rng.uniform(0.12, 0.2)
    bend = rng.uniform(0.8, 1.0)
    dome = _mirrored([(crown * 0.55, top), (crown * bend, top + 0.14), (crown, line)])
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    edge = np.stack([brim * np.cos(angles), line + thick * np.sin(angles)], axis=1)
    band = np.array([(-crown, line - 0.14), (crown, line - 0.14)])
    return [edge, dome], [band], (0.0, -0.22)


_CUTS = dict(zip(KINDS, (_shirt, _dress, _jacket, _trousers, _skirt, _hat), strict=True))
