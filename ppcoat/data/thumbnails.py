"""Small versions of pictures, to look at: whole, upright, as they are trained (on white, in sRGB)."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from ppcoat.data.sources import upright_picture


def thumbnail(path: Path, side: int) -> bytes:
    """A picture as JPEG of at most `side` pixels each way; never enlarged. Raises BadFile."""
    image = upright_picture(path, least=side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=82)
    return written.getvalue()
