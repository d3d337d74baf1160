"""A FLUX model with LoRAs (and other adapters) added to its weights, for programs that know none.

    python -m ppcoat merge --model models/FLUX.1-dev --lora lora.safetensors --output_dir models/merged
    python -m ppcoat merge --model models/FLUX.1-dev --lora hat.safetensors style.safetensors --scale 1 0.5 \
        --output_dir models/merged

The transformer is changed, and the text encoders where a file has parts for them. The weights keep their
dtype; those of a file in FP8 or GGUF become bfloat16. bfloat16 rounds parts of a small delta-W away; how much
is measured and printed. The other components are copied. The output is a folder also where the model is a
file.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import paddle

from ppcoat.atomic import check_writable, whole_folder
from ppcoat.cli.flags import MergeFlags
from ppcoat.config.flags import from_flags
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAFile, info_of, merge_lora, put_adapters, read_fitting, tell
from ppcoat.lora.adapters import added
from ppcoat.lora.header import PARTS
from ppcoat.models.flux.files import FLUX_CLASSES, FLUX_COMPONENTS, FluxFiles
from ppcoat.models.loading import (
    check_folder,
    linear_weights,
    load_component,
    parameter_shapes,
    read_tensors,
)
from ppcoat.models.tensor_files import Component, FilePart, tensor_infos
from ppcoat.models.writing import MODEL_INDEX, class_that_draws, save_component, write_json
from ppcoat.reading import followed, read_json

Checked = TypeVar("Checked")
Loras = list[tuple[LoRAFile, float]]  # with their strengths
NOTABLE_LOSS = 0.05  # of the norm of delta-W
ROUNDING = {"F32": ("float32", 2.0**-24), "BF16": ("bfloat16", 2.0**-8), "F16": ("float16", 2.0**-11)}


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(MergeFlags, arguments)
    tune_host()
    # A sum of weights: a card would only have to hold the model.
    paddle.set_device("cpu")
    folder, output = Path(flags.model), Path(flags.output_dir)
    check_output(folder, output, "--output_dir")
    scales = strengths(flags.lora, flags.scale)
    beside = {"text_encoders": flags.text_encoders, "vae": flags.vae, "tokenizers": flags.tokenizers}
    files = FluxFiles.found(folder, "--model", **beside)
    check_folder(files, control=True)
    shapes = parameter_shapes(files, *PARTS)
    loras = [
        (read_fitting(path, shapes, None, flags.ignore_unknown), scale)
        for path, scale in zip(flags.lora, scales, strict=True)
    ]
    parts = {part: base_dtype(files[part]) for part in PARTS
             if any(change.part == part for file, _ in loras for change in file.changes)}  # fmt: skip
    models = {part: load_component(files[part], part, dtype) for part, (dtype, _) in parts.items()}
    put_adapters(models, loras)
    for model in models.values():
        merge_lora(model)
    merged = [Merged(part, model, loras, parts[part][1]) for part, model in models.items()]
    lost = write_merged(files, output, models, lambda draft: check_merged(files, draft, merged))
    for (file, scale), path in zip(loras, flags.lora, strict=True):
        tell(info_of(file, scale), f"{folder} + {path} -> {output}: ")
    dtype = ", ".join(sorted({dtype for dtype, _ in parts.values()}))
    print(f"{changed_modules(loras)} modules; rounding to {dtype} changed delta-W by {lost:.2%} of its norm")
    if lost > NOTABLE_LOSS:
        print(
            f"warning: {dtype} does not hold all of this LoRA; draw with the LoRA file itself (generate "
            "--path_to_lora), or merge into a float32 folder",
            file=sys.stderr,
        )


def strengths(paths: list[str], scales: list[float], flag: str = "--scale") -> list[float]:
    """One strength for each path. Raises ConfigError for as many as do not fit, and for NaN or infinity."""
    scales = scales * len(paths) if len(scales) == 1 else scales
    if len(scales) != len(paths):
        raise ConfigError(f"{flag}: came {len(scales)} strengths for {len(paths)} LoRAs, wanted one each")
    if not all(math.isfinite(scale) for scale in scales):
        raise ConfigError(f"{flag} must be a finite number, got {', '.join(map(str, scales))}")
    return scales


def changed_modules(loras: Loras) -> int:
    """How many modules of the model the files change together."""
    return len({(change.part, path) for file, _ in loras for change in file.changes for path in change.paths})


@dataclass(frozen=True)
class Merged:
    """A component and what was added to its weights, whose unit roundoff is `unit`."""

    part: str
    model: paddle.nn.Layer
    loras: Loras
    unit: float


def check_output(folder: Path, output: Path, flag: str) -> None:
    """Raises ConfigError, which names `flag`, for an output that is there already or lies in the model's
    folder, OSError for one that cannot be written."""
    inside = followed(output)
    if followed(folder) in (inside, *inside.parents):
        raise ConfigError(f"{flag} {output} is inside the model {folder}: choose a folder elsewhere")
    if output.exists():
        raise ConfigError(f"{flag} {output} exists: remove it, or choose another name")
    check_writable(output.parent)


def write_merged(
    files: FluxFiles | Path,
    output: Path,
    models: Mapping[str, paddle.nn.Layer],
    check: Callable[[Path], Checked],
) -> Checked:
    """The pipeline whose components are `files`, or lie in a folder, as the folder `output`, with `models`
    for these of its components: there whole or not at all.

    check: looks at the new folder before it takes its name; what it returns is returned, and what it raises
    leaves nothing behind.
    """
    with whole_folder(output) as draft:
        folder = files.folder if isinstance(files, FluxFiles) else files
        if folder is not None:
            shutil.copytree(folder, draft, ignore=partial(left_out, folder, models), dirs_exist_ok=True)
        else:
            _write_others(files, models, draft)
        for part, model in models.items():
            save_component(model, draft / part)
        name_class(draft / "model_index.json", models.get("transformer"))
        return check(draft)


def _write_others(files: FluxFiles, models: Collection[str], draft: Path) -> None:
    """The components that are not changed: folders are copied, those of a file written as folders."""
    for name in (name for name in FLUX_COMPONENTS if name not in models):
        component = files[name]
        if isinstance(component, FilePart):
            dtype = base_dtype(component)[0] if component.tensors else None
            save_component(load_component(component, name, dtype), draft / name)
        else:
            shutil.copytree(component, draft / name)
    write_json(draft / "model_index.json", MODEL_INDEX)


def name_class(file: Path, transformer: paddle.nn.Layer | None) -> None:
    """Let the model_index.json of a FLUX pipeline name the class that draws with the transformer, which a
    control LoRA changes."""
    index = read_json(file)
    if transformer is not None and index.get("_class_name") in FLUX_CLASSES:
        own = index | {"_class_name": class_that_draws(transformer, index["_class_name"])}
        if own != index:
            write_json(file, own)


def base_dtype(folder: Component) -> tuple[str, float]:
    """The dtype in which a component is merged and its unit roundoff: that of its weights, bfloat16 for those
    in FP8 or GGUF. Raises ConfigError for several, and for one that cannot be added to."""
    infos = tensor_infos(folder).values()
    found = {"BF16"} if any(info.stored for info in infos) else {info.dtype for info in infos}
    if len(found) != 1 or not found <= ROUNDING.keys():
        raise ConfigError(
            f"{folder} has weights of {', '.join(sorted(found))}, wanted one of {', '.join(ROUNDING)}: "
            "merge into the original model"
        )
    return ROUNDING[found.pop()]


def left_out(folder: Path, parts: Collection[str], path: str, names: list[str]) -> list[str]:
    """Names not to copy: the changed parts, also as the one file that FLUX repositories hold at their top."""
    if Path(path) != folder:
        return []
    return [name for name in names if name in parts or name.endswith(".safetensors") or name[0] == "."]


def check_merged(files: FluxFiles, merged: Path, components: Sequence[Merged]) -> float:
    """Compare both folders' components, tensor by tensor: they must differ by what was added, rounded once.

    Returns ||difference - delta-W|| / ||delta-W||, all weights together. Raises OSError for a file that does
    not hold that, ConfigError for a weight that is not finite.
    """
    missed = total = 0.0
    for each in components:
        linears = linear_weights(each.model)
        before, (shapes,) = tensor_infos(files[each.part]), parameter_shapes(merged, each.part).values()

        def base(name: str, before=before, linears=linears, shapes=shapes) -> np.ndarray:
            (_, tensor), *_ = read_tensors({name: before[name]}, linears)
            values = tensor.astype("float32").numpy()
            values = values.T if name in linears else values
            # a control LoRA's further inputs were not there: zeros
            return np.pad(
                values, [(0, new - old) for new, old in zip(shapes[name], values.shape, strict=True)]
            )

        changes = added(each.loras, each.part, base)
        for name, tensor in read_tensors(tensor_infos(merged / each.part), linears):
            written = tensor.astype("float32").numpy()
            written = written.T if name in linears else written
            if not np.isfinite(written).all():
                whole = np.isfinite(base(name)).all()
                told = "with the LoRA leaves the range of its dtype: lower its strength" if whole else (
                    "holds NaN or infinity: fetch it again")  # fmt: skip
                raise ConfigError(f"{name} of {files[each.part]} {told}; nothing was written")
            off, size, allowed = written - base(name), 0.0, 0.0
            if name in changes:
                delta = changes[name]()
                off, size = off - delta, float(np.linalg.norm(delta))
            if name in changes or before[name].stored:
                allowed = 2 * each.unit * float(np.linalg.norm(written)) + 1e-6 * size
            if not np.linalg.norm(off) <= allowed:
                raise OSError(f"{name} in {merged} is not what was to be written; nothing was saved")
            missed, total = math.hypot(missed, float(np.linalg.norm(off))), math.hypot(total, size)
    return missed / total if total else 0.0
