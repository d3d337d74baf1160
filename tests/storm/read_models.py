"""Folders and files of models, damaged as model_mutations.py does: opened whole, and some drawn with."""

import os
import random
import shutil
from functools import cache, partial
from pathlib import Path

from inputs import FIXTURES, TINY_FLUX, Input, of_kind
from model_mutations import FILES, HEADERS, INDEX, Mutation, damaged_file, mutations

NEWBIE, WHOLE = FIXTURES / "tiny_newbie", FIXTURES / "tiny_flux_fp32"
SHARDED = [FIXTURES / "tiny_flux_bf16_sharded", FIXTURES / "tiny_flux_diffusers_042"]
SINGLE = sorted(
    [*(FIXTURES / "single_file").glob("*.safetensors"), *(FIXTURES / "single_file").glob("*.gguf")]
)
# Damages after which a model is refused or is what it was.
_OF_BYTES = {*FILES, *INDEX, *(f"header, {kind}" for kind in HEADERS)}


@cache
def damages(model: Path) -> list[Mutation]:
    return list(mutations(model) if model.is_dir() else damaged_file(model))


def linked(model: Path, folder: Path) -> Path:
    """A copy of a model, made of links."""
    if model.is_dir():
        return Path(shutil.copytree(model, folder / "model", copy_function=os.symlink))
    (folder / model.name).symlink_to(model)
    return folder / model.name


def opened(rng: random.Random, folder: Path, model: Path) -> Input:
    """All of it is read, and what it is is printed."""
    damage, copy = rng.choice(damages(model)), linked(model, folder)
    damage.mutate(copy)
    beside = [] if model.is_dir() else [str(WHOLE)]
    same = damage.name.partition(": ")[2] in _OF_BYTES
    calm = [str(model), *beside] if same else None
    return Input(f"{model.name}, {damage.name}", "model", [str(copy), *beside], calm=calm, may_refuse=same)


for each in (TINY_FLUX, NEWBIE, *SHARDED, *SINGLE):
    of_kind("models")(partial(opened, model=each))


@of_kind("models")
def model_drawn(rng, folder):
    """As a user draws with it."""
    model = rng.choice([TINY_FLUX, NEWBIE, *SHARDED])
    damage, copy = rng.choice(damages(model)), linked(model, folder)
    damage.mutate(copy)
    argv = ["--model", str(copy), "--prompt", "a hat", "--output_dir", str(folder / "out" / "drawn")]
    size = ["--steps", "1", "--width", "64", "--height", "64"]
    return Input(f"{model.name}, {damage.name}", "generate", [*argv, *size])
