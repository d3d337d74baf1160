"""What the page Draw asks for, as one call of `generate` with a list of pictures, so that the model is read
once; and the way back, from a picture that was drawn to what was asked for.

    <drawings>/<time>/list.jsonl     the list          drawing.json    what was asked for, and the table
                      r0_c1.png      row 0, column 1   studio.json     the process (runs.py)
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from ppcoat.atomic import write_text
from ppcoat.errors import ConfigError
from ppcoat.reading import json_value, regular_bytes

Compare = Literal["one", "off", "checkpoints", "grid", "steps"]
LIST, ASKED = "list.jsonl", "drawing.json"
MOST_CELLS = 400
_MAX_JSON = 1 << 20
_WRONG_JSON = (ValueError, KeyError, TypeError, OverflowError)


@dataclass(frozen=True)
class Asked:
    """What the page asks for. loras: (file, strength). compare: one picture; beside it one without the LoRAs;
    one for each of `checkpoints`; a grid of `checkpoints` or of `step_counts` by `strengths`. checkpoints:
    (step, LoRA file) of a run, drawn with beside `loras`. None: as generate has it."""

    model: str = "tiny_flux"
    prompt: str = ""
    seed: int = 42
    steps: int = 28
    width: int | None = None
    height: int | None = None
    guidance_scale: float | None = None
    loras: tuple[tuple[str, float], ...] = ()
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    reference: tuple[str, ...] = ()
    vram: float | None = None
    compare: Compare = "one"
    checkpoints: tuple[tuple[str, str], ...] = ()
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    step_counts: tuple[int, ...] = (8, 16, 28)


@dataclass(frozen=True)
class Table:
    """Pictures by row and column. rows, columns: what they are called, "" for nothing. lines: of the list, by
    row and column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[tuple[Mapping[str, Any], ...], ...]

    @property
    def names(self) -> list[list[str]]:
        """Of the pictures' files, without ending."""
        return [[line["name"] for line in row] for row in self.lines]


def table_of(asked: Asked) -> Table:
    """The pictures that are asked for. Raises ConfigError for nothing to draw, or to compare."""
    if not asked.prompt.strip():
        raise ConfigError("prompt: came nothing, wanted what to draw")
    by_run = asked.compare in ("checkpoints", "grid")
    if by_run and not asked.checkpoints:
        raise ConfigError("this run has no LoRA files yet; choose another, or wait for its first checkpoint")
    if asked.compare in ("off", "steps") and not asked.loras:
        raise ConfigError("there is no LoRA to compare with and without; add one")
    rows, columns, cells = _arranged(asked)
    if not 0 < len(rows) * len(columns) <= MOST_CELLS:
        raise ConfigError(f"came {len(rows)} x {len(columns)} pictures, wanted 1 to {MOST_CELLS}")
    lines = tuple(
        tuple(_line(asked, f"r{r}_c{c}", cell) for c, cell in enumerate(row)) for r, row in enumerate(cells)
    )
    return Table(rows, columns, lines)


def _arranged(asked: Asked) -> tuple[tuple[str, ...], tuple[str, ...], list[list[dict[str, Any]]]]:
    """Titles of rows and columns, and in what the cells of each row differ from what is asked for."""
    own = [by for _, by in asked.loras]

    def with_checkpoint(number: int, by: float) -> list[float]:
        return [*own, *(by if number == each else 0.0 for each in range(len(asked.checkpoints)))]

    names = tuple(f"step {step}" if step.isdecimal() else step for step, _ in asked.checkpoints)
    by_strength = tuple(f"× {by:g}" for by in asked.strengths)
    if asked.compare == "one":
        return ("",), ("",), [[{"lora_scale": own}]]
    if asked.compare == "off":
        return ("",), ("LoRA", "LoRA × 0"), [[{"lora_scale": own}, {"lora_scale": [0.0] * len(own)}]]
    if asked.compare == "checkpoints":
        return ("",), names, [[{"lora_scale": with_checkpoint(i, 1.0)} for i in range(len(names))]]
    if asked.compare == "grid":
        return names, by_strength, [
            [{"lora_scale": with_checkpoint(i, by)} for by in asked.strengths] for i in range(len(names))
        ]  # fmt: skip
    return tuple(f"{count} steps" for count in asked.step_counts), by_strength, [
        [{"lora_scale": [by * each for each in own], "steps": count} for by in asked.strengths]
        for count in asked.step_counts
    ]  # fmt: skip


