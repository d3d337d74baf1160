"""What belongs to a picture beside its caption: references that the model is shown, and a mask.

Both are files of the picture's stem in other folders, with any ending: for pictures/coats/a.jpg that is
references/coats/a.png, or else an a.png elsewhere in references that is no other picture's in this way. The
mask may be the picture's own alpha channel instead.
White of a mask is what counts: what the loss is about, or what a Fill model paints anew.

A reference that is absent costs nothing but that: its picture is trained without; of several, those that come
last may be absent, for their order says what each is. What is there must be whole and fit, and is checked
before any model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ppcoat.config.schema import DatasetConfig
from ppcoat.data.buckets import Size, crop_share
from ppcoat.data.caption_files import normal
from ppcoat.data.colours import WHITE, Colour, Convert, grey, on_colour, opacity
from ppcoat.data.content_keys import content_key, file_digest
from ppcoat.data.sources import (
    IMAGE_SUFFIXES,
    NAMED_PROBLEMS,
    BadFile,
    ImageFolder,
    Item,
    Problem,
    load_image,
    report_problems,
    upright_picture,
)
from ppcoat.errors import ConfigError, printable
from ppcoat.progress import Progress

SIDE_STEP = 16  # pixels: a token of FLUX
_NOTHING = 1e-4  # share of a picture that is as good as none
_CLASSES = 15  # a mask that is nowhere brighter holds numbers of classes, 0 and 1, which look black
_ASPECT_TOLERANCE = 0.02  # of a mask's aspect, for the rounding of another program's sizes


@dataclass(frozen=True)
class Mask:
    """A mask's file. from_alpha: it is that picture's opacity. invert: black is what counts. size: of the
    file, upright; share: of it that counts, 0..1."""

    path: Path
    from_alpha: bool = False
    invert: bool = False
    size: Size = (0, 0)
    share: float = 1.0

    def load(self, size: Size, flip_x: bool = False, flip_y: bool = False) -> np.ndarray:
        """float32 [height, width] in 0..1, cut and resized as `load_image` does it with its picture."""
        width, height = size
        values = load_image(self.path, height, width, flip_x, flip_y, self.convert)
        return (1 - values if self.invert else 1 + values) / 2

    @property
    def convert(self) -> Convert:
        """What makes grey of its file."""
        return opacity if self.from_alpha else grey


@dataclass(frozen=True)
class Reference:
    """A reference's file, its size upright, and the colour under what is transparent in it."""

    path: Path
    width: int
    height: int
    background: Colour = WHITE
    notes: tuple[str, ...] = ()

    def picture(self, size: Size, flip_x: bool = False, flip_y: bool = False) -> CutPicture:
        """It as an encoder is given it."""
        return CutPicture(self.path, size, flip_x, flip_y, self.background, self.notes)

    def own_size(self, resolution: int) -> Size:
        """Width and height at which it is shown if not at its picture's: its own, made smaller where it has
        more than resolution^2 pixels, each side rounded down to 16."""
        scale = min(1.0, resolution / (self.width * self.height) ** 0.5)
        return tuple(max(SIDE_STEP, int(side * scale + 1e-6) // SIDE_STEP * SIDE_STEP)
                     for side in (self.width, self.height))  # fmt: skip


@dataclass(frozen=True)
class Companions:
    """What a picture has: references in the order of control_path, of which some may be absent, and a
    mask."""

    references: tuple[Reference, ...] = ()
    mask: Mask | None = None


@dataclass(frozen=True)
class CutPicture:
    """A picture as an encoder is given it: cut to `size` and mirrored, on a colour (None: those below its
    transparency). hole: with what a Fill model paints anew left out."""

    path: Path
    size: Size
    flip_x: bool = False
    flip_y: bool = False
    background: Colour | None = WHITE
    notes: tuple[str, ...] = ()
    hole: Mask | None = None

    def pixels(self) -> np.ndarray:
        """float32 [3, height, width] in -1..1, whole."""
        width, height = self.size
        return load_image(self.path, height, width, self.flip_x, self.flip_y, on_colour(self.background))

    def key(self, identity: str) -> str:
        """Of its latent in a store: its files are read. identity: the encoder's. Raises ConfigError as
        file_digest does."""
        parts = list(self.notes)  # its colours may have been converted
        if self.background != WHITE:
            parts.append(f"on {self.background}")
        if self.hole:
            parts.append(f"hole {file_digest(self.hole.path)} {self.hole.from_alpha} {self.hole.invert}")
        flips = int(self.flip_x), int(self.flip_y)
        rule = "cover, centre crop, Lanczos"
        return content_key("image", file_digest(self.path), *self.size, rule, *flips, identity, *parts)

    def hole_pixels(self) -> np.ndarray:
        """uint8 [1, height, width], 1 where the hole is."""
        return (self.hole.load(self.size, self.flip_x, self.flip_y) >= 0.5).astype(np.uint8)[None]


def with_companions(
    images: ImageFolder, data: DatasetConfig, section: str = "datasets[]"
) -> tuple[ImageFolder, dict[Path, Companions]]:
    """The folder, and by path what its pictures have; pictures with damaged or unfitting companions are
    problems as in `scan_folder`.

    section: of the config, for messages.

    Raises ConfigError for a folder of references or masks that is not there or is the pictures' own, where no
    picture has any of what was asked for, and where all masks are empty or all are full.
    """
    if not (data.control_path or data.mask_path or data.alpha_mask):
        return images, {}
    references = [_Stems(path, f"{section}.control_path", images) for path in data.control_path]
    masks = _Stems(data.mask_path, f"{section}.mask_path", images) if data.mask_path else None
    found, bad = {}, []
    for item in Progress(images.items, desc="checking pairs", unit="file"):
        try:
            found[item.image_path] = Companions(
                tuple(_references(item, references, data.control_transparent_color)),
                _mask(item, masks, data),
            )
        except BadFile as error:
            bad.append(Problem(item.image_path, str(error)))
    items = [item for item in images.items if item.image_path in found]
    report_problems(images.folder, items, bad, data.skip_bad)
    _check_any(data, [found[item.image_path] for item in items], section)
    return ImageFolder(images.folder, items, [*images.bad, *bad], images.notes), found


def found_reference(path: Path, background: Colour) -> Reference:
    """The reference in a file. Raises BadFile for one that cannot be read or is too small."""
    notes: list[str] = []
    try:
        width, height = upright_picture(path, on_colour(background), notes, verify=True).size
    except BadFile as error:
        raise BadFile(f"its reference {path}: {error}") from None
    if min(width, height) < SIDE_STEP:
        raise BadFile(f"its reference {path} is {width} x {height}; wanted at least {SIDE_STEP} each way")
    return Reference(path, width, height, background, tuple(notes))


def found_mask(path: Path, from_alpha: bool = False, invert: bool = False) -> Mask:
    """The mask in a file. Raises BadFile for one that cannot be read, or holds numbers of classes."""
    mask = Mask(path, from_alpha, invert)
    try:
        image = upright_picture(path, mask.convert, verify=not from_alpha)
    except BadFile as error:
        raise BadFile(f"its mask {path}: {error}") from None
    values = np.asarray(image)
    if not from_alpha and 0 < values.max() <= _CLASSES:
        raise BadFile(f"its mask {path} has values from 0 to {values.max()}: wanted 255 for what counts")
    white = float(values.mean(dtype=np.float64)) / 255
    return replace(mask, size=image.size, share=1 - white if invert else white)


def aside(data: DatasetConfig) -> tuple[str, ...]:
    """Folders that may lie among the pictures and hold none to train."""
    return (*data.control_path, *([data.mask_path] if data.mask_path else ()))


def loss_weights(mask: np.ndarray, latent: Sequence[int], floor: float) -> np.ndarray:
    """A mask float32 [H, W] in 0..1 -> weights float32 [h, w] with mean 1, for latents [..., h, w].

    Each latent has the mean of its pixels, raised to `floor` + (1 - floor) * mean. Divided by the mean of the
    picture, so that small and large masks count alike (ai-toolkit divides by that of the batch, which would
    make a picture depend on its neighbours). All ones where nothing is left of the mask after cutting.
    """
    h, w = latent[-2:]
    shrunk = mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).mean((1, 3), dtype=np.float64)
    raised = floor + (1 - floor) * shrunk
    mean = raised.mean()
    return (raised / mean if mean > 1e-6 else np.ones_like(raised)).astype(np.float32)


