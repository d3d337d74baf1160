"""Editing shown on the built-in tiny FLUX: `python -m ppcoat demo edit`, on a CPU in minutes.

    drawings  ->  configs/demo_<name>.yaml trains a LoRA on them  ->  pictures after what no training saw  ->
    a table of measures, and a sheet to look at

A demonstration is a subclass of `Demo` in one of the modules of `DEMOS`; this file is what they share. All
that is printed is computed in this call: what an earlier call left is removed first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paddle
from PIL import Image

from ppcoat.atomic import whole_file
from ppcoat.bench.flags import DEMOS, DemoFlags
from ppcoat.bench.quickstart import DRAWN, DRAWN_AT_ONCE, remove_earlier
from ppcoat.config.flags import CONFIGS, from_flags
from ppcoat.config.load import load_config, read_config_text
from ppcoat.config.schema import RunConfig
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.infer.garment_scores import pictures_to_tensor
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.loading import check_folder
from ppcoat.train.checkpoint import check_run_folder
from ppcoat.train.run import train_lora


@dataclass(frozen=True)
class Measure:
    """A line of the table. found, at_least, at_most: shares in 0..1, or numbers of `unit`; a line without
    bounds is told only."""

    what: str
    found: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What it is, what was wanted, what was found, and whether that is met."""
        words = [
            f"{word} {self._text(bound)}"
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bound is not None
        ]
        missed = (self.at_least is not None and self.found < self.at_least) or (
            self.at_most is not None and self.found > self.at_most
        )
        return self.what, ", ".join(words), self._text(self.found), "missed" if missed else ""

    def _text(self, value: float) -> str:
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.0%}"


@dataclass(frozen=True)
class Shown:
    """What a demonstration found. sheets: pictures by the names of their files, without ending. notes: lines
    below the table."""

    measures: Sequence[Measure]
    sheets: Mapping[str, Image.Image]
    notes: Sequence[str] = field(default=())


class Demo(ABC):
    """One demonstration. folders: keys of its config that name folders of drawings -> their names below the
    command's data folder."""

    folders: Mapping[str, str]

    @abstractmethod
    def write_data(self, data: Path) -> None:
        """Draw what is trained on into the empty folder `data`. A pure function of constants."""

    def train(self, config: RunConfig) -> Path:
        """Train what the config says -> the file of the LoRA."""
        return train_lora(config).lora_file

    @abstractmethod
    def judge(self, config: RunConfig, lora_file: Path, samples: int) -> Shown:
        """Draw and measure after `samples` inputs that no training saw."""


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(DemoFlags, arguments)
    if flags.samples < 1:
        raise ConfigError(f"--samples {flags.samples}: wanted at least 1")
    tune_host()
    module, name = DEMOS[flags.name]
    show(getattr(importlib.import_module(module), name)(), flags)


def show(demo: Demo, flags: DemoFlags) -> None:
    """Draw, train, draw again, judge, print."""
    began, folder = time.perf_counter(), Path(flags.output_dir) / flags.name
    config = _config(demo, flags, folder)
    data = folder / "data"
    remove_earlier(config.run_dir, "config.yaml")
    remove_earlier(data, DRAWN)
    print(f"1 of 3: drawing what is trained on into {data}", flush=True)
    data.mkdir(parents=True)
    (data / DRAWN).touch()
    demo.write_data(data)
    print(f"2 of 3: training {config.train.steps} steps", flush=True)
    lora_file = demo.train(config)
    trained = time.perf_counter()
    print(f"3 of 3: drawing after {flags.samples} inputs that no training saw", flush=True)
    shown = demo.judge(config, lora_file, flags.samples)
    for name, sheet in shown.sheets.items():
        with whole_file(folder / f"{name}.png") as draft:
            sheet.save(draft)
    lines = [measures_table(shown.measures), "", *shown.notes, f"LoRA: {lora_file}"]
    lines += [f"sheet: {folder / name}.png" for name in shown.sheets]
    seconds = time.perf_counter() - began
    lines.append(f"{seconds / 60:.1f} minutes, {(trained - began) / 60:.1f} of them data and training")
    print("\n" + "\n".join(lines))


def measures_table(measures: Sequence[Measure]) -> str:
    """The measures in columns."""
    rows = [("measure", "wanted", "found", ""), *(each.cells for each in measures)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for what, wanted, found, missed in rows:
        line = f"{what:{widths[0]}}  {wanted:{widths[1]}}  {found:>{widths[2]}}  {missed}"
        lines.append(line.rstrip())
    return "\n".join(lines)


@paddle.no_grad()
def through_autoencoder(pipeline: FluxPipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    """What the pipeline could draw at best: pictures of 64 x 64 encoded and decoded again."""
    again = []
    for start in range(0, len(pictures), DRAWN_AT_ONCE):
        latents = pipeline.encode_image(pictures_to_tensor(pictures[start : start + DRAWN_AT_ONCE]))
        again += pipeline.pictures(latents, "pil")
    return again


def _config(demo: Demo, flags: DemoFlags, folder: Path) -> RunConfig:
    """The demonstration's settings, printed as they stand in the file; checked before anything earlier is
    removed."""
    file = CONFIGS / f"demo_{flags.name}.yaml"
    places = {"output_dir": folder} | {key: folder / "data" / name for key, name in demo.folders.items()}
    moved = [f"{key}={json.dumps(str(place))}" for key, place in places.items()]
    config = load_config(file, [*moved, *flags.overrides])
    model = config.model
    check_folder(FluxFiles.found(model.name_or_path, "model.name_or_path", **model.beside))
    check_run_folder(config.run_dir)
    print(f"{file}:\n{read_config_text(file, ('.yaml',))}", flush=True)
    return config
