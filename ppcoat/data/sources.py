"""A folder of pictures with captions in text files of the same stem: find, check, read.

scan_folder decodes every picture and caption once, before any model is loaded, and reports all problems
together. load_image gives training pixels. The folder is not trusted: only JPEG, PNG and WebP are decoded,
Pillow's limit against decompression bombs stays on, captions have a size limit.
"""

from __future__ import annotations

import codecs
import logging
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ppcoat.config.explain import printable
from ppcoat.errors import ConfigError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_CAPTION_BYTES = 64 * 1024
NAMED_PROBLEMS = 5
MAX_FOLDER_REPEATS = 1000  # a larger number in a folder's name is a year or a date
# what Pillow raises for damaged files, depending on format and place of the damage
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One picture with its caption as written; width and height in pixels, after the rotation of its EXIF.

    repeats: from the name of its subfolder, see folder_repeats. has_caption: False if the default is used.
    """

    image_path: Path
    caption_raw: str
    width: int
    height: int
    repeats: int = 1
    has_caption: bool = True


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """The contents of a folder, in order of relative paths. `bad` is empty unless skip_bad was set."""

    folder: Path
    items: list[Item]
    bad: list[Problem]


def scan_folder(
    folder: str | Path, caption_ext: str = "txt", default_caption: str | None = None, skip_bad: bool = False
) -> ImageFolder:
    """Find and check all pictures below a folder; hidden files and folders are ignored.

    Pictures in a subfolder N_name count N times (see folder_repeats).

    A problem is: a picture that cannot be decoded to its end, a picture without caption or with an empty
    one (unless there is a default_caption), a caption without picture, a caption in no known encoding or
    above 64 KiB. Raises one ConfigError for all problems, counting them and naming the first five; with
    skip_bad they are logged and listed in `.bad` instead. Missing folders and folders without a usable
    picture always raise.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"data folder {printable(folder)} {what}; give a folder of pictures and captions")
    suffix = "." + caption_ext.removeprefix(".").lower()
    bad: list[Problem] = []
    images, captions = _list_files(folder, suffix, bad)
    if not images:
        wanted = ", ".join(IMAGE_SUFFIXES)
        raise ConfigError(f"no pictures in {printable(folder)}; wanted {wanted} files with {suffix} captions")
    items = []
    for path in tqdm(images, desc="checking pictures", unit="file", disable=None):
        try:
            width, height = _open_rgb(path).size
            own = _caption_of(path, captions.get(path.with_suffix("")), suffix, default_caption)
        except _BadFile as error:
            bad.append(Problem(path, str(error)))
        else:
            caption = default_caption or "" if own is None else own
            repeats = folder_repeats(path.relative_to(folder))
            items.append(Item(path, caption, width, height, repeats, own is not None))
    stems = {path.with_suffix("") for path in images}
    bad += [Problem(path, "caption without picture") for stem, path in captions.items() if stem not in stems]
    bad.sort(key=lambda problem: str(problem.path))
    _report(folder, items, bad, skip_bad)
    return ImageFolder(folder, items, bad)


def folder_repeats(path: Path) -> int:
    """Number of times that a picture counts: N of the innermost folder N_name on its path, else 1.

    As in kohya's scripts, N is all that stands before the first "_": 10_dress gives 10, 3d_render and 10 give
    1. Unlike there, 0_name and numbers above 1000 (2024_summer) give 1.
    """
    for name in reversed(path.parts[:-1]):
        number, underscore, _ = name.partition("_")
        if underscore and re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= MAX_FOLDER_REPEATS:
            return int(number)
    return 1


def load_image(
    path: str | Path, height: int, width: int, flip_x: bool = False, flip_y: bool = False
) -> np.ndarray:
    """Decode a picture for training: float32 [3, height, width] in [-1, 1].

    The picture is rotated by its EXIF, laid on white where it is transparent, and converted to RGB. The
    largest centred part with the wanted aspect is resized (Lanczos), then mirrored if flip_x (left-right) or
    flip_y (upside down). Of an animation the first frame is used. Raises ConfigError naming the file.
    """
    try:
        image = _open_rgb(Path(path))
    except _BadFile as error:
        raise ConfigError(
            f"{printable(path)}: {error}; was it changed since the folder was checked?"
        ) from None
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip_x else image
    image = ImageOps.flip(image) if flip_y else image
    return np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1)) / 127.5 - 1.0


