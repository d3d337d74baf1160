"""A FLUX folder with a LoRA added to the weights of its transformer, for programs that know no LoRA.

    python -m ppcoat merge --model models/FLUX.1-dev --lora lora.safetensors --output_dir models/merged

The weights keep their dtype. bfloat16 rounds parts of a small delta-W away; how much is measured and printed.
The other components are copied.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import paddle
from safetensors import safe_open

from ppcoat.atomic import check_writable, whole_folder
from ppcoat.config.flags import add_flags, flag, from_flags
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.lora import LoRAFile, load_lora, merge_lora
from ppcoat.models.loading import check_folder, linear_weights, load_transformer, read_tensors
from ppcoat.models.tensor_files import tensor_infos
from ppcoat.models.writing import save_diffusers_model

from .lora_files import read_known

Checked = TypeVar("Checked")
NOTABLE_LOSS = 0.05  # of the norm of delta-W
ROUNDING = {"F32": ("float32", 2.0**-24), "BF16": ("bfloat16", 2.0**-8), "F16": ("float16", 2.0**-11)}


@dataclass(frozen=True)
class MergeFlags:
    """Settings of the command."""

    model: str = flag("folder of a FLUX pipeline")
    lora: str = flag("LoRA file, .safetensors")
    output_dir: str = flag("folder to write; it may not exist")
    scale: float = flag("strength of the LoRA", 1.0)
    ignore_unknown: bool = flag("leave keys out that name no FLUX module", False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, MergeFlags)


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(MergeFlags, arguments)
    tune_host()
    # A sum of weights: a card would only have to hold the model.
    paddle.set_device("cpu")
    folder, output = Path(flags.model), Path(flags.output_dir)
    check_output(folder, output, "--output_dir")
    check_scale(flags.scale)
    lora = read_known(Path(flags.lora), flags.ignore_unknown)
    check_folder(folder, "--model")
    check_fits(lora, folder / "transformer")
    dtype, unit = base_dtype(folder / "transformer")
    model = load_transformer(folder / "transformer", dtype)
    load_lora(model, flags.lora, flags.scale)
    merge_lora(model)
    linears, added = linear_weights(model), Added(lora, flags.scale, unit)
    lost = write_merged(folder, output, model, lambda merged: check_merged(folder, merged, linears, added))
    print(f"{folder} + {flags.scale:g} x {flags.lora} -> {output}")
    print(f"{len(lora.modules)} modules; rounding to {dtype} changed delta-W by {lost:.2%} of its norm")
    if lost > NOTABLE_LOSS:
        print(
            f"warning: {dtype} does not hold all of this LoRA; draw with the LoRA file itself (generate "
            "--path_to_lora), or merge into a float32 folder",
            file=sys.stderr,
        )


@dataclass(frozen=True)
class Added:
    """What was added to weights whose unit roundoff is `unit`: scale * delta-W of the LoRA."""

    lora: LoRAFile
    scale: float
    unit: float


def check_output(folder: Path, output: Path, flag: str) -> None:
    """Raises ConfigError, which names `flag`, for an output that is there already or lies in the model's
    folder, OSError for one that cannot be written."""
    inside = output.resolve()
    if folder.resolve() in (inside, *inside.parents):
        raise ConfigError(f"{flag} {output} is inside the model {folder}: choose a folder elsewhere")
    if output.exists():
        raise ConfigError(f"{flag} {output} exists: remove it, or choose another name")
    check_writable(output.parent)


def check_scale(scale: float) -> None:
    """Raises ConfigError for a --scale that is NaN or infinite."""
    if not math.isfinite(scale):
        raise ConfigError(f"--scale must be a finite number, got {scale}")


def write_merged(
    folder: Path, output: Path, model: paddle.nn.Layer, check: Callable[[Path], Checked]
) -> Checked:
    """The pipeline in `folder` as `output`, with `model` for its transformer: there whole or not at all.

    check: looks at the new folder before it takes its name; what it returns is returned, and what it raises
    leaves nothing behind.
    """
    with whole_folder(output) as draft:
        shutil.copytree(folder, draft, ignore=partial(left_out, folder), dirs_exist_ok=True)
        save_diffusers_model(model, draft / "transformer")
        return check(draft)


def check_fits(lora: LoRAFile, folder: Path) -> None:
    """Raises ConfigError if the transformer in `folder` lacks a Linear of the LoRA or has another size."""
    infos = tensor_infos(folder)
    absent = [path for path in lora.modules if f"{path}.weight" not in infos]
    if absent:
        listed = ", ".join(absent[:10])
        raise ConfigError(f"{folder} lacks {len(absent)} of the LoRA's {len(lora.modules)} modules: {listed}")
    for path, module in lora.modules.items():
        info, wanted = infos[f"{path}.weight"], [module.b.shape[0], module.a.shape[1]]
        shape = info.shape if info.torch_layout else info.shape[::-1]
        if shape != wanted:
            raise ConfigError(
                f"{path} is {shape} [out, in] in {folder}, in the LoRA {wanted}: they are not of one model"
            )


def base_dtype(folder: Path) -> tuple[str, float]:
    """The dtype of a component's weights and its unit roundoff. Raises ConfigError for several, and for one
    that cannot be added to."""
    found = set()
    for file in {info.file for info in tensor_infos(folder).values()}:
        with safe_open(str(file), framework="np") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    if len(found) != 1 or not found <= ROUNDING.keys():
        raise ConfigError(
            f"{folder} has weights of {', '.join(sorted(found))}, wanted one of {', '.join(ROUNDING)}: "
            "merge into the original model"
        )
    return ROUNDING[found.pop()]


def left_out(folder: Path, path: str, names: list[str]) -> list[str]:
    """Names not to copy: the transformer, also as the one file that FLUX repositories hold at their top."""
    if Path(path) != folder:
        return []
    return [
        name for name in names if name == "transformer" or name.endswith(".safetensors") or name[0] == "."
    ]


def check_merged(folder: Path, merged: Path, linears: set[str], added: Added) -> float:
    """Compare both folders' transformers, tensor by tensor: they must differ by delta-W, rounded once.

    Returns ||difference - delta-W|| / ||delta-W||, all weights together. Raises OSError for a file that does
    not hold that.
    """
    before = tensor_infos(folder / "transformer")
    missed = total = 0.0
    for name, tensor in read_tensors(tensor_infos(merged / "transformer"), linears):
        written = tensor.astype("float32").numpy()
        (_, base), *_ = read_tensors({name: before[name]}, linears)
        off = written - base.astype("float32").numpy()
        module, size, allowed = added.lora.modules.get(name.removesuffix(".weight")), 0.0, 0.0
        if module is not None and name in linears:
            delta = module.a.T @ (module.b.T * np.float32(module.scale * added.scale))
            off, size = off - delta, float(np.linalg.norm(delta))
            allowed = 2 * added.unit * float(np.linalg.norm(written)) + 1e-6 * size
        if not np.linalg.norm(off) <= allowed:
            raise OSError(f"{name} in {merged} is not what was to be written; nothing was saved")
        missed, total = math.hypot(missed, float(np.linalg.norm(off))), math.hypot(total, size)
    return missed / total if total else 0.0
