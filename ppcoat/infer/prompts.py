"""A list of pictures to draw, .jsonl, .csv or .txt -> one `ListedPicture` each, all of it checked before a
model is loaded.

    {"prompt": "a red dress", "seed": 7, "size": "1024x768", "lora_scale": [0.8, 0.5], "name": "dress-red"}
    prompt,seed,width,height,lora_scale
    a red dress --w 1024 --h 768 --d 7 --s 28 --n blurry

A column is a field of Drawing, under any of its names in COLUMNS; what a line leaves out is as the command's
flags say; several references stand in a list of JSON. The flags in a line of text are those of kohya's and
ai-toolkit's sample prompts. Theirs that mean another thing in each (--l), or ask for what is not done here,
are refused by name.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ppcoat.data.caption_files import MAX_CAPTION_BYTES
from ppcoat.data.encodings import decode
from ppcoat.errors import ConfigError, check_whole, unknown_name
from ppcoat.infer.drawing import MAX_PICTURES
from ppcoat.reading import regular_bytes

MOST_MISTAKES = 1000  # that are looked for
MAX_LIST_BYTES, MAX_NAME_BYTES = 64 << 20, 120
# Field of Drawing -> its other names: as a column, and with -- in a line of text.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("text", "caption"),
    "negative_prompt": ("negative", "neg", "n"),
    "seed": ("d",),
    "width": ("w",),
    "height": ("h",),
    "steps": ("s", "sample_steps", "num_inference_steps"),
    "guidance_scale": ("guidance", "g"),
    "true_cfg_scale": ("true_cfg",),
    "lora_scale": ("lora_strength", "network_multiplier", "m", "am"),
    "image": ("init_image",),
    "mask": ("mask_image",),
    "strength": ("denoising_strength",),
    "reference": ("ctrl_img",),
}
SIZE, NAME = "size", "name"  # columns that are no field
_FILES = ("image", "mask", "reference")  # an empty path is a mistake: another picture would be drawn
RESERVED = re.compile(r"contact(_\d+)?")  # names of the contact sheets
_FIELD_OF = {other: field for field, names in COLUMNS.items() for other in (field, *names)}
_KNOWN = (*COLUMNS, SIZE, NAME)
_REFUSED = {
    "l": "is guidance in ai-toolkit and classifier-free guidance in kohya's scripts: write guidance_scale "
    "(--g) or true_cfg_scale",
    **dict.fromkeys(("ss", "sampler"), "names a sampler, and there is one: leave it out"),
}
_FLAG = re.compile(r"(?:^|(?<=\s))--(\w+)(?:\s*=\s*|\s+|$)")
_DECIMAL = re.compile(r"(?i)[+-]?(\d{1,40}\.?\d{0,40}|\.\d{1,40})(e[+-]?\d{1,3})?")
_UNPRINTABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")
_NO_NAME = re.compile(r'[\0-\x1f\x7f-\x9f/\\:*?"<>|]|^[.\s]|[.\s]$|^(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$)')
_Drawing = TypeVar("_Drawing", bound=Any)
_types_of = cache(get_type_hints)  # which takes half a millisecond, and lists are long


@dataclass(frozen=True)
class ListedPicture:
    """One picture of a list. drawing: the settings of the command with those of its line, one prompt and one
    picture. name: of its file, without ending. line: where it stands in the list."""

    drawing: Any
    name: str
    line: int


def read_pictures(
    file: str | Path, drawing: _Drawing, check: Callable[[_Drawing], None]
) -> list[ListedPicture]:
    """The pictures of a list in its order; num_images of each line, from its seed on.

    drawing: an infer.drawing.Drawing, for what lines leave out. check: raises ConfigError for settings that
    cannot be drawn with. Raises ConfigError, naming file and line of the first mistake and how many more
    there are.
    """
    file = Path(file)
    mistakes: list[str] = []
    drawings: list[tuple[int, Any, str | None]] = []  # line, settings, name
    for number, row in _rows(file):
        try:
            if isinstance(row, ConfigError):
                raise row
            settings = _settings(row, drawing)
            name = settings.pop(NAME, None)
            one = replace(drawing, **settings, prompts=None)
            check(one)
        except ConfigError as error:
            mistakes.append(f"{file}, line {number}: {error}")
            if len(mistakes) > MOST_MISTAKES:
                break
            continue
        if len(drawings) + one.num_images > MAX_PICTURES:
            raise ConfigError(f"{file}: more than {MAX_PICTURES} pictures; split the list")
        for i in range(one.num_images):
            own = name if name is None or one.num_images == 1 else f"{name}_{one.seed + i}"
            drawings.append((number, replace(one, seed=one.seed + i, num_images=1), own))
    if mistakes:
        least = "at least " if len(mistakes) > MOST_MISTAKES else ""
        follow = f" (so many lines with mistakes follow: {least}{len(mistakes) - 1})"
        more = follow if len(mistakes) > 1 else ""
        raise ConfigError(mistakes[0] + more)
    if not drawings:
        raise ConfigError(f"{file} has no prompts: one a line, or rows with a prompt")
    return _named(file, drawings)


def slug(prompt: str) -> str:
    """A short, harmless piece of a file name: letters and digits, of any language."""
    words = unicodedata.normalize("NFC", prompt).lower()
    return re.sub(r"[\W_]+", "-", words).strip("-")[:40] or "picture"


def _named(file: Path, drawings: list[tuple[int, Any, str | None]]) -> list[ListedPicture]:
    """With a name for each: its own, or number, prompt and seed. Raises ConfigError for one name twice."""
    digits, pictures, lines = max(3, len(str(len(drawings) - 1))), [], {}
    for i, (number, drawing, own) in enumerate(drawings):
        name = own or f"{i:0{digits}d}_{slug(drawing.prompt[0])}_{drawing.seed}"
        key = unicodedata.normalize("NFC", name).casefold()  # as some file systems compare
        if key in lines:
            raise ConfigError(
                f"{file}, line {number}: the name {name!r} is that of line {lines[key]}, too; give another"
            )
        lines[key] = number
        pictures.append(ListedPicture(drawing, name, number))
    return pictures


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any] | ConfigError]]:
    """(line, what it says by column as written, or why it says nothing) of every line with something in it.
    Raises ConfigError for a file that cannot be read as a list."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(f"prompts: came {file}, wanted a {', '.join(_READERS)} file")
    yield from reader(prompt_text(file))


