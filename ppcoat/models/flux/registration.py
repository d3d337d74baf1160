"""Makes ppdiffusers know our FLUX classes where it has none, so `DiffusionPipeline` loads a FLUX folder.

It imports neither: ppdiffusers takes seconds, and ours derive from its classes. What is put into ppdiffusers,
at the end of its own import, imports ours when somebody asks for them. This file comes with every
`import ppcoat`, so it imports little else at its top either.
"""

from __future__ import annotations

import sys

from ppcoat.signals import LoadedInside

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

# Class in model_index.json -> (module here, class) of the pipeline that draws with such a folder: all of
# files.FLUX_CLASSES.
FLUX_PIPELINES = {
    "FluxPipeline": ("pipeline", "FluxPipeline"),
    "FluxControlPipeline": ("pipeline", "FluxPipeline"),
    "FluxKontextPipeline": ("editing", "FluxKontextPipeline"),
    "FluxFillPipeline": ("editing", "FluxFillPipeline"),
    "FluxImg2ImgPipeline": ("editing", "FluxImg2ImgPipeline"),
    "FluxInpaintPipeline": ("editing", "FluxInpaintPipeline"),
}
_MODULES = {name: module for module, name in FLUX_PIPELINES.values()} | {
    "FluxTransformer2DModel": "transformer"
}
_PPDIFFUSERS = "ppdiffusers"


def register_when_imported() -> None:
    """Calls `register` now if ppdiffusers is imported, else at the end of its import. A second call does
    nothing."""
    if _PPDIFFUSERS in sys.modules:
        register()
    elif not any(getattr(finder, "name", None) == _PPDIFFUSERS for finder in sys.meta_path):
        sys.meta_path.insert(0, LoadedInside(_PPDIFFUSERS, _AtItsEnd))


class _AtItsEnd:
    """Context manager: `register` is called at the end, unless there is an error."""

    def __enter__(self) -> None: ...

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            register()


def register() -> None:
    """Gives ppdiffusers, which must be imported, the names FluxTransformer2DModel and those of the FLUX
    pipelines where they are absent, and lets `ppdiffusers.DiffusionPipeline.from_pretrained(folder)` read
    local FLUX folders with our reader, as the pipeline that their model_index.json names.

    Everything else of ppdiffusers stays as it is; a second call does nothing. Features are looked for by
    name, for trees with and without FLUX report the same version.
    """
    import functools

    ppdiffusers = sys.modules[_PPDIFFUSERS]
    original = ppdiffusers.DiffusionPipeline.from_pretrained
    if hasattr(original, "reads_flux_folders"):
        return
    theirs = frozenset(dir(ppdiffusers))  # with what it imports when asked for

    def __getattr__(name: str) -> Any:  # Python asks it for what the module itself lacks
        if name in theirs or name not in _MODULES:
            raise AttributeError(f"module {_PPDIFFUSERS!r} has no attribute {name!r}")
        return _ours(_MODULES[name], name)

    @functools.wraps(original.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        ours = cls is ppdiffusers.DiffusionPipeline and _flux_pipeline(pretrained_model_name_or_path)
        if ours:
            return ours.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return original.__func__(cls, pretrained_model_name_or_path, **kwargs)

    ppdiffusers.__getattr__ = __getattr__  # type: ignore[method-assign]
    from_pretrained.reads_flux_folders = True
    ppdiffusers.DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


def _ours(module: str, name: str) -> type:
    import importlib

    return getattr(importlib.import_module(f"ppcoat.models.flux.{module}"), name)


def _flux_pipeline(name_or_path: str | os.PathLike) -> type | None:
    """The class that draws with a local FLUX folder; None for anything else."""
    from pathlib import Path

    from ppcoat.errors import ConfigError
    from ppcoat.reading import read_json

    index = Path(name_or_path) / "model_index.json"
    if not index.is_file():
        return None
    try:
        home = FLUX_PIPELINES.get(str(read_json(index).get("_class_name")))
    except ConfigError:
        return None  # ppdiffusers says what is wrong with it
    return home and _ours(*home)
