"""Editing pictures from the command line: which pipeline draws, by the model and by what is given, at which
size, and what cannot be drawn. All of it is checked before a model is loaded.

    --reference, or --image with FLUX.1 Kontext     FluxKontextPipeline
    --image and --mask with FLUX.1 Fill             FluxFillPipeline
    --image and --mask with another FLUX.1          FluxInpaintPipeline
    --image with another FLUX.1                     FluxImg2ImgPipeline
"""

from __future__ import annotations

import inspect
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ppcoat.data.colours import Convert, grey, on_colour
from ppcoat.data.sources import FORMATS, BadFile, upright_picture
from ppcoat.errors import ConfigError
from ppcoat.infer.drawing import EditFlags
from ppcoat.lora import LoRAFile
from ppcoat.models.flux.editing import (
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
)
from ppcoat.models.flux.files import INPUTS_OF_CLASS, FluxFiles
from ppcoat.models.flux.picture_inputs import (
    first_step,
    latent_mask,
    output_size,
    picture_mask,
    reference_size,
)
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.pictures import TOKEN_SIDE
from ppcoat.models.tensor_files import component_config

TRAINED_SIDE = 1024  # pixels of the models whose references are seen at KONTEXT_SIZES
ON_BLACK = on_colour((0, 0, 0))
MOST_TOLD = 4  # drawings of which each has a line


_Drawing = TypeVar("_Drawing", bound=EditFlags)


@dataclass(frozen=True)
class Sight:
    """What a FLUX model sees. fill, kontext: whether it is that; side: pixels of its own size; latent_side:
    pixels of a latent, each way."""

    model: str
    fill: bool
    kontext: bool
    side: int
    latent_side: int

    @classmethod
    def of(cls, files: FluxFiles) -> Sight:
        """From configs and names: Kontext's tensors are those of FLUX.1-dev."""
        config = component_config(files["transformer"], "transformer")
        inputs = config.get("in_channels", 64)
        fill = inputs == INPUTS_OF_CLASS["FluxFillPipeline"] * (config.get("out_channels") or inputs)
        kontext = files.class_name == "FluxKontextPipeline" or "kontext" in files.base.name.lower()
        vae = component_config(files["vae"], "vae")
        side, halvings = vae.get("sample_size", TRAINED_SIDE), len(vae["block_out_channels"]) - 1
        return cls(str(files.base), fill, kontext and not fill, side, 2**halvings)


def check_edit_flags(drawing: EditFlags) -> None:
    """Raises ConfigError for what no model draws."""
    for name in ("mask", "strength"):
        if getattr(drawing, name) is not None and drawing.image is None:
            raise ConfigError(f"{name} without an image: give --image, the picture that is drawn anew")
    if drawing.strength is not None:
        first_step(1, drawing.strength)


def prepared_all(
    drawings: Sequence[_Drawing],
    places: Sequence[str],
    files: FluxFiles,
    loras: Sequence[tuple[LoRAFile, float]],
) -> list[_Drawing]:
    """The drawings at the sizes of the pictures that they are drawn from (`prepared`); prints which pipelines
    draw them. places: how a message about each begins. loras: of all drawings. Raises ConfigError."""
    sight, ready = Sight.of(files), []
    for one, place in zip(drawings, places, strict=True):
        try:
            ready.append(prepared(one, sight))
        except ConfigError as error:
            raise ConfigError(f"{place}{error}") from None
    paths = [path for path, _ in drawings[0].loras]
    _tell(ready, sight, list(zip(paths, (file for file, _ in loras), strict=True)))
    return ready


def edit_class(drawing: Any, sight: Sight) -> type[FluxPipeline]:
    """The pipeline that draws it. Raises ConfigError for what this model does not draw."""
    image, mask, references = drawing.image, drawing.mask, drawing.reference
    if sight.fill:
        if references:
            raise ConfigError(f"reference: {sight.model} is FLUX.1 Fill, which looks at none; leave it out")
        if image is None or mask is None:
            raise ConfigError(
                f"{sight.model} is FLUX.1 Fill, which fills a hole in a picture: give --image and --mask, "
                "white where it is filled"
            )
        return FluxFillPipeline
    if references or (sight.kontext and image is not None):
        if mask is not None or drawing.strength is not None:
            which = "mask" if mask is not None else "strength"
            raise ConfigError(f"{which}: references are edited by the prompt alone; leave it out")
        if image is not None and not sight.kontext:
            raise ConfigError(
                f"image and reference: {sight.model} is not FLUX.1 Kontext; leave one of them out"
            )
        if drawing.control_image is not None:
            raise ConfigError("control_image and a reference do not go together; leave one of them out")
        return FluxKontextPipeline
    if image is None:
        return FluxPipeline  # also with Kontext
    return FluxImg2ImgPipeline if mask is None else FluxInpaintPipeline


