"""The captions that a folder holds, in whatever form they were written: text or JSON beside each picture, or
one table for all (metadata.jsonl, .csv, .json), in any usual encoding.

A table names its pictures by file name; known are those of Hugging Face's imagefolder, of kohya's scripts, of
DiffSynth, and plain dictionaries. JSON never becomes a prompt: there is a caption in it, or it is refused.
Which pictures there are, and what is done about problems, is in sources.py.
"""

from __future__ import annotations

import csv
import errno
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from ppcoat.data.encodings import decode
from ppcoat.reading import json_value, regular_bytes

MAX_CAPTION_BYTES = 64 * 1024
MAX_TABLE_BYTES = 256 << 20
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
# Files of these endings may hold captions; others are never looked at.
TEXT_SUFFIXES = (".txt", ".caption", ".cap", ".text", ".tags", ".prompt", ".md", *TABLE_SUFFIXES)
# Keys of a picture's name and of its caption, those of the best known programs first.
FILE_KEYS = ("file_name", "image", "filename", "image_path", "path", "file", "image_file", "file_path", "img")
CAPTION_KEYS = (
    "text",
    "caption",
    "prompt",
    "description",
    "long_caption",
    "captions",
    "txt",
    "caption_short",
)
_LIKE_JSON = re.compile(r"""[\[{\s]*(["'])[\w -]{1,40}\1\s*:""")  # damaged, or as Python prints it
_TAGS = "tags"  # kohya puts them after the caption
_WANTED = f"wanted rows with one of {', '.join(FILE_KEYS[:3])} and one of {', '.join(CAPTION_KEYS[:3])}"


class BadCaption(Exception):
    """A caption file cannot be used; the text is the reason, in which the file is named."""


@dataclass(frozen=True)
class Caption:
    """text: without outer white space. encoding: of its file, "utf-8" or another, which is a guess. own: it
    was written for this picture alone, not for a whole folder. file: that holds it, None: a setting does."""

    text: str
    encoding: str = "utf-8"
    own: bool = True
    file: Path | None = None


