"""A transformer with its Linears quantised, read tensor by tensor: never in memory unquantised.

`load_quantized` quantises while it reads, or reads the copy that an earlier start left on disk;
`load_quantized_transformer` is that for FLUX, newbie/files.py has it for NewBie-image. `weight_errors` and
`output_errors` say what the quantisation costs FLUX.

The copy is there so that the next start need not quantise again. It is a folder in the layout of the model's
own: config.json, shards and an index. Tensors have the names and Paddle's layout of the quantised model's
state_dict. Every shard names its source in the header, the index has a CRC-32 for each tensor. It is written
beside its place and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn

from ppcoat.device import default_dtype
from ppcoat.errors import ConfigError
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import (
    linear_weights,
    load_component,
    load_transformer,
    set_parameter,
    unfilled,
)
from ppcoat.models.offload import loaded_to_host
from ppcoat.models.tensor_files import (
    Component,
    TensorInfo,
    in_file_order,
    map_tensor,
    rows_of,
    tensor_infos,
    weight_index,
    with_progress,
)
from ppcoat.models.writing import INDEX, Layout, check_room, layout_bytes, shard_metadata, write_component
from ppcoat.nn.base_weight import BASES, BLOCK, BaseWeight
from ppcoat.nn.convert import check_format, is_in_block, set_base_weight, set_sublayer, sublayer_at
from ppcoat.nn.swap import last_blocks, move_to_host

_log = logging.getLogger(__name__)

# A model whose parameters have no memory yet, with its `source_config`, and where its tensors lie.
Unfilled = Callable[[], tuple[nn.Layer, dict[str, TensorInfo]]]
BAND = 8 * BLOCK  # rows quantised at a time: what is in float32 beside the codes


class WeightError(NamedTuple):
    """One Linear: its path, the shape [in, out] of its weight, RMS(quantised - exact) / RMS(exact), whether
    it is inside a block, and the CPU time in seconds in which its weight was read and quantised.
    """

    path: str
    shape: list[int]
    relative_rms: float
    in_block: bool
    seconds: float


class OutputErrors(NamedTuple):
    """RMS(quantised - exact) / RMS(exact) of the velocity: every Linear quantised, and those of the blocks
    alone."""

    all_linears: float
    in_blocks: float


def load_quantized_transformer(
    folder: Component,
    dtype: str | None = None,
    copy: QuantizedCopy | None = None,
    blocks_to_swap: int = 0,
    base: str = "fp8",
) -> FluxTransformer2DModel:
    """The FLUX transformer of a component folder in eval mode, the weight of every Linear in a format of
    `BASES`.

    All 504 Linears of FLUX.1-dev are quantised, 494 of them in its blocks; biases and norms are in `dtype`
    (None: float32 on CPU, bfloat16 on GPU). copy, and what else is raised: see `load_quantized`.
    blocks_to_swap: the last so many blocks are left in host memory, for nn/swap.py. Raises ConfigError as
    `load_transformer`, and for more blocks_to_swap than blocks.
    """
    return load_quantized(
        lambda: unfilled(FluxTransformer2DModel, folder, dtype),
        copy,
        lambda model: last_blocks(model, blocks_to_swap),
        base,
    )


def load_parts(
    where: Mapping[str, Component],
    names: Iterable[str],
    dtype: str | None,
    quantize: str | None,
    to_host: bool,
) -> dict[str, Any]:
    """`loading.load_component` of each name, the transformer's Linears in the format `quantize` of BASES.
    to_host: models lie in host memory; a quantised transformer is made on the device. Raises ConfigError for
    another format before anything is loaded."""
    check_format(quantize)
    dtype, loaded = dtype or default_dtype(), {}
    for name in names:
        if name == "transformer" and quantize:
            loaded[name] = load_quantized_transformer(where[name], dtype, base=quantize)
            continue
        with loaded_to_host(to_host):
            loaded[name] = load_component(where[name], name, dtype)
    return loaded


def load_quantized(
    unfilled_model: Unfilled,
    copy: QuantizedCopy | None,
    swapped: Callable[[nn.Layer], Iterable[str]],
    base: str = "fp8",
) -> nn.Layer:
    """The model in eval mode, the weight of every Linear in a format of `BASES` and all else in the dtype of
    its parameter.

    copy: where the weights in this format are kept for the next start; a stale or damaged one is made anew,
    with one warning. swapped: a model -> paths of the blocks that are left in host memory. Peak memory: the
    quantised model, one tensor and a band of `BAND` rows in float32. Raises ConfigError naming a tensor that
    the format cannot hold, and for a disk too full for the copy.
    """
    assert copy is None or copy.base == base
    model, infos = unfilled_model()
    on_host = tuple(f"{path}." for path in swapped(model))
    if copy is None:
        _fill(model, quantised_tensors(infos, model, base), on_host, base)
        return model.eval()
    if not copy.is_usable():
        _write(copy, model, infos)
    try:
        _fill(model, copy.tensors(), on_host, base)
    except DamagedCopyError as error:
        _log.warning("%s: the copy is made anew", error)
        model, infos = unfilled_model()
        _write(copy, model, infos)
        _fill(model, copy.tensors(), on_host, base)
    return model.eval()


def quantised_tensors(
    infos: dict[str, TensorInfo], model: nn.Layer, base: str = "fp8"
) -> Iterator[tuple[str, paddle.Tensor]]:
    """The tensors of a folder one by one, under the names in the state_dict of a quantised model.

    The weight of a Linear comes in parts, in FP8 <path>.weight.codes uint8 [in, out] and <path>.weight.scale
    float32 [in / BLOCK, out / BLOCK], both rounded up (see `BaseWeight.layout`); everything else as it lies
    on disk.
    """
    weights = linear_weights(model)
    for name, info in with_progress(infos, f"{base}, reading"):
        if name in weights:
            for part, tensor in _quantised(name, info, base).named_buffers():
                yield f"{name}.{part}", tensor
        else:
            yield name, paddle.to_tensor(map_tensor(info))


def quantized_model_bytes(model: nn.Layer) -> int:
    """Bytes of a model's quantised weights and of its parameters."""
    weights = sum(layer.nbytes for layer in model.sublayers() if isinstance(layer, BaseWeight))
    return weights + sum(p.size * p.element_size() for p in model.parameters())