def prepared(drawing: _Drawing, sight: Sight) -> _Drawing:
    """The drawing at the size of its picture, unless it says another: the sides rounded down to 16, and at
    most, with Kontext about, the pixels of the model's own size.

    Raises ConfigError for a picture that cannot be read or is too small, a mask of another size or that marks
    nothing or everything, and as `edit_class`.
    """
    kind = edit_class(drawing, sight)
    shown = _shown(drawing)
    if not shown:
        return drawing
    width, height = shown[0].size
    for name, picture in zip(_names(drawing), shown, strict=True):
        if min(picture.size) < TOKEN_SIDE:
            came = f"{name} is {picture.width}x{picture.height}"
            raise ConfigError(f"{came}, wanted at least {TOKEN_SIDE} pixels each way: enlarge it")
    size = _size(drawing, height, width, sight, kind)
    drawing = replace(drawing, height=size[0], width=size[1])  # type: ignore[call-arg]  # all flags that draw have them
    if kind is FluxKontextPipeline:  # its --image is the first of its references
        return replace(drawing, image=None, reference=_names(drawing))
    if drawing.mask is not None:
        _check_mask(drawing, (width, height), sight.latent_side if kind is FluxInpaintPipeline else 1)
    return drawing


def edit_arguments(drawing: Any, sight: Sight) -> dict[str, Any]:
    """What the pipeline of `edit_class` is called with, beside the prompts and what FluxPipeline is."""
    kind, shown = edit_class(drawing, sight), _shown(drawing)
    if kind is FluxPipeline:
        return {}
    if kind is FluxKontextPipeline:
        trained = sight.side >= TRAINED_SIDE
        shown = shown if trained else [_no_larger(each, drawing.height, drawing.width) for each in shown]
        area = drawing.height * drawing.width
        return {"image": [shown], "max_area": area, "_auto_resize": trained}
    found = {"image": shown[0]}
    if drawing.mask is not None:
        found["mask_image"] = opened_picture(drawing.mask, grey)
    if drawing.strength is not None:
        found["strength"] = drawing.strength
    return found


def reference_pixels(drawing: Any, sight: Sight) -> int:
    """Of all references of a drawing that is `prepared`, at the sizes at which they are seen."""
    found = 0
    for name in drawing.reference or ():
        with Image.open(name) as picture:
            width, height = picture.size
        seen = math.prod(reference_size(height, width, sight.side >= TRAINED_SIDE))
        found += seen if sight.side >= TRAINED_SIDE else min(seen, drawing.height * drawing.width)
    return found


def own_guidance(kind: type[FluxPipeline]) -> float:
    """The pipeline's default."""
    return inspect.signature(kind.__call__).parameters["guidance_scale"].default


def _tell(drawings: Sequence[Any], sight: Sight, loras: Sequence[tuple[str, LoRAFile]]) -> None:
    """Which pipelines draw from which pictures, a line for each drawing or, of many, for each pipeline; and
    what LoRAs of FLUX.1 Kontext on another model, or the reverse, may lack."""
    lines = list(dict.fromkeys(line for each in drawings if (line := _told(each, sight))))
    if len(lines) > MOST_TOLD:
        counts = Counter(edit_class(each, sight).__name__ for each in drawings)
        lines = [f"{name}: {count} pictures" for name, count in counts.items()]
    looks = any(each.reference for each in drawings)
    lines += [f"note: {line}" for path, file in loras if (line := _told_lora(path, file, looks, sight))]
    if looks and not loras and not sight.kontext:
        lines.append(
            f"note: {sight.model} has not learned to look at a reference: add a LoRA that was trained on "
            "pairs by --path_to_lora, or draw with FLUX.1 Kontext"
        )
    for line in lines:
        print(line)


def _told(drawing: Any, sight: Sight) -> str | None:
    """Which pipeline draws it and from what; None where nothing is edited."""
    names = _names(drawing)
    if not names:
        return None
    kind = edit_class(drawing, sight)
    way = {
        FluxKontextPipeline: f"editing by the prompt, looking at {', '.join(names)}",
        FluxFillPipeline: f"filling what {drawing.mask} marks in {names[0]}",
        FluxInpaintPipeline: f"inpainting what {drawing.mask} marks in {names[0]}",
        FluxImg2ImgPipeline: f"drawing over {names[0]}",
    }[kind]
    if kind is not FluxKontextPipeline:
        own = inspect.signature(kind.__call__).parameters["strength"].default
        way += f" at strength {own if drawing.strength is None else drawing.strength}"
    width, height = opened_picture(names[0]).size
    size, came = f"{drawing.width}x{drawing.height}", f"{width}x{height}"
    return f"{kind.__name__}: {way}; {size}{'' if size == came else f' (the picture is {came})'}"


