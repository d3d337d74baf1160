"""Three commands that calculate with LoRAs.

    python -m ppcoat lora resize IN OUT --rank 16
    python -m ppcoat lora combine A B OUT --scale 0.8 0.5 --rank 32
    python -m ppcoat lora extract BASE TUNED OUT --rank 64

`resize` cuts to a smaller rank, and makes LoRAs of LoKrs, LoHas and whole differences; `combine` is a
weighted sum, exact without --rank; `extract` is the difference of two models. All of them tell the relative
error of delta-W, overall and where it is worst. What can be read is in ppcoat/lora/parse.py, the numbers are
those of ppcoat/lora/arithmetic.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppcoat.atomic import check_writable
from ppcoat.config.flags import from_flags
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAFile, LoRAModule, flux_names, read_fitting, read_lora_file, write_lora_file
from ppcoat.lora.arithmetic import (
    Loss,
    Place,
    in_parts,
    is_vector,
    of_matrix,
    rank_of,
    sum_of,
    told,
    vectors_of,
)
from ppcoat.lora.files import check_known
from ppcoat.lora.keys import CLIP, T5, TRANSFORMER, KeyReader
from ppcoat.lora.parse import Change, described, is_plain
from ppcoat.lora.writing import FORMATS
from ppcoat.models.flux.files import FLUX_CLASSES, FluxFiles
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import linear_weights, parameter_shapes, read_tensors, unfilled
from ppcoat.models.newbie.files import unfilled_nextdit
from ppcoat.models.tensor_files import TensorInfo, map_tensor, tensor_infos
from ppcoat.progress import Progress
from ppcoat.reading import read_json

from .flags import CombineFlags, ExtractFlags, ReadFlags, ResizeFlags, WriteFlags
from .lora_files import carried_fields, counts, stored_dtype
from .merge import strengths

ENCODERS = (CLIP, T5)
# What a folder's JSON file calls a pipeline or its transformer -> whether it is FLUX's, or else NewBie's.
_OF_FLUX = {
    **dict.fromkeys(FLUX_CLASSES, True),
    "FluxTransformer2DModel": True,
    "NewbiePipeline": False,
    "nextdit_clip": False,
}


def run_resize(arguments: argparse.Namespace) -> None:
    flags = from_flags(ResizeFlags, arguments)
    if flags.rank is None and flags.energy is None:
        raise ConfigError("give --rank, --energy, or both")
    if flags.energy is not None and not 0 < flags.energy <= 1:
        raise ConfigError(f"--energy: came {flags.energy:g}, wanted a share above 0 and up to 1, e.g. 0.95")
    check_rank(flags.rank)
    check_target(flags.output)
    file = read_lora(flags.input, flags)
    print(f"{flags.input} ({file.format}): {content(file)}")
    write_sum([(file, 1.0)], flags, flags.output, flags.energy, carried_fields(file))


def run_combine(arguments: argparse.Namespace) -> None:
    flags = from_flags(CombineFlags, arguments)
    paths, scales = list(flags.files), list(flags.scale)
    while len(scales) > 1 and not is_number(scales[-1]):  # OUT directly after the strengths
        paths.append(Path(scales.pop()))
    if len(paths) < 2:
        raise ConfigError(f"came {', '.join(map(str, paths))}: wanted LoRAs, and at last the file to write")
    for text in scales:
        if not is_number(text):
            raise ConfigError(f"--scale: came {text!r}, wanted numbers")
    *sources, output = paths
    by = strengths(list(map(str, sources)), list(map(float, scales)))
    check_rank(flags.rank)
    check_target(output)
    files = [(read_lora(source, flags), each) for source, each in zip(sources, by, strict=True)]
    for source, (file, each) in zip(sources, files, strict=True):
        print(f"{each:g} x {source} ({file.format}): {content(file)}")
    write_sum(files, flags, output, None, fields_of_sum(sources, files))


def run_extract(arguments: argparse.Namespace) -> None:
    flags = from_flags(ExtractFlags, arguments)
    check_rank(flags.rank)
    check_target(flags.output)
    parts = [TRANSFORMER, *(ENCODERS if flags.text_encoders else ())]
    pairs = [pair_of(flags.base, flags.tuned, part) for part in parts]
    found: dict[Place, LoRAModule] = {}
    losses: dict[str, Loss] = {}
    aside: list[tuple[str, float]] = []
    for pair in pairs:
        for name, paths in pair.units(flags.format):
            matrix, *more = [pair.difference(f"{path}.weight") for path in paths]
            matrix = np.concatenate([matrix, *more]) if more else matrix
            if matrix.any():
                module, losses[name] = of_matrix(matrix, flags.rank)
                found |= {(pair.part, path): each for path, each in in_parts(paths, module).items()}
        aside += [(name, norm) for name in pair.others if (norm := np.linalg.norm(pair.difference(name)))]
    if not found:
        raise ConfigError(f"the Linears of {flags.base} and {flags.tuned} are equal: give two that differ")
    fields = {"base_model": flags.base.resolve().name, "extracted_from": flags.tuned.resolve().name}
    print(f"{flags.tuned} - {flags.base}: {len(losses)} of their modules differ")
    if aside:
        left, taken = (norm for _, norm in aside), (loss.norm for loss in losses.values())
        print(
            f"note: {len(aside)} biases, norms and tables differ too, e.g. {aside[0][0]}, which a LoRA does "
            f"not hold: left out, {math.hypot(*left) / math.hypot(*taken):.2g} of the norm of what was taken"
        )
    write(found, losses, [], flags, flags.output, fields, "diffusers", flags.dtype or "float32")


def content(file: LoRAFile) -> str:
    """Kinds and parts, and the ranks of the LoRAs."""
    ranks = [change.kind.rank for change in file.changes if is_plain(change)]
    return file.what + (f", rank {counts(ranks)}" if ranks else "")


def read_lora(path: Path, flags: ReadFlags) -> LoRAFile:
    """An adapter, of which each change of a weight can be written as a LoRA; others are refused by name."""
    if flags.model is None:
        file = read_lora_file(path)
        if file.foreign and "NewBie" in file.foreign:
            raise ConfigError(f"{path} is {file.foreign}: give NewBie's folder with --model")
        check_known(file, str(path), flags.ignore_unknown)
    else:
        model, parts = Path(flags.model), (TRANSFORMER,)
        if _is_flux(model):
            model = _flux_files(model)
            parts = [part for part in (*parts, *ENCODERS) if part in model.components]
        shapes = parameter_shapes(model, *parts)
        file = read_fitting(path, shapes, None, flags.ignore_unknown)
    refused = [each for each in file.changes if not is_vector(each) and rank_of(each.kind) is None]
    if refused:
        raise ConfigError(
            f"{path} has {described(refused)}, e.g. {refused[0].paths[0]}: what that adds depends on the "
            "base's weights; merge it into a model (`merge`) and take a LoRA out with "
            "`lora extract`"
        )
    for note in file.notes:
        print(f"note: {note}")
    return file


def write_sum(
    files: Sequence[tuple[LoRAFile, float]],
    flags: ResizeFlags | CombineFlags,
    output: Path,
    energy: float | None,
    fields: Mapping[str, str],
) -> None:
    """Write the sum of files, each with its strength, and tell what it lost."""
    first = files[0][0].format
    file_format = flags.format or (first if first in FORMATS else "diffusers")
    dtypes = {stored_dtype(file) for file, _ in files}
    dense = [change for file, _ in files for change in file.changes
             if not is_vector(change) and not is_plain(change)]  # fmt: skip
    if dense and flags.rank is None and energy is None:
        raise ConfigError(f"{described(dense)}: only LoRAs are added up without a cut; give --rank")
    if dense:
        print(f"note: {described(dense)} become LoRAs")
    sums, losses = sum_of(files, flags.rank, energy, file_format)
    dtype = flags.dtype or (dtypes.pop() if len(dtypes) == 1 else "float32")
    write(sums, losses, vectors_of(files), flags, output, fields, file_format, dtype)


def write(
    found: Mapping[Place, LoRAModule],
    losses: Mapping[str, Loss],
    vectors: Sequence[Change],
    flags: WriteFlags,
    output: Path,
    fields: Mapping[str, str],
    file_format: str,
    dtype: str,
) -> None:
    """Write LoRAs, text encoders' among them, with biases and norms; print what was lost."""
    file_format = flags.format or file_format
    modules = {path: module for (part, path), module in found.items() if part == TRANSFORMER}
    others = [Change(part, (path,), "weight", module, path)
              for (part, path), module in found.items() if part != TRANSFORMER]  # fmt: skip
    rounding = write_lora_file(output, modules, fields, file_format, dtype, [*others, *vectors])
    ranks = counts(module.rank for module in found.values())
    beside = f", and as they were {described(vectors)}" if vectors else ""
    size = output.stat().st_size / 1e6
    held = f"LoRA on {len(found)} layers, rank {ranks}{beside}"
    print(f"-> {output} ({file_format}, {dtype}, {size:.1f} MB): {held}")
    print(told(losses))
    print(
        f"read back: every delta-W as it was calculated, within a relative error of {rounding:.1g} ({dtype})"
    )