def weight_errors(folder: Component, base: str = "fp8") -> Iterator[WeightError]:
    """What a format of `BASES` does to each Linear of a transformer folder, in the order of the files.

    Holds one weight at a time, quantised and in float32."""
    model, infos = unfilled(FluxTransformer2DModel, folder)
    weights = linear_weights(model)
    for name, info in in_file_order(infos):
        if name not in weights:
            continue
        began = time.process_time()
        weight = _quantised(name, info, base)
        seconds = time.process_time() - began
        rows, wrong, total, start = weight.dequantized("float32").t(), 0.0, 0.0, 0
        for exact in _bands(info):
            exact, own = exact.astype("float32"), slice(start, start + len(exact))
            wrong += float((rows[own] - exact).square().sum())
            total += float(exact.square().sum())
            start = own.stop
        relative = (wrong / total) ** 0.5 if total else 0.0
        path = name.removesuffix(".weight")
        yield WeightError(path, weight.shape, relative, is_in_block(path, model), seconds)


@paddle.no_grad()
def output_errors(
    folder: Component, tokens: int = 64, seeds: Iterable[int] = (0,), base: str = "fp8"
) -> OutputErrors:
    """Means over random inputs, one for each seed, of a square picture of `tokens` tokens; base: of `BASES`.

    Holds the exact and the quantised transformer of the folder in memory, in the compute dtype of the device.
    """
    exact, rounded = load_transformer(folder), load_quantized_transformer(folder, base=base)
    inputs = [_random_inputs(exact, tokens, seed) for seed in seeds]

    def relative_errors() -> float:
        errors = []
        for each in inputs:
            want, got = (model(**each, return_dict=False)[0].astype("float32") for model in (exact, rounded))
            errors.append(float(((got - want).square().mean() / want.square().mean()).sqrt()))
        return float(np.mean(errors))

    all_linears = relative_errors()
    for name in linear_weights(exact):
        path = name.removesuffix(".weight")
        if not is_in_block(path, exact):
            set_sublayer(rounded, path, sublayer_at(exact, path))
    return OutputErrors(all_linears, relative_errors())


def _random_inputs(model: FluxTransformer2DModel, tokens: int, seed: int) -> dict[str, paddle.Tensor | None]:
    rng, sizes, dtype = np.random.default_rng(seed), model.config, model.proj_out.weight.dtype

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    rows, columns = np.divmod(np.arange(tokens), max(1, int(tokens**0.5)))
    return {
        "hidden_states": normal(1, tokens, sizes.in_channels),
        "encoder_hidden_states": normal(1, 32, sizes.joint_attention_dim),
        "pooled_projections": normal(1, sizes.pooled_projection_dim),
        "timestep": paddle.full([1], 0.5, dtype),
        "guidance": paddle.full([1], 3.5, dtype) if sizes.guidance_embeds else None,
        "img_ids": paddle.to_tensor(np.stack([0 * rows, rows, columns], -1).astype("float32")),
        "txt_ids": paddle.zeros([32, 3]),
    }


def _bands(info: TensorInfo) -> Iterator[paddle.Tensor]:
    """A matrix on disk as [out, in], in bands of BAND rows."""
    columns = None if info.torch_layout else map_tensor(info).T
    for start in range(0, info.shape[0] if columns is None else len(columns), BAND):
        own = slice(start, start + BAND)
        band = rows_of(info, own.start, own.stop) if columns is None else columns[own]
        yield paddle.to_tensor(np.ascontiguousarray(band))


def _quantised(name: str, info: TensorInfo, base: str) -> BaseWeight:
    try:
        return BASES[base].of_rows(_bands(info))
    except ConfigError as error:
        raise ConfigError(f"tensor {name} in {info.file}: {error}") from error