class _BadFile(Exception):
    """One file cannot be used; the text is the reason."""


def _list_files(folder: Path, suffix: str, bad: list[Problem]) -> tuple[list[Path], dict[Path, Path]]:
    """Sorted picture paths, and captions by their path without suffix; unreadable folders go to bad."""
    images: list[Path] = []
    captions: dict[Path, Path] = {}

    def note_unreadable(error: OSError) -> None:
        bad.append(Problem(Path(error.filename), f"folder cannot be read ({error.strerror})"))

    for parent, folders, names in os.walk(folder, onerror=note_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            elif path.suffix.lower() == suffix:
                captions[path.with_suffix("")] = path
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix()), captions


def _open_rgb(path: Path) -> Image.Image:
    """Decode a whole picture to RGB, upright, on white."""
    try:
        if path.stat().st_size == 0:
            raise _BadFile("the picture is an empty file")
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # convert() would clip 16-bit grey to white
                image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB")
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).replace(repr(str(path)), "").split()) or type(error).__name__
        raise _BadFile(f"the picture cannot be decoded ({reason})") from None


def _caption_of(image: Path, path: Path | None, suffix: str, default_caption: str | None) -> str | None:
    """The picture's own caption; None where it has none and there is a default."""
    caption = "" if path is None else _read_caption(path)
    if caption:
        return caption
    if default_caption is not None:
        return None
    missing = f"no caption {image.stem}{suffix}" if path is None else f"the caption {path.name} is empty"
    raise _BadFile(f'{missing} (write one or set default_caption, e.g. "[trigger]")')


def _read_caption(path: Path) -> str:
    """Text of a caption file without outer white space. UTF-8 (BOM allowed); others with a warning."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise _BadFile(f"the caption {path.name} cannot be read ({error.strerror})") from None
    if len(raw) > MAX_CAPTION_BYTES:
        raise _BadFile(f"the caption {path.name} is longer than {MAX_CAPTION_BYTES} bytes")
    for encoding in ("utf-8-sig", *_other_encodings(raw)):
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:  # binary, or UTF-16 without BOM
            continue
        if encoding != "utf-8-sig":
            _log.warning("caption %s is not UTF-8; read as %s, please check it", printable(path), encoding)
        return text.strip()
    raise _BadFile(f"the caption {path.name} is in no known encoding (save it as UTF-8)")


def _other_encodings(raw: bytes) -> tuple[str, ...]:
    """Encodings to try after UTF-8, likeliest first.

    GB characters are nearly always pairs of bytes above 0x7F, accented Latin letters stand alone: so the
    text is taken as gb18030 only where all runs of such bytes have even length.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ("utf-16",)
    runs = re.findall(rb"[\x80-\xff]+", raw)
    chinese_first = all(len(run) % 2 == 0 for run in runs)
    return ("gb18030", "cp1252") if chinese_first else ("cp1252", "gb18030")


def _report(folder: Path, items: list[Item], bad: list[Problem], skip_bad: bool) -> None:
    """Raise for problems, or log them where they may be skipped."""
    if not bad:
        return
    named = [printable(f"{os.path.relpath(each.path, folder)}: {each.reason}") for each in bad]
    count = f"{len(bad)} problem{'s' if len(bad) > 1 else ''} in {printable(folder)}"
    if skip_bad and items:
        _log.warning("%s, skipped: %s", count, "; ".join(named))
        return
    more = f"; ... and {len(bad) - NAMED_PROBLEMS} more" if len(bad) > NAMED_PROBLEMS else ""
    advice = "no usable picture is left" if skip_bad else "fix these files or set skip_bad: true"
    raise ConfigError(f"{count}: {'; '.join(named[:NAMED_PROBLEMS])}{more}; {advice}")