def pair_lines(
    data: DatasetConfig, items: Sequence[Item], found: dict[Path, Companions], sizes: dict[Path, Size]
) -> list[str]:
    """What of a dataset's pictures has references and masks, what lacks them, and what looks odd: at most
    five lines. sizes: at which pictures are trained, by path."""
    if not found:
        return []
    lines = []
    if data.control_path:
        want = len(data.control_path)
        lacking = [item for item in items if len(found[item.image_path].references) < want]
        size = "at the size of the picture" if data.full_size_control_images else "at their own size"
        what = "a reference" if want == 1 else f"{want} references"
        without = "trained without" if want == 1 else "trained with fewer"
        lines.append(f"    {what} {size} beside {len(items) - len(lacking)} of {len(items)} pictures"
                     + _named(without, lacking))  # fmt: skip
        if data.full_size_control_images:
            lines += _cropped(items, found, sizes)
    if data.mask_path or data.alpha_mask:
        masked = [item for item in items if found[item.image_path].mask is not None]
        lacking = [item for item in items if found[item.image_path].mask is None]
        shares = [found[item.image_path].mask.share for item in masked]
        lines.append(f"    masks of {len(masked)} of {len(items)} pictures, white {min(shares):.0%} to "
                     f"{max(shares):.0%}" + _named("without one, all counts", lacking))  # fmt: skip
        for wrong, what in ((0.0, "empty, as if there were none"), (1.0, "full")):
            odd = [item for item in masked if abs(found[item.image_path].mask.share - wrong) < _NOTHING]
            if odd:
                lines.append(f"    warning: masks that are {what}" + _named("of", odd))
    return lines