def prompt_text(file: Path) -> str:
    """What a text file holds, in any encoding that is known; one that is guessed is told. Raises
    ConfigError."""
    try:
        raw = regular_bytes(file, MAX_LIST_BYTES)
    except OSError as error:
        advice = "split the list" if error.errno == errno.EFBIG else "check the path"
        raise ConfigError(f"prompts: {file} cannot be read ({error.strerror}); {advice}") from None
    try:
        text, encoding = decode(raw)
    except UnicodeError:
        raise ConfigError(f"{file} is damaged or in no known encoding; save it as UTF-8") from None
    if not encoding.startswith("utf"):
        print(f"note: {file} is read as {encoding}, a guess; save it as UTF-8 if prompts look wrong")
    return text


def _of_text(text: str) -> Iterator[tuple[int, Mapping[str, Any] | ConfigError]]:
    """One prompt a line, with flags; not those with # at their start."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        prompt, *flags = _FLAG.split(line)
        row = [("prompt", prompt.strip())]
        row += [(flag, _unquoted(value.strip())) for flag, value in zip(flags[::2], flags[1::2], strict=True)]
        yield number, _once(row)


def _of_json_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any] | ConfigError]]:
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold U+2028 and other line ends
        if not line.strip():
            continue
        try:
            pairs = json.loads(line, object_pairs_hook=tuple)
        except (ValueError, RecursionError) as error:
            yield number, ConfigError(f"no JSON ({' '.join(str(error).split())}); mend it")
            continue
        if isinstance(pairs, tuple):
            yield number, _once(pairs)
        else:
            yield (
                number,
                ConfigError(f'came {line.strip():.40}, wanted an object such as {{"prompt": "a hat"}}'),
            )


def _of_table(text: str) -> Iterator[tuple[int, Mapping[str, Any] | ConfigError]]:
    """A header and rows, between , or ; or tabs; Excel's own first line sep=; may stand before them."""
    start = re.match(r"\s*(sep=.\r?\n)?", text).end()
    first = text[start:].partition("\n")[0]
    offset = text.count("\n", 0, start)
    reader = csv.reader(io.StringIO(text[start:], newline=""), delimiter=max(",;\t", key=first.count))
    header, number = None, offset
    try:
        for cells in reader:
            number, line = offset + reader.line_num, number + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
            elif any(cell.strip() for cell in cells[len(header) :]):
                yield line, ConfigError("more cells than the header has; put the prompt in quotes")
            else:
                pairs = [pair for pair in zip(header, cells, strict=False) if any(pair)]
                yield line, _once((name, cell or None) for name, cell in pairs)
    except csv.Error as error:
        yield number + 1, ConfigError(f"no table ({error}); mend it")