def _told_lora(path: str, file: LoRAFile, looks: bool, sight: Sight) -> str | None:
    """By what its header says it was trained for. The layers are the same, so it is drawn with. looks:
    whether there are references."""
    said = (
        file.header.get("ss_base_model_version") or file.header.get("modelspec.architecture") or ""
    ).lower()
    if "kontext" in said and not sight.kontext and not looks:
        return (
            f"{path} was trained for FLUX.1 Kontext, to look at a reference, and {sight.model} is another: "
            "draw with FLUX.1 Kontext, or give --reference"
        )
    if sight.kontext and "flux" in said and "kontext" not in said:
        return (
            f"{path} was trained for another FLUX.1 than Kontext ({said}): styles and subjects carry over, "
            "but it has not learned to look at a reference"
        )
    return None


def opened_picture(file: str | Path, convert: Convert = ON_BLACK) -> Image.Image:
    """Upright, in sRGB and on black where it is transparent, as references are for training; or what another
    `convert` of data.colours makes of it. Raises ConfigError naming a file that cannot be decoded."""
    changed = 0
    with suppress(OSError, ValueError):  # no such file, or such a name
        changed = os.stat(file).st_mtime_ns
    return _decoded(file, changed, convert)


def as_it_is(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """The Convert that leaves a picture in its own mode and colours."""
    return image


@lru_cache(maxsize=8)  # of a list's pictures, some are in many lines
def _decoded(file: str | Path, changed: int, convert: Convert) -> Image.Image:
    """changed: when, for the cache."""
    try:
        return upright_picture(Path(file), convert, formats=_formats())
    except BadFile as error:
        raise ConfigError(f"{file}: {error}; give another ({', '.join(_formats())})") from None


@cache
def _formats() -> tuple[str, ...]:
    """More than training reads: those of other programs, without any for which Pillow starts a program."""
    Image.init()
    more = ("AVIF", "BMP", "GIF", "JPEG2000", "TIFF")
    return (*FORMATS, *(name for name in more if name in Image.OPEN))


def _names(drawing: Any) -> list[str]:
    return ([drawing.image] if drawing.image is not None else []) + list(drawing.reference or ())


def _shown(drawing: Any) -> list[Image.Image]:
    """--image, and the references after it."""
    return [opened_picture(name) for name in _names(drawing)]


def _size(drawing: Any, height: int, width: int, sight: Sight, kind: type[FluxPipeline]) -> tuple[int, int]:
    """(height, width) to draw at; of a side alone that is given, the other follows at the picture's ratio."""
    if drawing.height and drawing.width:
        return drawing.height, drawing.width
    if drawing.height or drawing.width:
        by = drawing.height / height if drawing.height else drawing.width / width
        sides = output_size(round(by * height), round(by * width), None)
        return drawing.height or max(sides[0], TOKEN_SIDE), drawing.width or max(sides[1], TOKEN_SIDE)
    area = sight.side**2
    whole = kind is not FluxKontextPipeline and height * width <= area
    sides = output_size(height, width, None if whole else area)
    if min(sides) < TOKEN_SIDE:
        raise ConfigError(
            f"{_names(drawing)[0]} is {width}x{height}, too long for a picture of {sight.side}x{sight.side} "
            "pixels: cut it, or give --height and --width"
        )
    return sides


def _check_mask(drawing: Any, size: tuple[int, int], side: int) -> None:
    """size: width and height of the picture. side: of the cells that the mask is seen by."""
    mask = opened_picture(drawing.mask, grey)
    if mask.size != size:
        raise ConfigError(
            f"mask: {drawing.mask} is {mask.width}x{mask.height}, {drawing.image} {size[0]}x{size[1]}: "
            "give one of the same size"
        )
    share = float(latent_mask(picture_mask(mask, drawing.height, drawing.width), side).mean())
    if share == 0:
        raise ConfigError(
            f"mask: {drawing.mask} marks nothing, so nothing would be drawn: paint white what is drawn anew"
        )
    if share == 1:
        raise ConfigError(
            f"mask: {drawing.mask} is white all over, so nothing would stay: paint black what stays"
        )


def _no_larger(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A reference of at most the pixels that are drawn, for models that know no larger ones."""
    if picture.height * picture.width <= height * width:
        return picture
    sides = output_size(picture.height, picture.width, height * width)
    return picture.resize(reference_size(*sides, trained=False)[::-1], Image.Resampling.LANCZOS)