class _Stems:
    """The files below a folder for `pictures` by stem, with the folders that they lie in and without. Those
    pictures are none of them, where the folder is around theirs."""

    def __init__(self, folder: str, key: str, pictures: ImageFolder) -> None:
        self.folder, self.pictures = Path(folder), pictures.folder
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "does not exist"
            raise ConfigError(
                f"{key} {printable(folder)} {what}; give a folder of files with the pictures' names"
            )
        theirs = self.pictures.resolve()
        if self.folder.resolve() == theirs:
            raise ConfigError(f"{key} {printable(folder)} is the folder of the pictures; give another one")
        self._inner: dict[str, list[Path]] = {}
        self._stems: dict[str, list[Path]] = {}
        owned = {_inner(item.image_path, self.pictures) for item in pictures.items}
        for parent, folders, names in os.walk(self.folder, followlinks=False):
            wanted = (name for name in folders if Path(parent, name).resolve() != theirs)
            folders[:] = sorted(name for name in wanted if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                    inner = _inner(path, self.folder)
                    self._inner.setdefault(inner, []).append(path)
                    if inner not in owned:
                        self._stems.setdefault(normal(path.stem), []).append(path)

    def find(self, item: Item) -> Path | None:
        """The file for a picture; None where there is none. Raises BadFile for several."""
        paths = self._inner.get(_inner(item.image_path, self.pictures))
        paths = paths or self._stems.get(normal(item.image_path.stem), [])
        if len(paths) > 1:
            names = " and ".join(each.relative_to(self.folder).as_posix() for each in paths[:2])
            raise BadFile(f"{names} in {self.folder} both have its name: keep one")
        return paths[0] if paths else None


def _inner(path: Path, folder: Path) -> str:
    """The path inside a folder, without its ending."""
    return normal(path.relative_to(folder).with_suffix("").as_posix())


def _references(item: Item, folders: Sequence[_Stems], background: Colour) -> Iterable[Reference]:
    """Raises BadFile where one is absent and a later one is there, which would stand in its place."""
    paths = [folder.find(item) for folder in folders]
    count = sum(path is not None for path in paths)
    for path, folder in zip(paths[:count], folders, strict=False):
        if path is None:
            raise BadFile(
                f"{folder.folder} has no reference for it and a later control_path has one, which would take "
                "its place: add it, or remove the other"
            )
        yield found_reference(path, background)


def _mask(item: Item, folder: _Stems | None, data: DatasetConfig) -> Mask | None:
    if folder is None and not data.alpha_mask:
        return None
    path = folder.find(item) if folder else item.image_path
    if path is None:
        return None
    mask = found_mask(path, folder is None, data.invert_mask)
    (width, height), share = mask.size, mask.share
    if mask.from_alpha and share == (0.0 if data.invert_mask else 1.0):
        return None  # opaque, or without an alpha channel: it says nothing
    if abs(width * item.height / (height * item.width) - 1) > _ASPECT_TOLERANCE + 1 / min(width, height):
        raise BadFile(
            f"its mask {path} is {width} x {height} and the picture {item.width} x {item.height}: wanted the "
            "same aspect"
        )
    return mask


def _check_any(data: DatasetConfig, all_found: Sequence[Companions], section: str) -> None:
    """Raise ConfigError where no picture has what the settings ask for, or masks say nothing."""
    named, masks = printable(data.folder_path), [each.mask for each in all_found if each.mask]
    if data.control_path and not any(each.references for each in all_found):
        raise ConfigError(
            f"no picture in {named} has a reference in {printable(', '.join(data.control_path))}: that has "
            f"the name of its picture, with any ending; check {section}.control_path"
        )
    if not (data.mask_path or data.alpha_mask):
        return
    if not masks:
        where = f"in {printable(data.mask_path)}" if data.mask_path else "in its alpha channel"
        key = "mask_path" if data.mask_path else "alpha_mask"
        raise ConfigError(f"no picture in {named} has a mask {where}: check {section}.{key}")
    for wrong, what in ((0.0, "empty"), (1.0, "full")):
        if all(abs(mask.share - wrong) < _NOTHING for mask in masks):
            counts = "black" if data.invert_mask else "white"
            raise ConfigError(
                f"all {len(masks)} masks of {named} are {what}: {counts} marks what counts, here "
                f"{'none' if wrong == 0 else 'all'} of the picture; turn invert_mask, or give other masks"
            )


def _cropped(items: Sequence[Item], found: dict[Path, Companions], sizes: dict[Path, Size]) -> list[str]:
    """A warning of references of another aspect than their pictures'."""
    shares = [(crop_share(each.width, each.height, sizes[item.image_path]), each)
              for item in items for each in found[item.image_path].references]  # fmt: skip
    cut = [share for share, _ in shares if share > 0.1005]
    if not cut:
        return []
    share, worst = max(shares, key=lambda pair: pair[0])
    are = "reference is" if len(cut) == 1 else "references are"
    return [
        f"    warning: {len(cut)} {are} cropped by more than 10%, most {printable(worst.path.name)} "
        f"({share:.0%}); full_size_control_images: false shows them whole"
    ]


def _named(what: str, items: Sequence[Item]) -> str:
    """ "; what: a.png, b.png" """
    if not items:
        return ""
    names = [printable(item.image_path.name) for item in items[: NAMED_PROBLEMS // 2]]
    more = f" and {len(items) - len(names)} more" if len(items) > len(names) else ""
    return f"; {what}: {', '.join(names)}{more}"
