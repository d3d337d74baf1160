"""A transformer folder of random weights in the exact layout of a real one: what can be measured without a
download.

Names, shapes, bfloat16 and shards are those of a FluxTransformer2DModel with the given settings. Linear
weights are normal with a standard deviation of 1 / sqrt(in), so that each layer's output is about as large as
its input; biases are 0 and norm weights 1. The folder is written once and known again by its header.
"""

from __future__ import annotations

import json
import logging
import zlib
from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.flux import FluxTransformer2DModel
from ppcoat.models.loading import linear_weights, read_json, tensor_infos
from ppcoat.models.streaming import (
    INDEX,
    Layout,
    check_room,
    layout_bytes,
    shard_metadata,
    write_component,
)

_log = logging.getLogger(__name__)

_RANDOM = "random weights"  # how the stamp of a shard begins
_ELSEWHERE = "name another folder, or remove it"
BAND = 1 << 23  # numbers drawn at a time


def ensure_random_transformer(folder: Path, settings: dict, seed: int = 0, beside: int = 0) -> bool:
    """Write the folder of a FluxTransformer2DModel(**settings) unless it is there -> whether it was written.

    beside: bytes that must be free on the disk beyond the weights. A folder of other settings, another seed
    or with damaged files is written anew, with a warning; drafts of a killed process are removed. Raises
    ConfigError with both numbers for a disk without room, before anything is written, and for a folder that
    holds other files than such a model's.
    """
    config, names, layout = _layout_of(settings)
    stamp = f"{_RANDOM}, seed {seed}, {json.dumps(settings, sort_keys=True)}"
    advice = "make room there, or name another folder"
    if _is_complete(folder, layout, stamp):
        check_room(folder.parent, beside, "the run takes", advice)
        return False
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.exists() else 0
    wanted = max(0, layout_bytes(layout) + beside - held)
    check_room(folder.parent, wanted, "the random weights and what comes beside them take", advice)
    if held:  # an old folder of this size would not find room beside the new one
        for file in folder.glob("*.safetensors"):
            file.unlink()
    tensors = ((name, _values(name, shape, name in names, seed)) for name, (_, shape) in layout.items())
    write_component(folder, config, layout, tensors, {"format": "pt", "source": stamp})
    return True


def _layout_of(settings: dict) -> tuple[dict, set[str], Layout]:
    """config.json, names of the Linear weights, and the layout of all tensors in torch's [out, in]."""
    with paddle.LazyGuard():  # parameters get a shape and no memory
        model = FluxTransformer2DModel(**settings)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    linears = linear_weights(model)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    layout = {name: ("BF16", shape[::-1] if name in linears else shape) for name, shape in shapes.items()}
    return {"_class_name": "FluxTransformer2DModel", **config}, linears, layout


def _is_complete(folder: Path, layout: Layout, stamp: str) -> bool:
    """Whether the folder is what would be written, by its headers and the sizes of its files."""
    if not folder.exists():
        return False
    said = _stamps(folder)
    try:
        found = {name: (info.dtype, info.shape) for name, info in tensor_infos(folder).items()}
        read_json(folder / "config.json")
    except ConfigError as error:
        _log.warning("the random weights are not complete (%s): they are made anew", error)
        return False
    if said != {stamp} or found != layout:
        _log.warning("the random weights in %s are of another model or seed: they are made anew", folder)
        return False
    return True


def _stamps(folder: Path) -> set[str]:
    """What its shards say of their source. Raises ConfigError for a folder with anything that was not written
    here: nobody's model is overwritten.
    """
    stamps = set()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            try:
                stamps.add(shard_metadata(file).get("source", ""))
            except ValueError:  # not even a header
                stamps.add("")
        elif file.name not in ("config.json", INDEX):
            raise ConfigError(f"{folder} holds {file.name}, which is not of random weights: {_ELSEWHERE}")
    if not all(each.startswith(_RANDOM) for each in stamps):
        raise ConfigError(f"{folder} holds a model that is not of random weights: {_ELSEWHERE}")
    return stamps


def _values(name: str, shape: list[int], is_linear: bool, seed: int) -> np.ndarray:
    """The bits of a tensor in bfloat16, uint16 `shape`. Each tensor has a generator of its own."""
    if not is_linear:
        return _bfloat16(np.full(shape, 0.0 if name.endswith("bias") else 1.0, "float32"))
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    table = _bfloat16(_normal_quantiles() * np.float32(shape[1] ** -0.5))
    flat = np.empty(int(np.prod(shape)), "uint16")
    for start in range(0, flat.size, BAND):
        part = flat[start : start + BAND]
        part[:] = table[rng.integers(0, table.size, part.size, dtype=np.uint16)]
    return flat.reshape(shape)


@cache
def _normal_quantiles() -> np.ndarray:
    """65,536 equally likely values of a normal number, float32: looked up five times faster than drawn."""
    normal, count = NormalDist(), 1 << 16
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)], "float32")


def _bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 -> the upper half of its bits, rounded to nearest (ties away from zero)."""
    return ((numbers.view("uint32") + 0x8000) >> 16).astype("uint16")