_READERS: dict[str, Callable[[str], Iterator[tuple[int, Mapping[str, Any] | ConfigError]]]] = {
    ".jsonl": _of_json_lines, ".csv": _of_table, ".tsv": _of_table, ".txt": _of_text,
}  # fmt: skip


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any] | ConfigError:
    """The pairs of a row under our names, without those that say nothing."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        plain = re.sub(r"[\s-]+", "_", key.strip().lower())
        name = _FIELD_OF.get(plain, plain)
        if value is None or (value == "" and name not in ("prompt", *_FILES)):
            continue
        if plain in _REFUSED:
            return ConfigError(f"{key!r} {_REFUSED[plain]}")
        if name not in _KNOWN:
            return ConfigError(unknown_name("column or flag", key, _KNOWN))
        if name in row:
            return ConfigError(f"{name} is given twice; leave one out")
        row[name] = value
    return row


def _settings(row: Mapping[str, Any], drawing: Any) -> dict[str, Any]:
    """A row as fields of Drawing, and its name. Raises ConfigError for values that are none."""
    row = dict(row)
    if not str(row.get("prompt", "")).strip():
        raise ConfigError("no prompt; write what to draw")
    if SIZE in row:
        sides = re.fullmatch(r"\s*(\d{1,6})\s*[xX×*]\s*(\d{1,6})\s*", str(row[SIZE]))
        if sides is None:
            raise ConfigError(f"size: came {row[SIZE]!r:.60}, wanted width x height such as 1024x768")
        if "width" in row or "height" in row:
            raise ConfigError("size is given beside width or height; leave one out")
        del row[SIZE]
        row |= {"width": sides[1], "height": sides[2]}
    hints = _types_of(type(drawing))
    settings = {key: _read(key, value, hints[key]) for key, value in row.items() if key != NAME}
    if "lora_scale" in settings and not drawing.path_to_lora:
        raise ConfigError("lora_scale is given, and no LoRA; add --path_to_lora, or leave it out")
    return settings | ({NAME: _name(row[NAME])} if NAME in row else {})


def _read(name: str, value: Any, kind: Any) -> Any:
    """The value of a field of Drawing whose type is `kind`, of one for list[...], or None."""
    kinds = str(kind)
    if "str" in kinds:
        several = value if name == "reference" and isinstance(value, list) else [value]
        texts = [_text(name, each) for each in several]
        if name in _FILES and "" in texts:
            raise ConfigError(f"{name} names no file; write its path, or leave {name} out")
        return texts if "list" in kinds else texts[0]
    if "list" in kinds:
        values = value if isinstance(value, list) else re.split(r"[\s,;]+", str(value).strip())
        return [_number(name, each) for each in values]
    number = _number(name, value)
    if "int" in kinds and (number != int(number) or abs(number) >= 2**63):
        raise ConfigError(f"{name}: came {value!r:.60}, wanted a whole number")
    return int(number) if "int" in kinds else number


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if re.fullmatch(r"[+-]?\d{1,40}", text) else text
        if isinstance(value, str) and _DECIMAL.fullmatch(text):
            value = float(text)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ConfigError(f"{name}: came {value!r:.60}, wanted a number")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: came {value!r:.60}, wanted a text")
    check_whole(name, text := value.strip())
    if len(text.encode()) > MAX_CAPTION_BYTES or _UNPRINTABLE.search(text):
        raise ConfigError(f"{name}: wanted at most {MAX_CAPTION_BYTES} bytes without control characters")
    return text


def _name(value: Any) -> str:
    """A file's name in the output folder, and nowhere else, on every system."""
    name = _text(NAME, str(value) if isinstance(value, int) else value)
    name = name[:-4] if name.lower().endswith(".png") else name
    if not name or _NO_NAME.search(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ConfigError(
            f"name: came {value!r:.60}, wanted a file name of at most {MAX_NAME_BYTES} bytes without folders "
            'and without any of / \\ : * ? " < > |'
        )
    if RESERVED.fullmatch(name.lower()):
        raise ConfigError(f"name: {name!r} is that of the contact sheet; give another")
    return name


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
