"""The FP8 weights of a transformer on disk, so that the next start need not quantise again.

A folder in the layout of the model's own: config.json, shards and an index. Tensors have the names and
Paddle's layout of the quantised model's state_dict. Every shard names its source in the header, the index
has a CRC-32 for each tensor. It is written beside its place and renamed, so that it is there whole or not at
all.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.loading import TensorInfo, in_file_order, map_tensor, read_json, tensor_infos
from ppcoat.models.streaming import (
    INDEX,
    Layout,
    check_room,
    layout_bytes,
    shard_metadata,
    write_component,
)
from ppcoat.nn.fp8_weight import BLOCK

_log = logging.getLogger(__name__)

FORMAT = f"E4M3, blocks of {BLOCK} x {BLOCK}, scales powers of two"


class DamagedCopyError(ConfigError):
    """A tensor of the copy is not what was written."""


@dataclass(frozen=True)
class FP8Copy:
    """folder: where the copy lies or shall lie. source: what stands for the contents of the model's files
    (say, ppcoat.data.cache.folder_identity), by which a copy of other weights is known.
    """

    folder: Path
    source: str

    @classmethod
    def beside_or_in(cls, model: Path, cache_dir: Path, source: str, beside_model: bool = False) -> FP8Copy:
        """In the pipeline folder `model` if that is asked for and can be written, else in `cache_dir`."""
        if beside_model and os.access(model, os.W_OK):
            return cls(model / "transformer-fp8", source)
        if beside_model:
            _log.warning("%s cannot be written: the FP8 copy of the transformer goes to %s", model, cache_dir)
        return cls(cache_dir / f"{model.resolve().name}-transformer-fp8", source)

    def is_usable(self) -> bool:
        """Whether there is a complete copy of this source; one that is stale or broken is warned of, once."""
        if not self.folder.exists():
            return False
        try:
            infos = tensor_infos(self.folder)
            if self._sums().keys() != infos.keys():
                raise ConfigError(f"{self.folder}: its index has not a checksum for each tensor")
            said = {shard_metadata(file).get("source") for file in {info.file for info in infos.values()}}
        except (ConfigError, OSError) as error:
            _log.warning("the FP8 copy is damaged (%s): it is made anew", error)
            return False
        if said != {self._stamp}:
            _log.warning("the FP8 copy %s is of other weights: it is made anew", self.folder)
            return False
        return True

    def tensors(self) -> Iterator[tuple[str, paddle.Tensor]]:
        """(name, tensor) one at a time. Raises DamagedCopyError for a tensor that is not as written."""
        infos, sums = tensor_infos(self.folder), self._sums()
        for name, info in in_file_order(infos):
            data = np.array(map_tensor(info))
            if zlib.crc32(data.reshape(-1).view(np.uint8)) != sums.get(name):
                raise DamagedCopyError(f"tensor {name} in the FP8 copy {info.file} is damaged")
            yield name, paddle.to_tensor(data)

    def write(
        self,
        config: dict,
        infos: dict[str, TensorInfo],
        tensors: Iterable[tuple[str, paddle.Tensor]],
        linears: Iterable[str],
    ) -> None:
        """Write `tensors` (as fp8_base.quantised_tensors gives them for `infos`) one by one.

        config: the model's config.json. linears: paths of the quantised Linears. Raises ConfigError with both
        numbers if the disk has not enough room, before anything is written.
        """
        layout = _layout(infos, {f"{path}.weight" for path in linears})
        advice = "make room there, or set cache_dir to another disk"
        place, wanted = self.folder.parent, layout_bytes(layout)
        check_room(place, wanted, "the FP8 copy of the transformer takes", advice)
        values = ((name, tensor.numpy()) for name, tensor in tensors)
        write_component(self.folder, config, layout, values, {"format": "pd", "source": self._stamp})

    @property
    def _stamp(self) -> str:
        return f"{FORMAT}; {self.source}"

    def _sums(self) -> dict[str, int]:
        return read_json(self.folder / INDEX).get("metadata", {}).get("crc32", {})


def _layout(infos: dict[str, TensorInfo], weights: set[str]) -> Layout:
    """What quantised_tensors will yield, in its order."""
    layout: Layout = {}
    for name, info in in_file_order(infos):
        if name in weights:
            shape = info.shape[::-1] if info.torch_layout else info.shape
            layout[f"{name}.codes"] = "U8", shape
            layout[f"{name}.scale"] = "F32", [-(-side // BLOCK) for side in shape]
        else:
            layout[name] = info.dtype, info.shape
    return layout
