"""The FP8 weights of a transformer on disk, so that the next start need not quantise again.

A folder in the layout of the model's own: config.json, shards and an index. Tensors have the names and
Paddle's layout of the quantised model's state_dict. Every shard names its source in the header, the index
has a CRC-32 for each tensor. It is written beside its place and renamed, so that it is there whole or not at
all.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from ppcoat.errors import ConfigError
from ppcoat.models.loading import TensorInfo, in_file_order, map_tensor, read_json, tensor_infos
from ppcoat.models.saving import SHARD_BYTES, write_json
from ppcoat.nn.fp8_weight import BLOCK

_log = logging.getLogger(__name__)

FORMAT = f"E4M3, blocks of {BLOCK} x {BLOCK}, scales powers of two"
STEM = "diffusion_pytorch_model"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_ALIGNMENT = 64  # of the first byte of data in a shard

Layout = dict[str, tuple[str, list[int]]]  # name -> dtype as safetensors names it, shape


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
            said = {_metadata(file).get("source") for file in {info.file for info in infos.values()}}
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
        model: str | Path,
        infos: dict[str, TensorInfo],
        tensors: Iterable[tuple[str, paddle.Tensor]],
        linears: Iterable[str],
    ) -> None:
        """Write `tensors` (as quantised_tensors gives them for `infos` of the folder `model`) one by one.

        linears: paths of the quantised Linears. Raises ConfigError with both numbers if the disk has not
        enough room, before anything is written.
        """
        shards = _shards(_layout(infos, {f"{path}.weight" for path in linears}))
        self._check_room(sum(_nbytes(entry) for shard in shards for entry in shard.values()))
        part = self.folder.with_name(f"{self.folder.name}.tmp-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write_json(part / "config.json", read_json(Path(model) / "config.json"))
            stream, sums, weight_map = iter(tensors), {}, {}
            for number, shard in enumerate(shards, 1):
                file = part / f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
                sums |= _write_shard(file, shard, stream, self._stamp)
                weight_map |= dict.fromkeys(shard, file.name)
            total = sum(_nbytes(entry) for shard in shards for entry in shard.values())
            metadata = {"total_size": total, "crc32": sums}
            write_json(
                part / f"{STEM}.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map}
            )
            if self.folder.exists():  # the stale one; a folder cannot be renamed onto another
                shutil.rmtree(self.folder)
            part.rename(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @property
    def _stamp(self) -> str:
        return f"{FORMAT}; {self.source}"

    def _sums(self) -> dict[str, int]:
        return read_json(self.folder / f"{STEM}.safetensors.index.json").get("metadata", {}).get("crc32", {})

    def _check_room(self, wanted: int) -> None:
        place = self.folder.parent
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
        if free < wanted:
            raise ConfigError(
                f"the FP8 copy of the transformer takes {wanted / 1e9:.2f} GB, and {place} has "
                f"{free / 1e9:.2f} GB free: make room there, or set cache_dir to another disk"
            )


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


def _shards(layout: Layout) -> list[Layout]:
    """Cut before the tensor that would make a shard pass SHARD_BYTES."""
    shards, filled = [{}], 0
    for name, entry in layout.items():
        if shards[-1] and filled + _nbytes(entry) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _nbytes(entry)
    return shards


def _nbytes(entry: tuple[str, list[int]]) -> int:
    return _BYTES[entry[0]] * int(np.prod(entry[1]))


def _write_shard(
    file: Path, layout: Layout, stream: Iterator[tuple[str, paddle.Tensor]], stamp: str
) -> dict[str, int]:
    """The next tensors of the stream as one safetensors file -> name -> CRC-32. One tensor is in memory."""
    header: dict = {"__metadata__": {"format": "pd", "source": stamp}}
    end = 0
    for name, entry in layout.items():
        start, end = end, end + _nbytes(entry)
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    sums = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for wanted, entry in layout.items():
            name, tensor = next(stream)
            data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
            assert name == wanted and data.size == _nbytes(entry), (name, wanted, data.size)
            sums[name] = zlib.crc32(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return sums


def _metadata(file: Path) -> dict[str, str]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header.get("__metadata__", {})
