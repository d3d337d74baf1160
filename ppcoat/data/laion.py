"""LAION as tab-separated shards and a list of them -> an ordinary folder of pictures with captions.

    shard:  url <tab> {"caption": "a red dress", ...} <tab> /9j/4AAQSkZJRg...        one row per picture
    list:   0000000.txt                                                            one shard per line

The columns are given, or found by looking at the first rows. Nothing in a shard is trusted: captions are read
as JSON (or as a plain Python literal, which runs nothing), every picture is decoded once as a check, sizes
are limited, names must stay inside the data folder. Unusable rows are skipped, counted and named; too many of
them stop the run. Shards are unpacked once; the next run finds the pictures.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ppcoat.atomic import whole_folder
from ppcoat.data.caption_files import MAX_CAPTION_BYTES
from ppcoat.data.sources import load_image
from ppcoat.errors import ConfigError, printable
from ppcoat.reading import MAX_LEVELS, followed, json_value, regular_bytes

CAPTION_KEYS = ("caption", "text", "TEXT", "prompt", "long_caption", "caption_en", "blip_caption")
# first characters of a picture in base64 -> file suffix of its format
STARTS = {"/9j/": ".jpg", "iVBORw0KGgo": ".png", "UklGR": ".webp"}
MAX_ROW_BYTES = 64 << 20
MAX_LIST_BYTES = 64 << 20
PROBED_ROWS = 20
NAMED_ROWS = 5
ENOUGH_ROWS = 200  # rows before their bad share may stop the run
DONE = "unpacked.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaionSource:
    """Where the rows are and how to read them.

    image_column, caption_column: counted from 0; None: found in the first rows. limit: pictures wanted; None:
    all. max_bad_share: the run stops when a larger share of the rows is unusable, and more than one of
    them. stop_at_bad: it stops at the first unusable row. workers: threads that unpack.
    """

    data_path: str
    file_list_path: str
    image_column: int | None = None
    caption_column: int | None = None
    limit: int | None = None
    max_bad_share: float = 0.05
    stop_at_bad: bool = False
    workers: int = 1

    def shards(self) -> list[Path]:
        """The listed files, in order. Raises ConfigError for one that is missing or outside data_path."""
        root = Path(self.data_path)
        try:
            lines = regular_bytes(self.file_list_path, MAX_LIST_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"file list {self.file_list_path} cannot be read ({error}); wanted one name in UTF-8 a line"
            ) from None
        names = [line.split("\t")[0].strip() for line in lines if line.strip()]
        if not root.is_dir() or not names:
            what = f"names no shard: {self.file_list_path}" if root.is_dir() else f"has no data folder {root}"
            raise ConfigError(f"the file list {what}; give --data_path and --file_list_path of one data set")
        paths = [root / name for name in names]
        for name, path in zip(names, paths, strict=True):
            try:
                inside, there = followed(path).is_relative_to(followed(root)), path.is_file()
            except (OSError, ValueError, RuntimeError):  # a long name; a zero byte; a circle of links
                inside, there = True, False
            if not inside:
                raise ConfigError(f"file list: {printable(name)} is outside {root}; wanted names inside it")
            if not there:
                raise ConfigError(
                    f"file list: there is no {printable(name)} in {root}; complete the download"
                )
        return paths

    def key(self) -> str:
        """12 hex digits that identify the rows and the settings they are read with."""
        facts = [self.image_column, self.caption_column, self.limit]
        facts += [(path.name, path.stat().st_size) for path in self.shards()]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


@dataclass
class Unpacked:
    """Result of unpacking: the folder, its pictures, the number of unusable rows and the first reasons."""

    folder: Path
    pictures: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for the user."""
        return f"LAION: {self.pictures} pictures unpacked to {self.folder}, {self.bad} rows skipped"


