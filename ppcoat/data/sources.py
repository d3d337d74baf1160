"""A folder of pictures with captions: find, check, read.

scan_folder decodes every picture and caption once, before any model is loaded, and reports all problems
together. load_image gives training pixels. The folder is not trusted: only JPEG, PNG and WebP are decoded,
Pillow's limit against decompression bombs stays on, captions have a size limit. How captions are written is
in caption_files.py.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ppcoat.data.caption_files import TEXT_SUFFIXES, BadCaption, Caption, FolderCaptions
from ppcoat.data.colours import Convert, on_white
from ppcoat.errors import ConfigError, printable
from ppcoat.progress import Progress
from ppcoat.reading import followed

FORMATS = ("JPEG", "PNG", "WEBP")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# Pictures and films that are not read here: they are counted, so that nobody misses them unawares.
OTHER_SUFFIXES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg",
                  ".ico", ".tga", ".dng", ".cr2", ".nef", ".arw", ".mp4", ".mov", ".webm")  # fmt: skip
# Folders that machines and other trainers leave in data folders: thumbnails, waste bins, caches.
STRAY_FOLDERS = ("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@synoresource", "#recycle", "#snapshot",
                 "__macosx", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
                 "_controls", "_latent_cache", "_t_e_cache")  # fmt: skip
# First bytes -> what a file is, whatever its name says.
_KINDS = ((b"GIF8", "a GIF picture"), (b"BM", "a BMP picture"), (b"II*\0", "a TIFF picture"),
          (b"MM\0*", "a TIFF picture"), (b"8BPS", "a Photoshop file"), (b"%PDF", "a PDF file"),
          (b"PK\3\4", "a ZIP archive"), (b"Rar!", "a RAR archive"), (b"7z\xbc\xaf", "a 7z archive"),
          (b"\x1f\x8b", "a gzip archive"), (b"\xff\x0a", "a JPEG XL picture"),
          (b"\0\0\0\x0cJXL", "a JPEG XL picture"), (b"\0\0\0\x0cjP", "a JPEG 2000 picture"),
          (b"\x1aE\xdf\xa3", "a film"), (b"%!PS", "an EPS file"),
          (b"version https://git-lfs", "a Git LFS pointer: run git lfs pull"))  # fmt: skip
_BRANDS = dict.fromkeys((b"avif", b"avis"), "an AVIF picture")
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "a HEIC picture")
_TEXT = re.compile(rb"[\t\r\n -~]{5,}")
NAMED_PROBLEMS = 10
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
    AssertionError,  # a palette that is not there
    IndexError,  # nor are the pixels
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One picture with its caption as written; width and height in pixels, after the rotation of its EXIF.

    repeats: from the name of its subfolder, see folder_repeats. has_caption: False if the default is used.
    encoding: of the caption file; any but "utf-8" is a guess. notes: what its reader did to the picture.
    caption_file: holds the caption, alone or with others; None: a setting does. file_bytes: the picture's.
    """

    image_path: Path
    caption_raw: str
    width: int
    height: int
    repeats: int = 1
    has_caption: bool = True
    encoding: str = "utf-8"
    notes: tuple[str, ...] = ()
    caption_file: Path | None = None
    file_bytes: int = 0


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ImageFolder:
    """The contents of a folder, in order of relative paths. `bad` is empty unless skip_bad was set. notes:
    what was left out or looks odd, for the data report."""

    folder: Path
    items: list[Item]
    bad: list[Problem]
    notes: tuple[str, ...] = ()


