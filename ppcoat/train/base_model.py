"""The frozen base of a run: loaded in the order that needs least memory (the encoders come, encode and leave,
and only then does the transformer come, in FP8 and with swapped blocks if the config asks for it), and known
again by its content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.device import on_gpu
from ppcoat.models.fingerprint import Fingerprints, folder_identity
from ppcoat.models.quantized_base import QuantizedCopy
from ppcoat.models.tensor_files import Component


def quantized_copy_of(config: RunConfig) -> QuantizedCopy:
    """Where the quantised weights of the config's transformer are kept for the next start. Pieces of the
    model's files are read, to know whose copy it is."""
    model = Path(config.model.name_or_path)
    source = folder_identity(_weights(model), times=True)
    beside_model = config.model.quantized_beside_model
    return QuantizedCopy.beside_or_in(model, config.cache_folder, source, beside_model, config.model.quantize)


def fingerprints(config: RunConfig, parts: Mapping[str, Component]) -> dict[str, str]:
    """{part: what stands for every byte of it}, kept in the run folder for the next start."""
    return Fingerprints(config.run_dir / "weights.json").of(parts)


def base_identity(model: str | Path) -> str:
    """16 hex digits that stand for the weights of a model's transformer, wherever its folder or file is;
    pieces of its files are read. Checkpoints of earlier versions know their base by it."""
    return folder_identity(_weights(Path(model)))[:16]


def compatible(config: RunConfig, modules: list[str] | None = None) -> dict:
    """What a checkpoint must share with the run that resumes from it, beside the weights of the base; all
    else may change. modules: that have an adapter, None: not known yet."""
    network = config.network
    adapter: dict[str, Any] = {"linear": network.linear, "linear_alpha": network.linear_alpha}
    adapter |= {} if modules is None else {"modules": modules}
    if network.type != "lora":
        adapter["type"] = network.kind
    optimizer = {"fp8": config.uses_fp8_optimizer}
    if config.train.optimizer not in ("adamw", "coat_fp8_adamw"):  # which differ in "fp8" only
        optimizer["name"] = config.train.optimizer
    if config.uses_fp8_optimizer:
        optimizer |= config.coat.optimizer.model_dump()
    return {"network": adapter, "optimizer": optimizer}


def _weights(model: Path) -> Path:
    """The folder of a model's transformer, or the file that was given as the model."""
    return model / "transformer" if (model / "transformer").is_dir() else model


def load_encoders(kind: Any, model: Any, dtype: str | None, streamed: str | None) -> Any:
    """The pipeline of this class without its transformer, in `dtype`. streamed: name of the text encoder
    whose blocks are on the device only while they compute; no part is there before it computes then."""
    pipeline = kind.from_pretrained(model, dtype, without=("transformer",), offload=streamed is not None)
    if streamed:
        pipeline.enable_block_swap(part=streamed)
        pipeline.enable_model_cpu_offload()
    return pipeline


def drop_encoders(pipeline: Any, names: tuple[str, ...], keep_vae: bool) -> None:
    """Take these parts out of a pipeline (from here on, all text comes from the cache) and give their memory
    back. keep_vae: it waits in main memory instead of leaving too."""
    pipeline.drop_parts(*names, *(() if keep_vae else ("vae",)))
    if on_gpu():
        if keep_vae:
            pipeline.vae.to("cpu")
        paddle.device.cuda.empty_cache()


@contextmanager
def vae_on_device(pipeline: Any) -> Iterator[None]:
    """Context manager: the VAE is where the transformer is; afterwards in main memory."""
    if not on_gpu():
        yield
        return
    pipeline.vae.to(paddle.get_device())
    try:
        yield
    finally:
        pipeline.vae.to("cpu")