def unpack_laion(source: LaionSource, folder: Path) -> Unpacked:
    """Write the rows into `folder` as 00000_0000012.jpg and .txt (shard, row), completely or not at all.

    A folder of an earlier call is complete and is used as it is, unless its DONE is damaged. Raises
    ConfigError for a wrong list, columns that cannot be found, too many unusable rows, and a full disk.
    """
    earlier = _unpacked_before(folder)
    if earlier is not None:
        return earlier
    shards = source.shards()
    columns = _columns(source, shards[0])
    done = Unpacked(folder)
    try:
        with whole_folder(folder, replace=os.path.lexists(folder / DONE)) as draft:
            _unpack_all(source, shards, columns, draft, done)
            facts = {"pictures": done.pictures, "bad": done.bad, "reasons": done.reasons}
            (draft / DONE).write_text(json.dumps(facts), "utf-8")
    except OSError as error:
        raise ConfigError(
            f"unpacking to {folder}: {error.strerror}; make room or choose another place"
        ) from None
    if done.bad:
        _log.warning("%s: %s", done.line(), "; ".join(done.reasons))
    return done


def _unpacked_before(folder: Path) -> Unpacked | None:
    """What an earlier call found; None where there was none, or what it left in DONE is damaged."""
    try:
        facts = json_value(regular_bytes(folder / DONE, MAX_CAPTION_BYTES))
        pictures, bad, reasons = (facts[key] for key in ("pictures", "bad", "reasons"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = type(pictures) is int and type(bad) is int and isinstance(reasons, list)
    return Unpacked(folder, pictures, bad, list(map(str, reasons))) if whole and pictures > 0 <= bad else None


class _BadRow(Exception):
    """A row cannot be used; the text is the reason."""


def _unpack_all(
    source: LaionSource, shards: list[Path], columns: tuple[int, int], draft: Path, done: Unpacked
) -> None:
    wanted = source.limit if source.limit is not None else float("inf")
    with ThreadPoolExecutor(max(1, source.workers)) as threads:
        for number, shard in enumerate(shards):
            rows = enumerate(_rows(shard))
            while done.pictures < wanted:
                # a few at a time, because each row contains a whole picture
                some = list(islice(rows, int(min(4 * max(1, source.workers), wanted - done.pictures))))
                if not some:
                    break
                jobs = [
                    threads.submit(_unpack, row, columns, draft / f"{number:05d}_{i:07d}") for i, row in some
                ]
                for (i, _), job in zip(some, jobs, strict=True):
                    _count(source, done, f"{shard.name} row {i + 1}", job.result())
    tried = done.pictures + done.bad
    if not done.pictures or done.bad > max(1, source.max_bad_share * tried):
        raise _too_bad(source, done)


def _count(source: LaionSource, done: Unpacked, where: str, reason: str | None) -> None:
    if reason is None:
        done.pictures += 1
        return
    done.bad += 1
    if len(done.reasons) < NAMED_ROWS:
        done.reasons.append(printable(f"{where}: {reason}"))
    rows = done.pictures + done.bad
    if source.stop_at_bad or (rows >= ENOUGH_ROWS and done.bad > source.max_bad_share * rows):
        raise _too_bad(source, done)


def _too_bad(source: LaionSource, done: Unpacked) -> ConfigError:
    return ConfigError(
        f"{done.bad} of {done.bad + done.pictures} rows cannot be used, wanted at most "
        f"{0 if source.stop_at_bad else source.max_bad_share:.0%}: {'; '.join(done.reasons)}; check "
        "--image_column and --caption_column, or raise --max_bad_share"
    )


def _unpack(row: bytes | None, columns: tuple[int, int], path: Path) -> str | None:
    """Write one row -> the reason why it cannot be used, or None."""
    try:
        cells = _cells(row)
        if len(cells) <= max(columns):
            raise _BadRow(f"it has {len(cells)} columns, wanted at least {max(columns) + 1}")
        caption = _caption(cells[columns[1]])
        picture, suffix = _picture(cells[columns[0]])
        file = path.with_suffix(suffix)
        file.write_bytes(picture)
        try:
            load_image(file, 16, 16)
        except ConfigError as error:
            file.unlink()
            raise _BadRow(str(error).partition(": ")[2] or str(error)) from None
        path.with_suffix(".txt").write_text(caption + "\n", "utf-8")
    except _BadRow as error:
        return str(error)
    return None


def _rows(shard: Path) -> Iterator[bytes | None]:
    """Lines of a shard without line ends; None for a line that is too long to be read into memory."""
    with open(shard, "rb") as file:
        while line := file.readline(MAX_ROW_BYTES):
            if line.endswith(b"\n") or len(line) < MAX_ROW_BYTES:
                yield line.rstrip(b"\r\n")
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield None


def _cells(row: bytes | None) -> list[str]:
    if row is None:
        raise _BadRow(f"it is longer than {MAX_ROW_BYTES >> 20} MiB")
    try:
        return row.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        raise _BadRow("it is not UTF-8") from None


def _picture(cell: str) -> tuple[bytes, str]:
    """Base64 text -> bytes of a picture and the file suffix of its format."""
    suffix = next((suffix for start, suffix in STARTS.items() if cell.startswith(start)), None)
    if suffix is None:
        raise _BadRow(f"column of the picture begins with {cell[:12]!r}, wanted JPEG, PNG or WebP in base64")
    try:
        return base64.b64decode(cell, validate=True), suffix
    except binascii.Error as error:
        raise _BadRow(f"its base64 is damaged ({error})") from None


def _caption(cell: str) -> str:
    """A JSON object, a Python literal of one, or plain text -> the caption. Nothing in the cell is
    executed."""
    cell = cell.strip()
    if len(cell.encode()) > MAX_CAPTION_BYTES or sum(cell.count(mark) for mark in "{[(") > MAX_LEVELS:
        raise _BadRow(f"its caption is longer than {MAX_CAPTION_BYTES} bytes or nested too deep")
    text = cell
    if cell.startswith("{"):
        facts = _object(cell)
        text = next((facts[key] for key in CAPTION_KEYS if isinstance(facts.get(key), str)), "")
    text = " ".join(text.split())
    if not text.isascii() and any("\ud800" <= mark <= "\udfff" for mark in text):
        raise _BadRow("its caption holds half of a character (a lone surrogate)")
    if not text:
        raise _BadRow(f"it has no caption under any of {', '.join(CAPTION_KEYS)}")
    return text


def _object(cell: str) -> dict:
    for read in (json.loads, ast.literal_eval):
        try:
            facts = read(cell)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(facts, dict):
            return facts
    raise _BadRow("its caption is neither JSON nor a plain literal")


def _columns(source: LaionSource, shard: Path) -> tuple[int, int]:
    """Columns of picture and caption, as given or found in the first rows of a shard."""
    image, caption = source.image_column, source.caption_column
    if image is not None and caption is not None:
        return image, caption
    found: dict[str, dict[int, int]] = {"image": {}, "caption": {}, "text": {}}
    for row in islice(_rows(shard), PROBED_ROWS):
        try:
            kinds = [_kind(cell) for cell in _cells(row)]
        except _BadRow:
            continue
        for column, kind in enumerate(kinds):
            if kind:
                found[kind][column] = found[kind].get(column, 0) + 1
    image = _most(found["image"]) if image is None else image
    if caption is None:
        caption = _most(found["caption"])
        caption = _most(found["text"]) if caption is None else caption
    if image is None or caption is None:
        lacks = "a picture in base64" if image is None else "a caption"
        raise ConfigError(
            f"{shard.name}: no column of its first rows looks like {lacks}; give --image_column and "
            "--caption_column, counted from 0"
        )
    return image, caption


def _kind(cell: str) -> str | None:
    """What a cell looks like: "image", "caption" (an object with one), "text" (words), or None."""
    if cell.startswith(tuple(STARTS)):
        return "image"
    try:
        caption = _caption(cell)
    except _BadRow:
        return None
    if cell.lstrip().startswith("{"):
        return "caption"
    return "text" if " " in caption and "://" not in caption else None


def _most(counts: dict[int, int]) -> int | None:
    return max(counts, key=lambda column: (counts[column], -column)) if counts else None
