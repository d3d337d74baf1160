"""LoRA steps on a FLUX of FLUX.1-dev's size with a quantised base, on a CPU, with random weights.

    python -m ppcoat benchmark full_size --steps 2

Writes a transformer folder of 23.8 GB (three shards, bfloat16) and its quantised copy (6.7 GB as FP4, 11.9 as
FP8), or uses those of an earlier call; trains on random latents of a picture of 128 x 128 pixels and random
text embeddings, so that no encoder is needed; writes one LoRA file and loads it again. Prints seconds and the
peak memory of the whole process beside what `plan` says, and writes them as JSON. It takes tens of minutes.

Nothing need be downloaded: the folder has the layout of a real one, with the names, shapes, bfloat16 and
shards of a FluxTransformer2DModel with the given settings. Linear weights are normal with a standard
deviation of 1 / sqrt(in), so that each layer's output is about as large as its input; biases are 0 and norm
weights 1. The folder is written once; a later call recognises it by the headers of its shards.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
import zlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import paddle

from ppcoat.atomic import write_text
from ppcoat.bench.flags import PIXELS, FullSizeCase, FullSizeFlags
from ppcoat.config.flags import from_flags
from ppcoat.data.cache import TrainingCache
from ppcoat.data.examples import Example
from ppcoat.data.sources import Item
from ppcoat.device import HostMeter, set_device, tune_host
from ppcoat.errors import ConfigError
from ppcoat.lora import load_lora, lora_modules, remove_lora
from ppcoat.models.fingerprint import folder_identity
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import linear_weights
from ppcoat.models.quantized_base import QuantizedCopy, load_quantized_transformer, quantized_model_bytes
from ppcoat.models.tensor_files import tensor_infos
from ppcoat.models.writing import INDEX, Layout, check_room, layout_bytes, shard_metadata, write_component
from ppcoat.nn.base_weight import BASES
from ppcoat.plan import GB
from ppcoat.plan.phases import MemoryModel
from ppcoat.plan.settings import as_given
from ppcoat.reading import read_json
from ppcoat.train.flux import FluxSpec
from ppcoat.train.run import build_trainer
from ppcoat.train.trainer import Trainer

LATENT_SIDE = 16  # of the latents of a picture
CAPTION = "random"
_log = logging.getLogger(__name__)

_RANDOM = "random weights"  # first words of `source` in a shard's header
_ELSEWHERE = "name another folder, or remove it"
CHUNK = 1 << 23  # numbers drawn at a time


def run_command(arguments: argparse.Namespace) -> None:
    case, flags = from_flags(FullSizeCase, arguments), from_flags(FullSizeFlags, arguments)
    if flags.output.suffix != ".json":
        raise ConfigError(f"--output must name a .json file, got {flags.output}")
    tune_host()
    report = full_size(case)
    write_text(flags.output, json.dumps(report, indent=1) + "\n")
    print(full_size_summary(report))
    if flags.delete:
        delete(case)


def full_size(case: FullSizeCase) -> dict:
    """Write the weights, load and train, write and load the LoRA -> all numbers, as JSON values. Prints a
    line after each part.

    Raises ConfigError for a full disk or a wrong folder, FloatingPointError for a loss that is not finite.
    """
    set_device("cpu")
    config, report, watch = case.config(), {"case": asdict(case) | {"folder": str(case.folder)}}, _Watch()
    planned = planned_phases(case)
    report["planned"] = {phase.name: phase.parts | {"total": phase.total} for phase in planned}
    written = ensure_random_transformer(case.weights, case.settings, case.seed, _copy_bytes(planned, case))
    report["weights"] = watch.note("random weights", "written" if written else "found")
    copy = QuantizedCopy.beside_or_in(
        case.folder, config.cache_folder, folder_identity(case.weights, times=True), True, case.base
    )
    had_copy = copy.is_usable()
    transformer = load_quantized_transformer(case.weights, copy=copy, base=case.base)
    report["loading"] = watch.note(
        f"{case.base} base loaded", "from its copy" if had_copy else "quantised, copied"
    )
    report["quantized_model_bytes"] = quantized_model_bytes(transformer)
    trainer = build_trainer(FluxSpec(), config, SimpleNamespace(transformer=transformer), random_cache(case))
    watch.note("LoRA and optimizer made")
    report["steps"] = []
    for number in range(1, case.steps + 1):
        result = trainer.train_step()
        if result.skipped:
            raise FloatingPointError(f"step {number}: loss {result.loss} or its gradient is not finite")
        timing = watch.note(f"step {number}", f"loss {result.loss:.4f}")
        report["steps"].append({**timing, "loss": result.loss, "bytes_kept": result.saved.bytes_kept})
    report["lora"] = save_and_load(trainer, transformer) | watch.note("LoRA written and loaded again")
    report["peak_bytes"], report["planned_peak_bytes"] = watch.peak(), max(phase.total for phase in planned)
    return report


def planned_phases(case: FullSizeCase) -> list:
    """Phases of the plan in which the transformer trains; this command loads no encoder."""
    memory = MemoryModel(case.config(), on_gpu=False, transformer=case.settings)
    settings = as_given(memory.config, len(memory.model.blocks))
    return [phase for phase in memory.phases(settings) if "gradients" in phase.parts]


def random_cache(case: FullSizeCase) -> TrainingCache:
    """One picture and one caption: instead of encodings normal random numbers, float32 of the same shapes."""
    rng, settings = np.random.default_rng([case.seed, 1]), _settings(case)

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32))

    item = Item(Path("random"), CAPTION, PIXELS, PIXELS)
    latent = normal(settings["in_channels"] // 4, LATENT_SIDE, LATENT_SIDE)
    embeds = normal(case.text_tokens, settings["joint_attention_dim"])
    embedding = embeds, normal(settings["pooled_projection_dim"])
    return TrainingCache([Example(item, (PIXELS, PIXELS), (CAPTION,))], [latent], {CAPTION: embedding})


def save_and_load(trainer: Trainer, transformer: FluxTransformer2DModel) -> dict:
    """Write the LoRA file, load it into the same base instead of the trained LoRA, and assert that both are
    equal -> file, bytes, number of modules."""
    trained = lora_modules(transformer)
    trainer.config.run_dir.mkdir(parents=True, exist_ok=True)
    path, _ = trainer.save_weights(trainer.step, True)[0]
    remove_lora(transformer)
    load_lora(transformer, path)
    loaded = lora_modules(transformer)
    assert list(loaded) == list(trained)
    for name, module in trained.items():
        np.testing.assert_array_equal(loaded[name].a, module.a, err_msg=name)
        np.testing.assert_array_equal(loaded[name].b, module.b, err_msg=name)
    return {"file": str(path), "bytes": path.stat().st_size, "modules": len(loaded)}


def delete(case: FullSizeCase) -> None:
    """Remove the files of this command, and the folder if it is then empty."""
    for name in (case.weights.name, *(f"transformer-{base}" for base in BASES), case.config().name):
        shutil.rmtree(case.folder / name, ignore_errors=True)
    if case.folder.exists() and not any(case.folder.iterdir()):
        case.folder.rmdir()


def full_size_summary(report: dict) -> str:
    """The numbers as text."""
    steps, lora = report["steps"], report["lora"]
    peak, planned = report["peak_bytes"], report["planned_peak_bytes"]
    measured = "not told by this system" if peak is None else f"{peak / GB:.2f} GB"
    return "\n".join(
        [
            "",
            f"{report['case']['base']} base {report['quantized_model_bytes'] / GB:.2f} GB, "
            f"{report['loading']['what']} in {report['loading']['seconds']:.0f} s",
            f"steps: {', '.join(format(step['seconds'], '.0f') for step in steps)} s; losses "
            f"{', '.join(format(step['loss'], '.4f') for step in steps)}; kept for backward "
            f"{steps[-1]['bytes_kept'] / GB:.3f} GB",
            f"LoRA of {lora['modules']} Linears, {lora['bytes'] / 1e6:.0f} MB, equal after loading: "
            f"{lora['file']}",
            f"peak memory of the whole process: {measured}; planned for the steps: {planned / GB:.2f} GB",
        ]
    )


class _Watch:
    """Measures seconds since the last note, and the peak of resident memory."""

    def __init__(self) -> None:
        self._meter, self._peak, self._began = HostMeter(), 0, time.perf_counter()

    def peak(self) -> int | None:
        """Peak bytes, None if the system does not tell; never decreasing, though the kernel's number may."""
        now = self._meter.peak_memory()
        self._peak = max(self._peak, now or 0)
        return self._peak or None

    def note(self, part: str, what: str = "") -> dict:
        """Print and return: what, seconds, peak_bytes."""
        seconds, peak = time.perf_counter() - self._began, self.peak()
        shown = "" if peak is None else f"; peak so far {peak / GB:.2f} GB"
        print(f"{part}{', ' * bool(what)}{what}: {seconds:.1f} s{shown}", flush=True)
        self._began = time.perf_counter()
        return {"what": what, "seconds": seconds, "peak_bytes": peak}