def _write(copy: QuantizedCopy, model: nn.Layer, infos: dict[str, TensorInfo]) -> None:
    tensors = quantised_tensors(infos, model, copy.base)
    copy.write(model.source_config, infos, tensors, linear_weights(model))


def _fill(
    model: nn.Layer, tensors: Iterable[tuple[str, paddle.Tensor]], on_host: tuple[str, ...], base: str
) -> None:
    """Give every parameter its value, and every Linear its quantised weight in the place of its own. Names
    that begin with one of `on_host` stay in host memory.
    """
    parameters, weights = dict(model.named_parameters()), linear_weights(model)
    parts: dict[str, paddle.Tensor] = {}  # of one weight; they come one after the other
    for name, tensor in tensors:
        weight_name, _, part = name.rpartition(".")
        if weight_name in weights:
            parts[part] = tensor
            path, shape = weight_name.removesuffix(".weight"), parameters[weight_name].shape
            if parts.keys() != BASES[base].layout(shape).keys():
                continue
            weight, parts = BASES[base](shape, **parts), {}
            set_base_weight(model, path, weight, sublayer_at(model, path).bias)
            filled = weight.buffers()
        else:
            set_parameter(parameters[name], tensor)
            filled = [parameters[name]]
        if name.startswith(on_host):
            for each in filled:
                move_to_host(each)


class DamagedCopyError(ConfigError):
    """A tensor of the copy is not what was written."""


@dataclass(frozen=True)
class QuantizedCopy:
    """folder: where the copy lies or shall lie. source: what stands for the contents of the model's files,
    by which a copy of other weights is known: `folder_identity` with times. base: its format.
    """

    folder: Path
    source: str
    base: str = "fp8"

    @classmethod
    def beside_or_in(
        cls, model: Path, cache_dir: Path, source: str, beside_model: bool = False, base: str = "fp8"
    ) -> QuantizedCopy:
        """In the pipeline folder `model`, or beside it if it is a file, if that is asked for and can be
        written; else in `cache_dir`."""
        folder = model.parent if model.is_file() else model
        name = f"{model.resolve().name}-transformer-{base}"
        if beside_model and os.access(folder, os.W_OK):
            return cls(folder / (name if model.is_file() else f"transformer-{base}"), source, base)
        copy = cls(cache_dir / name, source, base)
        if beside_model:
            _log.warning("%s cannot be written: %s goes to %s", folder, copy, cache_dir)
        return copy

    def __str__(self) -> str:
        return f"the transformer's {BASES[self.base].name} copy"

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
            _log.warning("%s is damaged (%s): it is made anew", self, error)
            return False
        if said != {self._stamp}:
            _log.warning("%s %s is of other weights: it is made anew", self, self.folder)
            return False
        return True

    def tensors(self) -> Iterator[tuple[str, paddle.Tensor]]:
        """(name, tensor) one at a time, each in name and dtype as quantised_tensors gives it (any shape).
        Raises DamagedCopyError for a tensor that is not as written."""
        infos, sums = tensor_infos(self.folder), self._sums()
        for name, info in with_progress(infos):
            data = np.array(map_tensor(info))
            if zlib.crc32(data.reshape(-1).view(np.uint8)) != sums.get(name):
                raise DamagedCopyError(f"tensor {name} in {self} {info.file} is damaged")
            yield name, paddle.to_tensor(data)

    def write(
        self,
        config: dict,
        infos: dict[str, TensorInfo],
        tensors: Iterable[tuple[str, paddle.Tensor]],
        weights: set[str],
    ) -> None:
        """Write `tensors` one by one, each in name and dtype as quantised_tensors gives it; any shape.

        infos: the tensors that they are made of. config: the model's config.json. weights: names of the
        quantised tensors in `infos`. Raises ConfigError with both numbers if the disk has not enough room,
        before anything is written.
        """
        layout = _layout(infos, weights, self.base)
        advice = "make room there, or set cache_dir to another disk"
        place, wanted = self.folder.parent, layout_bytes(layout)
        check_room(place, wanted, f"{self} takes", advice)
        values = ((name, tensor.numpy()) for name, tensor in tensors)
        write_component(self.folder, config, layout, values, {"format": "pd", "source": self._stamp})

    @property
    def _stamp(self) -> str:
        return f"{BASES[self.base].about}; {self.source}"

    def _sums(self) -> dict[str, int]:
        said = weight_index(self.folder / INDEX).metadata
        return said.crc32 if said else {}


def _layout(infos: dict[str, TensorInfo], weights: set[str], base: str) -> Layout:
    """What quantised_tensors will yield, in its order."""
    layout: Layout = {}
    for name, info in in_file_order(infos):
        if name in weights:
            shape = info.shape[::-1] if info.torch_layout else info.shape
            layout |= {f"{name}.{part}": said for part, said in BASES[base].layout(shape).items()}
        else:
            layout[name] = info.dtype, info.shape
    return layout
