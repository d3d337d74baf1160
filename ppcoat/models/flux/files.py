"""Where the components of a FLUX model lie: in a diffusers folder, or in a file and what is given beside it.

Nothing but headers is read here; loading.py makes the models.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppcoat.errors import ConfigError
from ppcoat.models.single_file import component_kind, components_in
from ppcoat.models.tensor_files import (
    Component,
    FilePart,
    check_index,
    check_there,
    pipeline_class,
)
from ppcoat.reading import read_json

Places = str | Path | Sequence[str | Path] | None
FLUX_COMPONENTS = (
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "transformer",
    "vae",
)
# diffusers' classes of FLUX.1 folders that can be drawn with; and how many times as many inputs a transformer
# has that sees more with each token than the noise.
FLUX_CLASSES = ("FluxPipeline", "FluxControlPipeline", "FluxKontextPipeline", "FluxFillPipeline",
                "FluxImg2ImgPipeline", "FluxInpaintPipeline")  # fmt: skip
INPUTS_OF_CLASS = {"FluxControlPipeline": 2, "FluxFillPipeline": 6}
# Component -> the setting that says where it lies if the model has none.
_SETTINGS = {
    "text_encoder": "text_encoders",
    "text_encoder_2": "text_encoders",
    "vae": "vae",
    "tokenizer": "tokenizers",
    "tokenizer_2": "tokenizers",
}
_WANTED = {
    "text_encoders": "a FLUX folder, or the files clip_l.safetensors and t5xxl_fp16.safetensors",
    "vae": "a FLUX folder, or the file ae.safetensors",
    "tokenizers": "a FLUX folder, or one with the folders tokenizer and tokenizer_2",
}
_DEV_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
_SCHNELL_SCHEDULER = _DEV_SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}


@dataclass(frozen=True)
class FluxFiles:
    """base: the folder or file that was given as the model. setting: the flag or key that named it.
    components: where each lies that was found, by its folder's name."""

    base: Path
    setting: str
    components: Mapping[str, Component]

    @classmethod
    def found(
        cls,
        base: str | Path | FluxFiles,
        setting: str = "the model",
        *,
        text_encoders: Places = None,
        vae: Places = None,
        tokenizers: Places = None,
        config: str | Path | None = None,
    ) -> FluxFiles:
        """Looks where each component lies; `check` says what is nowhere.

        Transformer and scheduler are the base's (a base without scheduler gets FLUX.1-dev's, or schnell's if
        it takes no guidance). Another component is that of the place given for it, else the base's, else that
        of any other place, else that of the FLUX folder in which a base file lies. A place is a file, the
        folder of a component, or a folder with such folders in it. config: folder with config.json files,
        which say what the tensors of a file do not tell. Raises ConfigError for a place that is not there or
        holds nothing of what it was given for, and for files of something else.
        """
        if isinstance(base, FluxFiles):
            return base
        base = Path(base)
        if base.suffix in (".safetensors", ".gguf") and not base.exists():
            raise ConfigError(f"no model file {base}: none is downloaded; set {setting} to a local file")
        if not base.is_file():
            check_there(base, setting)
        given = {"text_encoders": _paths(text_encoders), "vae": _paths(vae), "tokenizers": _paths(tokenizers)}
        others = [place for places in given.values() for place in places]
        around = [base.parent] if base.is_file() and (base.parent / "model_index.json").is_file() else []
        configs = [*_paths(config), *others, *([base.parent] if base.is_file() else ())]
        held = {place: _held(place, configs) for place in (base, *others)}
        held |= {place: _folders_in(place) for place in around}
        for key, places in given.items():
            for place in places:
                if not any(_SETTINGS.get(name) == key for name in held[place]):
                    came = f"{place} holds {_listed(held[place])}"
                    raise ConfigError(f"{_beside(setting, key)}: {came}, wanted {_WANTED[key]}")
        found: dict[str, Component] = {}
        for name in FLUX_COMPONENTS:
            own = given[_SETTINGS[name]] if name in _SETTINGS else []
            places = [*own, base, *others, *around] if name in _SETTINGS else [base]
            found |= next(({name: held[place][name]} for place in places if name in held[place]), {})
        if "scheduler" not in found and isinstance(found.get("transformer"), FilePart):
            config = _DEV_SCHEDULER if found["transformer"].config["guidance_embeds"] else _SCHNELL_SCHEDULER
            found["scheduler"] = FilePart(base, "scheduler", config, {})
        return cls(base, setting, found)

    @property
    def folder(self) -> Path | None:
        """The folder in which all of the model lies; None where components lie elsewhere or in a file."""
        whole = {name: self.base / name for name in FLUX_COMPONENTS}
        return self.base if self.components == whole else None

    @property
    def class_name(self) -> str | None:
        """diffusers' class that draws with the model, by model_index.json of its folder."""
        return pipeline_class(self.base if self.base.is_dir() else self.base.parent)

    def __getitem__(self, name: str) -> Component:
        """Where a component lies. Raises ConfigError for one that is nowhere."""
        self.check(name)
        return self.components[name]

    def check(self, *names: str) -> None:
        """Raise ConfigError if one of these components is nowhere: what there is, and what to give. A base
        that is a folder has to say in model_index.json that it is of FLUX."""
        is_pipeline = self.base.is_dir() and self.base not in self.components.values()
        if is_pipeline:
            check_index(self.base, *FLUX_CLASSES)
        missing = [name for name in names if name not in self.components]
        if not missing:
            return
        held = [name for name, part in self.components.items() if getattr(part, "tensors", True)]
        there = f"{self.base} and what is given beside it hold {_listed(held)}, but no "
        if is_pipeline:
            there = f"{self.base / missing[0]} is missing: {there}"
        own = [name for name in missing if name not in _SETTINGS]
        if own:
            raise ConfigError(f"{there}{' and no '.join(own)}: set {self.setting} to a FLUX model")
        keys = dict.fromkeys(_SETTINGS[name] for name in missing)
        give = "; ".join(f"{_beside(self.setting, key)} ({_WANTED[key]})" for key in keys)
        raise ConfigError(f"{there}{', '.join(missing)}: set {give}")