class FolderCaptions:
    """The captions of `pictures` from the text files `texts`, all found in one data folder.

    suffix: of caption files, with its dot. What is beside a picture counts before what a table says of it,
    and that before the folder's default caption (default.txt, as in ai-toolkit). notes: what a user should
    know.
    """

    def __init__(self, pictures: Sequence[Path], texts: Sequence[Path], suffix: str) -> None:
        self.suffix, self.notes, self._table = suffix, [], ""
        keys = {_key(path) for path in pictures}
        self._beside = {_key(path): path for path in texts if path.suffix.lower() == suffix}
        lonely = {path for path in texts if _key(path) not in keys}
        self._near: dict[tuple, list[Path]] = {}
        for path in texts:
            if path in lonely or path.suffix.lower() != suffix:
                for name in {_loose(path.stem), _loose(path.stem.rpartition(".")[0] or path.stem)}:
                    self._near.setdefault((path.parent, name), []).append(path)
                    self._near.setdefault((None, name), []).append(path)
        self._of_table: dict[Path, Caption] = {}
        self._why: dict[Path, str] = {}  # why a table gives this picture none, though it is named
        self._no_tables: list[str] = []  # files that look like tables of captions and are none
        used = self._read_tables(lonely, pictures)
        default = f"default{suffix}", "default.txt"
        defaults = {path for path in lonely - used if path.name.lower() in default}
        self._defaults = {path.parent: _default(path) for path in sorted(defaults)}
        # caption files without a picture
        self.unused = {path for path in self._beside.values() if path in lonely} - defaults - used
        self._note_shared(pictures)

    def of(self, picture: Path) -> Caption | None:
        """Its caption; None where it has none, or an empty one. Raises BadCaption as read_caption does."""
        path = self._beside.get(_key(picture))
        caption = None if path is None else read_caption(path)
        if caption is None or not caption.text:
            caption = self._of_table.get(picture)
            if caption is not None and len(caption.text.encode("utf-8", "replace")) > MAX_CAPTION_BYTES:
                raise BadCaption(
                    f"the caption in {caption.file.name} is longer than {MAX_CAPTION_BYTES} bytes"
                )
        default = self._defaults.get(picture.parent)
        if (caption is None or not caption.text) and default is not None:
            if isinstance(default, BadCaption):
                raise default
            caption = default
        return caption if caption is not None and caption.text else None

    def missing(self, picture: Path) -> str:
        """Why a picture has no caption, with the file that was probably meant."""
        path = self._beside.get(_key(picture))
        if path is not None:
            return f"the caption {path.name} is empty"
        near = [each for place in (picture.parent, None) for name in (picture.stem, picture.name)
                for each in self._near.get((place, _loose(name)), ())]  # fmt: skip
        wanted = f"no caption {picture.stem}{self.suffix}"
        if not near:
            self.notes, self._no_tables = [*self.notes, *self._no_tables[:3]], []
            above = [f"{folder.name}/default.txt is for its own folder alone"
                     for folder in self._defaults if folder in picture.parents]  # fmt: skip
            reason = self._why.get(picture) or self._table or "".join(above[:1])
            return f"{wanted}, and {reason}" if reason else wanted
        self.unused.discard(near[0])
        if near[0].parent != picture.parent:
            return f"{wanted} beside it, but there is {near[0].parent.name}/{near[0].name}: move it"
        same = normal(near[0].stem) == normal(picture.stem) and re.fullmatch(r"\.\w+", near[0].suffix)
        also = f", or set caption_ext: {near[0].suffix[1:]}" if same else ""
        return f"{wanted}, but there is {near[0].name}: rename it{also}"

    def _read_tables(self, files: Iterable[Path], pictures: Iterable[Path]) -> set[Path]:
        """Take the captions of all tables, of two that name a picture those of the later; gives the files
        that are tables. One whose name promises captions and that gives none is noted, as is damage after a
        row with a picture; any other only where a picture has no caption (see missing)."""
        names, used = _Names(pictures), set()
        for file in sorted(files):
            promises = re.match(r"(?i)(metadata|caption|prompt|meta_)", file.name) is not None
            ending = file.suffix.lower()
            if ending not in TABLE_SUFFIXES and not (promises and ending == ".txt"):
                continue
            rows, damage = [], ""
            try:
                rows.extend(_rows(file))  # those before the damage stay in it
            except BadCaption as error:
                damage = str(error)
            found = [(names.find(file.parent, name), name, caption) for name, caption in rows]
            known = any(fitting for fitting, _, _ in found)
            if known or promises:
                used.add(file)
            if known and not damage:
                self._take(file, found)
                continue
            what = f"none of its {len(rows)} rows names a picture here; {_WANTED}" if rows else _WANTED
            what = "Parquet is not read here, write it as metadata.jsonl" if ending == ".parquet" else what
            notes = self.notes if known or promises else self._no_tables
            notes.append(damage or f"{file.name} gives no caption: {what}")
        return used

    def _take(self, file: Path, found: Sequence[tuple[list[Path], str, Caption | str]]) -> None:
        """The captions of one table's rows, each with the pictures that its name fits. What is odd is noted:
        names that fit none or several, and pictures that another table names, too."""
        self._table = f"no row in {file.name}"
        lost = [name for fitting, name, _ in found if not fitting]
        if lost:
            self.notes.append(f"{file.name} names {len(lost)} pictures that are not there: {lost[0]}, ...")
        unclear = {name: fitting for fitting, name, _ in found if len(fitting) > 1}
        for name, fitting in unclear.items():
            for picture in fitting:
                self._why.setdefault(picture, f"{name} in {file.name} fits several pictures")
        if unclear:
            name, fitting = next(iter(unclear.items()))
            some = " and ".join(path.relative_to(file.parent).as_posix() for path in fitting[:2])
            more = f" (and {len(unclear) - 1} more such names)" if len(unclear) > 1 else ""
            self.notes.append(
                f"{name} in {file.name} fits several pictures, e.g. {some}{more}: name each with its folder "
                "and ending"
            )
        certain = {fitting[0]: caption for fitting, _, caption in found if len(fitting) == 1}
        self._why |= {picture: reason for picture, reason in certain.items() if isinstance(reason, str)}
        captions = {picture: each for picture, each in certain.items() if isinstance(each, Caption)}
        twice: dict[Path, list[Path]] = {}
        for picture in captions.keys() & self._of_table.keys():
            twice.setdefault(self._of_table[picture].file, []).append(picture)
        for other, several in sorted(twice.items()):
            tables = " and ".join(f"{each.parent.name}/{each.name}" for each in (other, file))
            count = f"{len(several)} picture{'s' if len(several) > 1 else ''}, e.g. {min(several).name}"
            self.notes.append(f"{tables} both name {count}: the second counts")
        self._of_table |= captions

    def _note_shared(self, pictures: Iterable[Path]) -> None:
        users: dict[tuple, list[Path]] = {}
        for picture in pictures:
            if _key(picture) in self._beside and picture not in self._of_table:
                users.setdefault(_key(picture), []).append(picture)
        for key, several in users.items():
            if len(several) > 1:
                names = " and ".join(path.name for path in several)
                self.notes.append(f"{names} share the caption {self._beside[key].name}")


