"""Drawing a list of pictures (prompts.py): what is there already is left alone, the model is read once, and
at the end there are contact sheets and a list of what was drawn.

    <output_dir>/000_a-red-dress_42.png      in its text: prompt, the settings that decide the picture, and
                                             the names of the files that it was drawn with
                 contact.png, contact_2.png  all pictures of the list, 100 a page
                 pictures.jsonl              name and settings of each; a list that can be drawn again

Settings stand for files by what is in them, not by where they are.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from ppcoat.atomic import remove_dead_drafts, whole_file, write_text
from ppcoat.data.content_keys import content_key, file_digest
from ppcoat.device import default_dtype
from ppcoat.infer.drawers import Drawer
from ppcoat.infer.editing import as_it_is, opened_picture
from ppcoat.infer.prompts import COLUMNS, ListedPicture
from ppcoat.lora.files import CONFIG, adapter_file
from ppcoat.models.fingerprint import folder_identity
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.offload import Placement
from ppcoat.models.tensor_files import PATIENCE
from ppcoat.progress import Progress
from ppcoat.reading import json_value, only_regular

SETTINGS, FILES, LIST = "settings", "files", "pictures.jsonl"
# Fields of Drawing that leave the picture as it is. Any other decides it, those of files by their content.
# Of --vram that is what the plan chose by it.
_DECIDES_NOTHING = ("prompts", "output_dir", "num_images", "device", "ignore_unknown", "offload", "cache_dir",
                    "vram", "quantize")  # fmt: skip
_MODEL = ("model", "text_encoders", "vae", "tokenizers")
_LORAS, _PICTURE_FILES = "path_to_lora", ("control_image", "image", "mask", "reference")
_END_OF_PNG = b"IEND\xae\x42\x60\x82"
COLUMNS_OF_SHEET, ROWS_OF_SHEET, TILE, CAPTION = 10, 10, 160, 30  # the last two in pixels


class Batch:
    """The pictures of one list in one folder. drawing: the command's settings; model, how: it draws with
    these, how is the dtype and the placement."""

    def __init__(
        self,
        drawing: Any,
        pictures: Sequence[ListedPicture],
        folder: Path,
        model: FluxFiles | Path,
        how: tuple[str | None, Placement],
    ) -> None:
        self.pictures, self.folder, self.list = pictures, folder, Path(drawing.prompts)
        dtype, placed = how
        chosen = {"dtype": dtype or default_dtype(), "quantize": placed.quantize, "tiles": placed.vae_tiling}
        self._identity = _identity(drawing, model) | {name: value for name, value in chosen.items() if value}

    def draw(self, load: Callable[[], Drawer]) -> list[Path]:
        """Draw what is not there; returns the files of all pictures. load: reads the model; called only where
        there is something to draw."""
        files = [self.folder / f"{picture.name}.png" for picture in self.pictures]
        remove_dead_drafts(self.folder)
        looked_at = Progress(files, "looking at pictures", unit="picture", delay=PATIENCE)
        there = [_settings_in(file) for file in looked_at]
        wanted = [self.settings(picture) for picture in self.pictures]
        left = [i for i, (one, other) in enumerate(zip(wanted, there, strict=True)) if one != other]
        same, again = len(files) - len(left), sum(files[i].exists() for i in left)
        changed = f" ({again} of them again: drawn with other settings)" if again else ""
        print(f"{len(files)} pictures: {same} are there as wanted, {len(left)} to draw{changed}")
        if left:
            self._draw([self.pictures[i] for i in left], [files[i] for i in left], load)
        self._write_list(wanted)
        for page in _write_sheets(files, self.folder):
            print(page)
        return files

    def settings(self, picture: ListedPicture) -> dict[str, Any]:
        """What decides the picture, as it stands in its PNG."""
        left_out = (*_DECIDES_NOTHING, *_MODEL, _LORAS, *_PICTURE_FILES)
        own = {f.name: getattr(picture.drawing, f.name) for f in fields(picture.drawing)}
        own = {name: value for name, value in own.items() if name not in left_out and value is not None}
        own["prompt"] = picture.drawing.prompt[0]
        own["lora_scale"] = [by for _, by in picture.drawing.loras]
        return own | self._identity | self._contents(picture.drawing)

    def _contents(self, drawing: Any) -> dict[str, Any]:
        """What is in the pictures that it is drawn from."""
        found = {}
        for name, given in ((name, getattr(drawing, name)) for name in _PICTURE_FILES):
            files = given if isinstance(given, list) else [given]
            for file in files if given is not None else ():
                found[name] = found.get(name, "") + file_digest(file)[:16]
        return found

    def _draw(
        self, pictures: Sequence[ListedPicture], files: Sequence[Path], load: Callable[[], Drawer]
    ) -> None:
        start, done = time.perf_counter(), 0
        try:
            drawer = load()
            drawer.pipeline.set_progress_bar_config(disable=True)
            found = drawer.drawn([picture.drawing for picture in pictures])
            for picture, file in zip(Progress(pictures, "drawing", unit="picture"), files, strict=True):
                (image,) = next(found)
                note = PngInfo()
                note.add_itxt("prompt", picture.drawing.prompt[0])
                note.add_itxt(SETTINGS, json.dumps(self.settings(picture), ensure_ascii=False))
                note.add_itxt(FILES, json.dumps(_named_files(picture.drawing), ensure_ascii=False))
                with whole_file(file) as draft:
                    image.save(draft, pnginfo=note)
                done += 1
        except KeyboardInterrupt:
            print(
                f"stopped: {done} of {len(files)} drawn, all of them whole; the same command draws the rest",
                file=sys.stderr,
            )
            raise
        seconds = time.perf_counter() - start
        print(f"{done} pictures drawn in {seconds:.1f} s, with reading the model, in {self.folder}")

    def _write_list(self, wanted: Sequence[dict[str, Any]]) -> None:
        goal = self.folder / LIST
        if goal.exists() and goal.samefile(self.list):
            return
        rows = []
        for picture, settings in zip(self.pictures, wanted, strict=True):
            files = {name: getattr(picture.drawing, name) for name in _PICTURE_FILES}
            own = settings | {name: file for name, file in files.items() if file is not None}
            own = {name: own[name] for name in COLUMNS if own.get(name) not in (None, "", [])}
            rows.append(json.dumps({"name": picture.name} | own, ensure_ascii=False))
        write_text(goal, "\n".join(rows) + "\n")


def _named_files(drawing: Any) -> dict[str, Any]:
    """The files of a drawing as the command named them, for who wants to draw it again; nothing else reads
    it. Of an absolute path that is the name alone: a picture does not tell where its files were."""

    def name(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    named = {each: getattr(drawing, each) for each in ("model", _LORAS, *_PICTURE_FILES)}
    return {
        each: name(value) if isinstance(value, str) else list(map(name, value))
        for each, value in named.items()
        if value
    }


def _identity(drawing: Any, model: FluxFiles | Path) -> dict[str, Any]:
    """What the files are that a drawing is made with. Pieces of the model's are read, all of the others."""
    places = model.components.values() if isinstance(model, FluxFiles) else [model]
    found = {"model": folder_identity(*dict.fromkeys(Path(place) for place in places))[:16], "loras": []}
    for path, _ in drawing.loras:
        file = adapter_file(path)
        beside = file.parent / CONFIG
        digests = [file_digest(each) for each in (file, beside) if each.is_file()]
        found["loras"].append(content_key(*digests)[:16])
    return found


