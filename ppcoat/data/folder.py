"""One folder of pictures, looked at without a run: what a training would make of it, picture by picture.

    python -m ppcoat data report pictures --resolution 1024 --trigger_word sks

What is odd about a picture is found here once, for the report of a run, the command and the page, which shows
pictures small: whole, upright, as they are trained (on white, in sRGB).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import ValidationError

from ppcoat.config.explain import came_and_wanted
from ppcoat.config.flags import flag
from ppcoat.config.schema import RunConfig
from ppcoat.data.examples import Dataset, Example, duplicates, scan_datasets
from ppcoat.data.sources import upright_picture
from ppcoat.errors import ConfigError

_LITTLE = 0.25  # of the pixels of resolution x resolution: the picture has no more
NoteKind = Literal["no_caption", "duplicate", "small", "cropped", "guessed", "other"]


@dataclass(frozen=True, kw_only=True)
class FolderFlags:
    """Settings of `data report`, and of the page that shows the folder."""

    folder: str = flag("folder of pictures and captions", positional=True, metavar="FOLDER")
    resolution: int = flag("side in pixels at which a square picture would be trained", 512)
    caption_ext: str = flag("ending of caption files", "txt")
    trigger_word: str | None = flag("word that stands for what is trained", None)
    control_path: str | None = flag("folder of references with the pictures' names", None)
    mask_path: str | None = flag("folder of masks with the pictures' names", None)


@dataclass(frozen=True)
class PictureNote:
    """Something about a picture that its owner should know. detail: the other picture, sizes, share or
    encoding, or for "other" all of it."""

    kind: NoteKind
    detail: str = ""


def folder_dataset(flags: FolderFlags) -> Dataset:
    """The folder as a dataset of a run; pictures that cannot be used are in its `images.bad`, those without a
    caption have an empty one. Raises ConfigError for wrong settings, and where no picture is left."""
    beside = {"control_path": flags.control_path, "mask_path": flags.mask_path}
    data = {
        "folder_path": flags.folder,
        "resolution": flags.resolution,
        "caption_ext": flags.caption_ext,
        "trigger_word": flags.trigger_word or None,
        "default_caption": "",
        "skip_bad": True,
        **{key: path for key, path in beside.items() if path},
    }
    try:
        config = RunConfig(name="report", model={"name_or_path": "none"}, datasets=[data])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        said = first["ctx"]["error"] if first["type"] == "value_error" else came_and_wanted(first)
        raise ConfigError(f"{first['loc'][-1]}: {said}") from None
    return scan_datasets(config)[0]


def picture_notes(dataset: Dataset) -> dict[Path, list[PictureNote]]:
    """What the report warns of, by picture; pictures with nothing to say are left out."""
    twins = duplicates(dataset.images.items)
    examples = {example.item.image_path: example for example in dataset.examples}
    resolution = dataset.config.resolutions[0]
    found = {path: _notes_of(example, twins.get(path, []), resolution) for path, example in examples.items()}
    return {path: notes for path, notes in found.items() if notes}


def thumbnail(path: Path, side: int) -> bytes:
    """A picture as JPEG of at most `side` pixels each way; never enlarged. Raises BadFile."""
    image = upright_picture(path, least=side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=82)
    return written.getvalue()


def _notes_of(example: Example, twins: list[Path], resolution: int) -> list[PictureNote]:
    item, notes = example.item, []
    if not item.has_caption:
        notes.append(PictureNote("no_caption"))
    if twins:
        notes.append(PictureNote("duplicate", ", ".join(path.name for path in twins)))
    width, height = example.size
    if example.is_small or width * height < resolution**2 * _LITTLE:
        notes.append(PictureNote("small", f"{item.width} x {item.height}, trained at {width} x {height}"))
    if example.is_cropped:
        notes.append(PictureNote("cropped", f"{example.crop:.0%}"))
    if item.encoding != "utf-8":
        notes.append(PictureNote("guessed", item.encoding))
    return notes + [PictureNote("other", note) for note in item.notes]
