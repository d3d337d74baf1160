"""What becomes of the modes, transparency and colour profiles of picture files: RGB in sRGB, or grey."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms

Colour = tuple[int, int, int]
# an upright picture, its colour profile, and a list that gets what was done to it -> the picture to use
Convert = Callable[[Image.Image, bytes | None, list[str]], Image.Image]
WHITE: Colour = (255, 255, 255)
_log = logging.getLogger(__name__)
_ROUNDING = 3  # of 255: between sRGB and its many nearly equal profiles


@cache
def on_colour(background: Colour | None) -> Convert:
    """To RGB in sRGB, laid on this colour where it is transparent; None: the colours below stay as they are.
    16-bit grey is scaled, which convert() would clip to white."""

    def convert(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
        image = _in_eight_bits(image)
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if alpha is not None and background == WHITE and alpha.getextrema() == (0, 0):
            notes.append("wholly transparent, trained as white")
        at_once = ("RGB", "L", "CMYK", "1", *(["P"] if alpha is None else []))
        if image.mode not in at_once:  # in two copies, which of a huge picture are gigabytes
            image = image.convert("RGBA").convert("RGB")
        image = _in_srgb(image, profile, notes) if profile else image.convert("RGB")
        if alpha is None or background is None:
            return image
        below = Image.new("RGBA", image.size, background)
        image.putalpha(alpha)
        return Image.alpha_composite(below, image).convert("RGB")

    return convert


on_white = on_colour(WHITE)


def grey(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """A Convert for masks: brightness in 8 bits, black where the file is transparent."""
    image = _in_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0)), image)
    return image.convert("L")


def opacity(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """A Convert for masks: the alpha channel in 8 bits; white for a picture that has none."""
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    return image


def _in_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """The colours that a viewer shows. A profile that is sRGB, under whatever name, changes no pixel; one
    that cannot be used is noted and left out."""
    plain = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        converted = ImageCms.profileToProfile(image, source, _srgb(), intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append("the colour profile cannot be used and is left out")
        return plain
    difference = ImageChops.difference(plain, converted).getextrema()
    if max(most for _, most in difference) <= _ROUNDING:
        return plain
    notes.append("colours converted from their profile to sRGB")
    return converted


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def is_flat(pixels: np.ndarray) -> bool:
    """Whether pixels [3, H, W] are all of one colour."""
    return bool((pixels == pixels[:, :1, :1]).all())


def tell_of_flat(paths: Sequence[Path], count: int) -> None:
    """One line for those of `count` pictures that are of one colour."""
    if paths:
        _log.warning("%d of %d pictures are of one colour all over, e.g. %s: they teach nothing",
                     len(paths), count, paths[0])  # fmt: skip