def check_data_folder(folder: str | Path) -> Path:
    """The folder. Raises ConfigError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"data folder {printable(folder)} {what}; give a folder of pictures and captions")
    return folder


def scan_folder(
    folder: str | Path,
    caption_ext: str = "txt",
    default_caption: str | None = None,
    skip_bad: bool = False,
    aside: Collection[str | Path] = (),
) -> ImageFolder:
    """Find and check all pictures below a folder; hidden files and folders, and those in `aside`, are
    ignored.

    Pictures in a subfolder N_name count N times (see folder_repeats). Linked folders are followed. A caption
    is what a file of the same stem holds, or a table such as metadata.jsonl (caption_files.py).

    A problem is: a picture that cannot be decoded to its end, a picture without caption or with an empty
    one (unless there is a default_caption), a caption without picture, a caption in no known encoding or
    above 64 KiB, JSON without a caption. Raises one ConfigError for all problems, counting them and naming
    the first ten; with skip_bad they are logged and listed in `.bad` instead. Missing folders and folders
    without a usable picture always raise.
    """
    folder = check_data_folder(folder)
    suffix = "." + caption_ext.removeprefix(".").lower()
    found = _walk(folder, suffix, {followed(each) for each in aside})
    if not found.images:
        others = f", only {_by_suffix(found.others)}" if found.others else ""
        raise ConfigError(
            f"no pictures in {printable(folder)}{others}; wanted {', '.join(IMAGE_SUFFIXES)} files with "
            f"{suffix} captions"
        )
    captions = FolderCaptions(found.images, found.texts, suffix)
    items, bad = [], found.bad
    for path in Progress(found.images, desc="checking pictures", unit="file"):
        try:
            items.append(_checked(path, folder, captions, default_caption))
        except (BadFile, BadCaption) as error:
            bad.append(Problem(path, str(error)))
    left_out = _unread(found.others, captions, bad)
    bad += [Problem(path, "caption without picture") for path in captions.unused]
    bad.sort(key=lambda problem: str(problem.path))
    notes = [*found.notes, *left_out, *captions.notes, *_notes_of(items)]
    _warn_of_guesses(folder, items)
    report_problems(folder, items, bad, skip_bad, captions.notes)
    return ImageFolder(folder, items, bad, tuple(notes))


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
    path: str | Path,
    height: int,
    width: int,
    flip_x: bool = False,
    flip_y: bool = False,
    convert: Convert = on_white,
) -> np.ndarray:
    """Decode a picture for training: float32 [3, height, width] in [-1, 1].

    The picture is rotated by its EXIF, laid on white where it is transparent, and converted to sRGB. The
    largest centred part with the wanted aspect is resized (Lanczos), then mirrored if flip_x (left-right) or
    flip_y (upside down). Of an animation the first frame is used. convert: to grey instead, which gives
    [height, width], or on another colour. Raises ConfigError naming the file.
    """
    try:
        image = upright_picture(Path(path), convert)
    except BadFile as error:
        raise ConfigError(
            f"{printable(path)}: {error}; was it changed since the folder was checked?"
        ) from None
    image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip_x else image
    image = ImageOps.flip(image) if flip_y else image
    values = np.asarray(image, dtype=np.float32)
    values = np.ascontiguousarray(values.transpose(2, 0, 1)) if values.ndim == 3 else values
    return values / 127.5 - 1.0


class BadFile(Exception):
    """One file cannot be used; the text is the reason."""


@dataclass
class _Files:
    """What a data folder holds: pictures, files that may be captions, pictures of other kinds; sorted."""

    images: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    bad: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _walk(folder: Path, suffix: str, aside: Collection[Path]) -> _Files:
    """All files below a folder by kind; unreadable folders go to `bad`, those left out to `notes`. aside:
    real paths of folders that are for something else."""
    found, root, stray = _Files(), folder.resolve(), set()
    walked = {root}  # real paths: links may lead to one folder twice

    def note_unreadable(error: OSError) -> None:
        found.bad.append(Problem(Path(error.filename), f"folder cannot be read ({error.strerror})"))

    def is_wanted(path: Path) -> bool:
        if path.name.lower() in STRAY_FOLDERS:
            stray.add(path.name)
        if path.name.lower() in STRAY_FOLDERS or path.name.startswith("."):
            return False
        target = path.resolve()
        if target in aside:
            return False
        around = root.is_relative_to(target)
        if target in walked or (path.is_symlink() and (around or target.is_relative_to(root))):
            why = "it holds this data folder" if around and target != root else "it is here already"
            kind = "linked folder" if path.is_symlink() else "folder"
            found.notes.append(f"the {kind} {path.relative_to(folder)} is left out: {why}")
            return False
        walked.add(target)
        return True

    kinds = dict.fromkeys(OTHER_SUFFIXES, found.others) | dict.fromkeys((*TEXT_SUFFIXES, suffix), found.texts)
    kinds |= dict.fromkeys(IMAGE_SUFFIXES, found.images)
    for parent, folders, names in os.walk(folder, onerror=note_unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_wanted(Path(parent, name))]
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in kinds:
                kinds[path.suffix.lower()].append(path)
    for files in (found.images, found.texts, found.others):
        files.sort(key=lambda path: path.relative_to(folder).as_posix())
    if stray:
        found.notes.append(f"folders left out: {', '.join(sorted(stray))}")
    return found


def _by_suffix(paths: Iterable[Path]) -> str:
    """ "2 .gif, 1 .bmp" """
    counted = Counter(path.suffix.lower() for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counted.most_common())


def _unread(others: list[Path], captions: FolderCaptions, bad: list[Problem]) -> list[str]:
    """Pictures of other formats: with a caption they were meant to be trained, so they go to `bad`; the rest
    is noted."""
    stems = {path.with_suffix(""): path for path in captions.unused}
    rest = []
    for path in others:
        caption = stems.get(path.with_suffix(""))
        if caption is None:
            rest.append(path)
        else:
            captions.unused.discard(caption)
            bad.append(
                Problem(path, f"{path.suffix[1:].upper()} is not read here (convert it to PNG or JPEG)")
            )
    return [f"files of other formats left out: {_by_suffix(rest)}; wanted JPEG, PNG or WebP"] if rest else []


def _checked(path: Path, folder: Path, captions: FolderCaptions, default_caption: str | None) -> Item:
    """A picture that decodes to its end, with its caption. Raises BadFile and BadCaption."""
    notes: list[str] = []
    width, height = upright_picture(path, notes=notes, verify=True).size
    caption = captions.of(path)
    if caption is None and default_caption is None:
        advice = 'write one or set default_caption, e.g. "[trigger]"'
        raise BadFile(f"{captions.missing(path)} ({advice})")
    caption = caption or Caption(default_caption, own=False)
    repeats = folder_repeats(path.relative_to(folder))
    return Item(path, caption.text, width, height, repeats, caption.own, caption.encoding, tuple(notes),
                caption.file, path.stat().st_size)  # fmt: skip


def _notes_of(items: list[Item]) -> list[str]:
    """What was done to pictures, each with their number and an example."""
    counted: dict[str, list[Item]] = {}
    for item in items:
        for note in item.notes:
            counted.setdefault(note, []).append(item)
    return [f"{len(found)} of {len(items)} pictures: {note}, e.g. {found[0].image_path.name}"
            for note, found in counted.items()]  # fmt: skip


def _warn_of_guesses(folder: Path, items: list[Item]) -> None:
    """Caption files that are not UTF-8 are named, each with a caption as it was understood: of a file for
    several pictures the first that is not plain ASCII, in which a wrong guess shows."""
    guessed = [item for item in items if item.encoding != "utf-8"]
    if not guessed:
        return
    of_file: dict[Path, Item] = {}
    for item in guessed:
        shown = of_file.setdefault(item.caption_file, item)
        if shown.caption_raw.isascii() and not item.caption_raw.isascii():
            of_file[item.caption_file] = item
    files = [
        f"{printable(os.path.relpath(file, folder))} as {item.encoding}: {printable(item.caption_raw)[:90]}"
        for file, item in of_file.items()
    ]
    more = f"; ... and {len(files) - NAMED_PROBLEMS} more files" if len(files) > NAMED_PROBLEMS else ""
    _log.warning(
        "in %s %d caption%s not UTF-8 and read by guess, please check: %s%s",
        printable(folder), len(guessed), " is" if len(guessed) == 1 else "s are",
        "; ".join(files[:NAMED_PROBLEMS]), more,
    )  # fmt: skip


def upright_picture(
    path: Path,
    convert: Convert = on_white,
    notes: list[str] | None = None,
    verify: bool = False,
    least: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """Decode a whole picture, upright, to what `convert` makes of it: RGB in sRGB on white. notes: gets what
    was done to it that a user may not expect. verify: look at the checksums of a PNG, too, which costs
    reading it twice. least: pixels of a side that suffice, so that a JPEG is decoded smaller, which is
    faster. formats: Pillow's names of those that are read. Raises BadFile."""
    notes = [] if notes is None else notes
    try:
        if path.stat().st_size == 0:
            raise BadFile("the picture is an empty file")  # a pipe, too, on which open() would wait
        with Image.open(path, formats=formats) as opened:
            if verify and opened.format == "PNG":
                with Image.open(path, formats=("PNG",)) as again:
                    again.verify()
            # a photo in MPO format has a second picture for depth or brightness
            if opened.format in ("PNG", "WEBP") and getattr(opened, "n_frames", 1) > 1:
                notes.append("animated, the first picture is trained")
            if least:
                opened.draft(None, (least, least))
            opened.load()
            profile = opened.info.get("icc_profile")
            ImageOps.exif_transpose(opened, in_place=True)  # a copy of 178 million pixels is 0.7 GB
            return convert(opened, profile, notes)
    except _DECODE_ERRORS as error:
        said = getattr(error, "strerror", None) or str(error).replace(repr(str(path)), "")
        reason = " ".join(said.split()) or type(error).__name__
        kind = _real_kind(path)
        other = kind and (formats is FORMATS or not kind.endswith("picture"))
        reason = f"it is {kind}; wanted JPEG, PNG or WebP" if other else reason
        raise BadFile(f"the picture cannot be decoded ({reason})") from None