def read_caption(path: Path) -> Caption:
    """A caption file of one picture. Raises BadCaption for one that cannot be read, is longer than
    MAX_CAPTION_BYTES, in no known encoding, or JSON without a caption in it."""
    text, encoding = _decoded(_bytes_of(path, MAX_CAPTION_BYTES), path)
    text = text.strip()
    if path.suffix.lower() == ".json" or text.startswith(("{", "[")):
        text = _of_json(text, path)
    return Caption(text, encoding, file=path)


def _default(path: Path) -> Caption | BadCaption:
    """A folder's default caption, or why there is none: it is read once, for all pictures."""
    try:
        return replace(read_caption(path), own=False)
    except BadCaption as error:
        return error


def text_of(value: Any) -> str | None:
    """The caption in a value of JSON: a text, or what stands under one of CAPTION_KEYS; kohya's tags follow
    it. None where there is none."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, dict):
        return None
    found = [value[key] for key in CAPTION_KEYS if value.get(key)][:1]
    texts = [text[0] if isinstance(text, list) else text for text in found]  # several captions: the first
    tags = value.get(_TAGS)
    texts += [", ".join(map(str, tags)) if isinstance(tags, list) else tags] if tags else []
    return ", ".join(texts).strip() if all(isinstance(text, str) for text in texts) and texts else None


def _key(path: Path) -> tuple[Path, str]:
    """What a picture and its caption have in common."""
    return path.parent, normal(path.stem)


def _loose(name: str) -> str:
    """A stem without what is easily mistyped or added: case, wide letters, blanks, dashes, zeros in front of
    a number, the word caption or the like behind the name."""
    name = re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()
    return re.sub(r"(?<!\d)0+(?=\d)|(?<=.)(captions?|prompt|text|description)$", "", name)


def normal(name: str) -> str:
    """A file name as it is compared: macOS takes accents apart (NFD), others do not (NFC)."""
    return unicodedata.normalize("NFC", name)


def _bytes_of(path: Path, most: int) -> bytes:
    try:
        return regular_bytes(path, most)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BadCaption(f"the caption {path.name} is longer than {most} bytes") from None
        raise BadCaption(f"the caption {path.name} cannot be read ({error.strerror})") from None


def _decoded(raw: bytes, path: Path) -> tuple[str, str]:
    try:
        text, encoding = decode(raw)
    except UnicodeDecodeError:
        raise BadCaption(f"the caption {path.name} is in no known encoding (save it as UTF-8)") from None
    except UnicodeError as error:
        raise BadCaption(f"the caption {path.name} is {error} (save it as UTF-8)") from None
    return text, encoding


def _of_json(text: str, path: Path) -> str:
    """The caption in a JSON text; a .txt with brackets but no key, such as {a|b} or [red] dress, is a caption
    itself."""
    try:
        value = json_value(text)
    except ValueError:
        if path.suffix.lower() != ".json" and not _LIKE_JSON.match(text):
            return text
        raise BadCaption(f"the caption {path.name} is no JSON (mend it, or write plain text)") from None
    caption = text_of(value)
    if caption is None:
        keys = f"the keys {', '.join(map(str, list(value)[:5]))}" if isinstance(value, dict) else "no object"
        raise BadCaption(
            f'the caption {path.name} holds JSON without a caption, {keys} (put the text under "caption", or '
            "write it as plain text)"
        )
    return caption


def _rows(file: Path) -> Iterator[tuple[str, Caption | str]]:
    """(name of a picture, its caption or why there is none) of every row; nothing for a file that is no such
    table."""
    if file.suffix.lower() == ".parquet":
        return
    text, encoding = _decoded(_bytes_of(file, MAX_TABLE_BYTES), file)
    try:
        for name, row in _READERS[file.suffix.lower()](text):
            caption = text_of(row)
            empty = isinstance(row, dict) and any(key in row and not row[key] for key in CAPTION_KEYS)
            keys = f", not under {', '.join(map(str, list(row)[:5]))}" if isinstance(row, dict) else ""
            reason = (
                "is empty" if empty else f"was not found: wanted under {' or '.join(CAPTION_KEYS[:3])}{keys}"
            )
            none = f"the caption in its row of {file.name} {reason}"
            yield name, Caption(caption, encoding, file=file) if caption else none
    except (ValueError, csv.Error) as error:
        raise BadCaption(f"{file.name} is damaged: {' '.join(str(error).split())}") from None


def _json_lines(text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        return (yield from _json_table(text))
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold U+2028 and other line ends
        if line.strip():
            try:
                row = json_value(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            yield from _row(row)


def _json_table(text: str) -> Iterator[tuple[str, Any]]:
    try:
        data = json_value(text)
    except ValueError as error:
        if not str(error).startswith("Extra data"):
            raise
        return (yield from _json_lines(text))
    if isinstance(data, dict) and len(data) == 1 and isinstance(next(iter(data.values())), list):
        (data,) = data.values()  # {"images": [...]}
    if isinstance(data, list):
        for row in data:
            yield from _row(row)
    elif isinstance(data, dict):
        yield from data.items()


def _separated(text: str) -> Iterator[tuple[str, Any]]:
    start = re.match(r"[\r\n]*(sep=.[\r\n]+)?", text).end()  # Excel's own first line
    first = text[start:].partition("\n")[0]
    rows = csv.DictReader(io.StringIO(text[start:]), delimiter=max(",;\t|", key=first.count))
    for row in rows:
        more = row.pop(None, ())
        yield from _row({key.strip(): value for key, value in row.items()})
        if any(cell.strip() for cell in more):  # after its row, which tells that this is a table of captions
            number = text.count("\n", 0, start) + rows.line_num
            raise ValueError(f"line {number}: more cells than the header has; put the caption in quotes")


def _row(row: Any) -> Iterator[tuple[str, Any]]:
    """One row of a table, if it is one, an object with a picture's name -> the name, and what else it has
    under keys in small letters."""
    if isinstance(row, dict):
        row = {str(key).lower(): value for key, value in row.items()}
        for key in FILE_KEYS:
            name = row.get(key)
            name = (
                name.get("path") if isinstance(name, dict) else name
            )  # a picture of Hugging Face's datasets
            if isinstance(name, str) and name.strip():
                yield name, {other: value for other, value in row.items() if other != key}
                return


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines, ".json": _json_table, ".csv": _separated, ".tsv": _separated, ".txt": _separated,
}  # fmt: skip


class _Names:
    """Finds pictures by what tables call them: a path from the table's folder, or one from another machine,
    with or without its ending."""

    def __init__(self, pictures: Iterable[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self._short: dict[str, list[Path]] = {}
        for path in pictures:
            self._paths[normal(path.as_posix())] = path
            for short in {path.name, path.stem}:
                for key in (short, f"{path.parent.name}/{short}"):  # the second, as many may be called alike
                    self._short.setdefault(normal(key).casefold(), []).append(path)

    def find(self, folder: Path, name: str) -> list[Path]:
        """The pictures whose last folders and name agree with most of `name`, read from its end: none, one,
        or several that it does not tell apart. Only pictures that were found below `folder` come back,
        whatever the name says."""
        name = normal(name.strip().replace("\\", "/"))
        exact = self._paths.get(normal((folder / name).as_posix()))
        if exact is not None:
            return [exact]
        *folders, last = name.split("/")
        for key in ("/".join([*folders[-1:], last]), last):
            fits: dict[tuple, list[Path]] = {}
            for path in self._short.get(key.casefold(), ()):
                if path.is_relative_to(folder):
                    pairs = zip(reversed(folders), map(normal, reversed(path.parent.parts)), strict=False)
                    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                    fits.setdefault((equal, normal(path.name) == last), []).append(path)
            if fits:
                return fits[max(fits)]
        return []