def _held(place: Path, configs: Sequence[Path]) -> dict[str, Component]:
    """The components in a place: a file, the folder of one component, or a folder of such folders."""
    if place.is_file():
        return dict(components_in(place, configs))
    if not place.is_dir():
        raise ConfigError(f"{place} is not there: give a local file or folder")
    inside = _folders_in(place)
    if inside:
        return inside
    config = place / "config.json"
    part = component_kind(read_json(config)) if config.is_file() else _tokenizer_kind(place)
    return {part: place} if part else {}


def _folders_in(folder: Path) -> dict[str, Component]:
    return {name: folder / name for name in FLUX_COMPONENTS if (folder / name).is_dir()}


def _tokenizer_kind(folder: Path) -> str | None:
    """The component that a folder without config.json is, if it is a tokenizer."""
    if (folder / "vocab.json").is_file():
        return "tokenizer"
    if (folder / "spiece.model").is_file():
        return "tokenizer_2"
    said = folder / "tokenizer_config.json"
    kind = str(read_json(said).get("tokenizer_class", "")) if said.is_file() else ""
    return "tokenizer" if kind.startswith("CLIP") else "tokenizer_2" if kind.startswith("T5") else None


def _paths(given: Places) -> list[Path]:
    if given is None:
        return []
    return [Path(given)] if isinstance(given, str | Path) else [Path(each) for each in given]


def _listed(names: Collection[str]) -> str:
    return ", ".join(name for name in FLUX_COMPONENTS if name in names) or "no component of FLUX"


def _beside(setting: str, key: str) -> str:
    """The name of a setting that stands beside the one that names the model."""
    if setting.startswith("--"):
        return f"--{key}"
    return f"{setting.rpartition('.')[0]}.{key}" if "." in setting else key