def _settings(case: FullSizeCase) -> dict:
    """All settings of the transformer, including defaults."""
    with paddle.LazyGuard():
        return dict(FluxTransformer2DModel(**case.settings).config)


def _copy_bytes(planned: list, case: FullSizeCase) -> int:
    """Bytes that the quantised copy will take on the disk; 0 if there is one."""
    exists = (case.folder / f"transformer-{case.base}").exists()
    return 0 if exists else max(phase.parts["base"] for phase in planned)


def ensure_random_transformer(folder: Path, settings: dict, seed: int = 0, beside: int = 0) -> bool:
    """Write the folder of a FluxTransformer2DModel(**settings) unless it exists -> True if it was written.

    beside: bytes that must be free on the disk in addition to the weights. A folder of other settings, of
    another seed or with damaged files is written again, with a warning; drafts of a killed process are
    removed. Raises ConfigError, before anything is written, if the disk has too little room, and for a folder
    with files that are not of random weights.
    """
    config, names, layout = _layout_of(settings)
    stamp = f"{_RANDOM}, seed {seed}, {json.dumps(settings, sort_keys=True)}"
    advice = "make room there, or name another folder"
    if _is_complete(folder, layout, stamp):
        check_room(folder.parent, beside, "the run takes", advice)
        return False
    present = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.exists() else 0
    wanted = max(0, layout_bytes(layout) + beside - present)
    check_room(folder.parent, wanted, "the random weights and what comes beside them take", advice)
    if present:  # the disk may not have room for the old folder beside the new one
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
    """True if the headers and sizes of the folder's files are those that would be written."""
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
    """`source` in the headers of its shards. Raises ConfigError if any file was not written by this command,
    so that no model of a user is overwritten.
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
    """A bfloat16 tensor as uint16 of this shape. Each tensor has a generator of its own."""
    if not is_linear:
        return _bfloat16(np.full(shape, 0.0 if name.endswith("bias") else 1.0, "float32"))
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    table = _bfloat16(_normal_quantiles() * np.float32(shape[1] ** -0.5))
    flat = np.empty(int(np.prod(shape)), "uint16")
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        part[:] = table[rng.integers(0, table.size, part.size, dtype=np.uint16)]
    return flat.reshape(shape)


@cache
def _normal_quantiles() -> np.ndarray:
    """float32 [65536]: equally likely values of a normal number. A lookup is five times faster than a
    draw."""
    normal, count = NormalDist(), 1 << 16
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)], "float32")


def _bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16 of the same shape, rounded to nearest (ties away from zero)."""
    return ((numbers.view("uint32") + 0x8000) >> 16).astype("uint16")