def _settings_in(file: Path) -> dict[str, Any] | None:
    """What a picture was drawn with; None for one that is not there, not whole or of another program."""
    try:
        with open(file, "rb", opener=only_regular) as raw:
            raw.seek(-len(_END_OF_PNG), 2)
            if raw.read() != _END_OF_PNG:
                return None
        return json_value(opened_picture(file, as_it_is).info.get(SETTINGS, "null"))
    except (OSError, ValueError, TypeError):
        return None


def _write_sheets(files: Sequence[Path], folder: Path) -> list[Path]:
    """Contact sheets of the pictures, so many a page; those of a longer list go."""
    pages, size = [], COLUMNS_OF_SHEET * ROWS_OF_SHEET
    for start in Progress(range(0, len(files), size), "contact sheets", unit="page"):
        page = folder / (f"contact_{len(pages) + 1}.png" if pages else "contact.png")
        with whole_file(page) as draft:
            _sheet(files[start : start + size]).save(draft)
        pages.append(page)
    number = len(pages) + 1
    while (old := folder / f"contact_{number}.png").exists():
        old.unlink()
        number += 1
    return pages


def _sheet(files: Sequence[Path]) -> Image.Image:
    """Pictures side by side, each with its name below it, as far as a tile is wide."""
    columns = min(COLUMNS_OF_SHEET, len(files))
    rows = -(-len(files) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, file in enumerate(files):
        x, y = i % columns * TILE, i // columns * (TILE + CAPTION)
        picture = opened_picture(file)
        width, height = picture.size
        tile = ImageOps.contain(picture, (TILE - 6, TILE - 6))
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        for row, text in enumerate((file.stem, f"{width}x{height}")):
            pen.text((x + 3, y + TILE + 12 * row), _fitting(text, font), fill="black", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.ImageFont) -> str:
    """As much of a text as is one tile wide, of the letters that the font has."""
    text = "".join(letter if letter < "\u0250" else "?" for letter in text)
    while font.getlength(text) > TILE - 6:
        text = f"{text.rstrip('.')[:-1]}..."
    return text