def _real_kind(path: Path) -> str | None:
    """What a file that is no picture of ours is, by its first bytes; None: unknown, or damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except (OSError, ValueError):  # ValueError: no file has such a name
        return None
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12], "a film or a picture in MP4's container")
    if re.match(rb"\s*(<!doctype html|<html)", start, re.IGNORECASE):
        return "a web page"
    text = "text, perhaps an error message of a download" if _TEXT.fullmatch(start) else None
    unknown = "a file of zeros" if not start.strip(b"\0") else text
    return next((kind for first, kind in _KINDS if start.startswith(first)), unknown)


def report_problems(
    folder: Path, items: list[Item], bad: list[Problem], skip_bad: bool, notes: Iterable[str] = ()
) -> None:
    """Raise for problems, or log them where they may be skipped. notes: of caption files, for the error."""
    if not bad:
        return
    named = [printable(f"{os.path.relpath(each.path, folder)}: {each.reason}") for each in bad]
    count = f"{len(bad)} problem{'s' if len(bad) > 1 else ''} in {printable(folder)}"
    if skip_bad and items:
        _log.warning("%s, skipped: %s", count, "; ".join(named))
        return
    more = f"; ... and {len(bad) - NAMED_PROBLEMS} more" if len(bad) > NAMED_PROBLEMS else ""
    advice = "fix these files or set skip_bad: true for this folder in datasets"
    advice = "no usable picture is left" if skip_bad else advice
    also = "".join(f"; {printable(note)}" for note in notes)
    raise ConfigError(f"{count}: {'; '.join(named[:NAMED_PROBLEMS])}{more}{also}; {advice}")