def fields_of_sum(sources: Sequence[Path], files: Sequence[tuple[LoRAFile, float]]) -> dict[str, str]:
    """The header of a sum: what it was made of, and the trigger words of all."""
    words = dict.fromkeys(file.header.get("trigger_word", "") for file, _ in files)
    made_of = [{"file": source.name, "scale": by} for source, (_, by) in zip(sources, files, strict=True)]
    return {"trigger_word": ", ".join(filter(None, words)), "combined_from": json.dumps(made_of)}


@dataclass(frozen=True)
class Pair:
    """A part of two models of one kind. before, after: where their tensors lie; linears: names of the weights
    of their Linears."""

    part: str
    before: Mapping[str, TensorInfo]
    after: Mapping[str, TensorInfo]
    linears: set[str]

    def units(self, file_format: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Name and paths of the Linears that are taken out together: one each, or as BFL fuses them."""
        paths = [name.removesuffix(".weight") for name in self.before if name in self.linears]
        units = {path: (path,) for path in paths}
        if file_format == "kohya" and self.part == TRANSFORMER:
            units = dict(map(flux_names.bfl_name, paths))
        yield from Progress(units.items(), desc=self.part, unit="module")

    @property
    def others(self) -> list[str]:
        """Names of all other tensors."""
        return [name for name in self.before if name not in self.linears]

    def difference(self, name: str) -> np.ndarray:
        """after - before, float64, of a Linear [out, in]."""
        first, second = self.before[name], self.after[name]
        if first.dtype == second.dtype and np.array_equal(map_tensor(first), map_tensor(second)):
            return np.zeros(first.shape)
        values = []
        for info in (second, first):
            (_, tensor), *_ = read_tensors({name: info}, self.linears)
            array = tensor.astype("float32").numpy()
            values.append(array.T if name in self.linears else array)
        difference = values[0].astype("float64") - values[1]
        if not np.isfinite(difference).all():
            raise ConfigError(
                f"{name} holds NaN or infinity in {first.file} or {second.file}: use whole models"
            )
        return difference


def pair_of(base: Path, tuned: Path, part: str) -> Pair:
    """Raises ConfigError for folders that are not of one kind of model, by the headers of their files."""
    first, second = (_infos_and_linears(folder, part) for folder in (base, tuned))
    for name, info in first[0].items():
        if name not in second[0] or second[0][name].shape != info.shape:
            has = second[0][name].shape if name in second[0] else "nothing"
            raise ConfigError(f"{name} is {info.shape} in {base} and {has} in {tuned}: give two of one model")
    return Pair(part, first[0], second[0], first[1])


def _infos_and_linears(model: Path, part: str) -> tuple[dict[str, TensorInfo], set[str]]:
    if part != TRANSFORMER and not (_is_flux(model) and part in _flux_files(model).components):
        raise ConfigError(
            f"{model} has no {part}: give models with FLUX's CLIP and T5, or leave --text_encoders out"
        )
    own = _flux_files(model)[part] if _is_flux(model) else model / part if (model / part).is_dir() else model
    if part != TRANSFORMER:
        infos, reader = tensor_infos(own), KeyReader(None)
        named = {name: reader.read(f"{part}.{name.removesuffix('.weight')}.lora_A.weight") for name in infos}
        return infos, {name for name, key in named.items() if key and f"{key.name}.weight" == name}
    if _is_flux(model):
        transformer, infos = unfilled(FluxTransformer2DModel, own)
        return infos, linear_weights(transformer)
    return tensor_infos(own), linear_weights(unfilled_nextdit(own))


def _flux_files(model: Path) -> FluxFiles:
    return FluxFiles.found(model, "the name of the model")


def _is_flux(model: Path) -> bool:
    """Whether a file (held to be FLUX's until it is read), the folder of a pipeline, or of a transformer
    alone, is FLUX's. Raises ConfigError unless it is that or NewBie's."""
    if model.is_file():
        return True
    alone = not (model / "model_index.json").is_file() and (model / "config.json").is_file()
    why = "wanted the folder of a FLUX or NewBie pipeline, or of its transformer, or a FLUX file"
    config = read_json(model / ("config.json" if alone else "model_index.json"), why)
    found = config.get("model_type", config.get("_class_name"))
    if found not in _OF_FLUX:
        raise ConfigError(f"{model} is of a {found}: {why}")
    return _OF_FLUX[found]


def check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: came {rank}, wanted at least 1")


def check_target(output: Path) -> None:
    """Raises ConfigError for a file that is there, OSError for one that cannot be written."""
    if output.exists():
        raise ConfigError(f"{output} exists: remove it, or choose another name")
    if output.suffix != ".safetensors":
        raise ConfigError(f"a LoRA is saved as .safetensors, got {output.name}")
    check_writable(output.parent)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
