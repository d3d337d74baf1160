"""Makes ppdiffusers know our FLUX classes where it has none, so `DiffusionPipeline` loads a FLUX folder."""

import functools
import json
import os
from pathlib import Path

import ppdiffusers

from ppcoat.models.flux.fill import FluxFillPipeline
from ppcoat.models.flux.image_to_image import FluxImg2ImgPipeline, FluxInpaintPipeline
from ppcoat.models.flux.kontext import FluxKontextPipeline
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel

# Class in model_index.json -> the pipeline that draws with such a folder: all of files.FLUX_CLASSES.
FLUX_PIPELINES = {
    each.__name__: each
    for each in (
        FluxPipeline,
        FluxKontextPipeline,
        FluxFillPipeline,
        FluxImg2ImgPipeline,
        FluxInpaintPipeline,
    )
} | {"FluxControlPipeline": FluxPipeline}


def register() -> None:
    """Sets `ppdiffusers.FluxTransformer2DModel` and the FLUX pipelines where they are absent, and lets
    `ppdiffusers.DiffusionPipeline.from_pretrained(folder)` read local FLUX folders with our reader, as the
    pipeline that their model_index.json names.

    Everything else of ppdiffusers stays as it is; a second call does nothing. Features are looked for by
    name, for trees with and without FLUX report the same version.
    """
    for ours in (FluxTransformer2DModel, *FLUX_PIPELINES.values()):
        if not hasattr(ppdiffusers, ours.__name__):
            setattr(ppdiffusers, ours.__name__, ours)
    original = ppdiffusers.DiffusionPipeline.from_pretrained
    if hasattr(original, "reads_flux_folders"):
        return

    @functools.wraps(original.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        ours = cls is ppdiffusers.DiffusionPipeline and _flux_pipeline(pretrained_model_name_or_path)
        if ours:
            return ours.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return original.__func__(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained.reads_flux_folders = True
    ppdiffusers.DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


def _flux_pipeline(name_or_path: str | os.PathLike) -> type[FluxPipeline] | None:
    """The class that draws with a local FLUX folder; None for anything else."""
    index = Path(name_or_path) / "model_index.json"
    if not index.is_file():
        return None
    try:
        return FLUX_PIPELINES.get(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    except ValueError:
        return None  # ppdiffusers says what is wrong with it