def write_drawing(asked: Asked, folder: Path, shown: str) -> list[str]:
    """Write the list of what is asked for -> the arguments of `python -m ppcoat` that draw it. shown: the
    folder as the command names it. Raises ConfigError as table_of does."""
    table = table_of(asked)
    lines = [json.dumps(line, ensure_ascii=False) for row in table.lines for line in row]
    write_text(folder / LIST, "\n".join(lines) + "\n")
    kept = {"asked": asdict(asked), "rows": table.rows, "columns": table.columns, "names": table.names}
    write_text(folder / ASKED, json.dumps(kept, ensure_ascii=False) + "\n")
    files = [path for path, _ in asked.loras]
    if asked.compare in ("checkpoints", "grid"):
        files += [path for _, path in asked.checkpoints]
    argv = ["generate", "--model", asked.model, "--prompts", f"{shown}/{LIST}", "--output_dir", shown]
    argv += ["--path_to_lora", *files] if files else []
    return argv + (["--vram", f"{asked.vram:g}"] if asked.vram else [])


def read_drawing(folder: Path) -> tuple[Asked, list[str], list[str], list[list[str]]] | None:
    """(what was asked for, rows, columns, names of the files) of an earlier drawing; None for no such."""
    try:
        found = json_value(regular_bytes(folder / ASKED, _MAX_JSON))
        names = [[Path(str(name)).name for name in row] for row in found["names"]]
        return _asked(found["asked"]), list(map(str, found["rows"])), list(map(str, found["columns"])), names
    except (OSError, AttributeError, *_WRONG_JSON):
        return None


def asked_of_picture(content: bytes) -> Asked:
    """What a picture of ours was drawn with, from the text in its PNG. Raises ConfigError for another."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            text, size = dict(picture.info), picture.size
        settings = json_value(text.get("settings", "{}"))
        named = json_value(text.get("files", "{}"))
        found = {**settings, **named, "prompt": str(text["prompt"])}
        paths, scales = found.get("path_to_lora"), found.get("lora_scale")
        if isinstance(paths, list) and isinstance(scales, list) and len(paths) == len(scales):
            # those of a grid that had no part in this picture are left out
            found["loras"] = [pair for pair in zip(paths, scales, strict=True) if pair[1]]
        return _asked(found | {"width": size[0], "height": size[1]})
    except (OSError, SyntaxError, Image.DecompressionBombError, *_WRONG_JSON):
        raise ConfigError("this is no PNG that ppcoat drew: its text holds no settings") from None


def numbers_of(text: str, whole: bool = False) -> tuple:
    """ "0, 0.5, 1" -> (0.0, 0.5, 1.0). Raises ConfigError for what is no list of numbers."""
    try:
        found = [float(part) for part in text.replace(";", ",").replace(" ", ",").split(",") if part]
        if not found or not all(map(math.isfinite, found)) or (whole and any(each % 1 for each in found)):
            raise ValueError
    except ValueError:
        what = "whole numbers" if whole else "numbers"
        raise ConfigError(f"came {text!r}, wanted {what} with commas between them") from None
    return tuple(map(int, found)) if whole else tuple(found)


def one_number(text: str, whole: bool = False) -> Any:
    """The only number in a text. Raises ConfigError for another text."""
    found = numbers_of(text, whole)
    if len(found) > 1:
        raise ConfigError(f"came {text!r}, wanted one number")
    return found[0]


def _line(asked: Asked, name: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"name": name}
    for key in ("prompt", "seed", "steps", "width", "height", "guidance_scale", "image", "mask", "strength"):
        if getattr(asked, key) is not None:
            line[key] = getattr(asked, key)
    line["reference"] = list(asked.reference)
    return {key: value for key, value in {**line, **cell}.items() if value != []}


def _asked(found: Mapping[str, Any]) -> Asked:
    """From what JSON holds: only what is of the right kind."""
    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("model", "prompt", "image", "mask", "compare"), (str,)),
        **dict.fromkeys(("seed", "steps", "width", "height"), (int,)),
        **dict.fromkeys(("guidance_scale", "strength", "vram"), (int, float)),
    }
    taken = {key: found[key] for key, kind in kinds.items() if type(found.get(key)) in kind}
    for key, kind in (("strengths", float), ("step_counts", int), ("reference", str)):
        if isinstance(found.get(key), list | tuple):
            taken[key] = tuple(kind(each) for each in found[key])
    for key, kinds_of in (("loras", (str, float)), ("checkpoints", (str, str))):
        if isinstance(found.get(key), Sequence):
            taken[key] = tuple(tuple(kind(each) for kind, each in zip(kinds_of, pair, strict=True))
                               for pair in found[key])  # fmt: skip
    if taken.get("compare") not in get_args(Compare):
        taken.pop("compare", None)
    return Asked(**taken)
