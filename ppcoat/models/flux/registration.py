"""Makes ppdiffusers know our FLUX classes where it has none, so `DiffusionPipeline` loads a FLUX folder."""

import functools
import json
import os
from pathlib import Path

import ppdiffusers

from ppcoat.models.flux.files import FLUX_CLASSES
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel


def register() -> None:
    """Sets `ppdiffusers.FluxTransformer2DModel` and `FluxPipeline` if they are absent, and lets
    `ppdiffusers.DiffusionPipeline.from_pretrained(folder)` read local FLUX folders with our reader.

    Everything else of ppdiffusers stays as it is; a second call does nothing. Features are looked for by
    name, for trees with and without FLUX report the same version.
    """
    for ours in (FluxTransformer2DModel, FluxPipeline):
        if not hasattr(ppdiffusers, ours.__name__):
            setattr(ppdiffusers, ours.__name__, ours)
    original = ppdiffusers.DiffusionPipeline.from_pretrained
    if hasattr(original, "reads_flux_folders"):
        return

    @functools.wraps(original.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if cls is ppdiffusers.DiffusionPipeline and _is_flux_folder(pretrained_model_name_or_path):
            return FluxPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return original.__func__(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained.reads_flux_folders = True
    ppdiffusers.DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


def _is_flux_folder(name_or_path: str | os.PathLike) -> bool:
    index = Path(name_or_path) / "model_index.json"
    if not index.is_file():
        return False
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name") in FLUX_CLASSES
    except ValueError:
        return False  # ppdiffusers says what is wrong with it
