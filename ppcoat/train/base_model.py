"""The frozen FLUX of a run, in the order that needs least memory: the encoders come, encode and leave, and
only then does the transformer come, in FP8 and with swapped blocks if the config asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle

from ppcoat.config.schema import RunConfig
from ppcoat.data.cache import folder_identity
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.transformer import FluxTransformer2DModel
from ppcoat.models.loading import load_transformer, unfilled
from ppcoat.models.quantized_base import FP8Copy, load_fp8_transformer
from ppcoat.nn.swap import last_blocks
from ppcoat.train.ranks import Ranks


def check_swap(config: RunConfig) -> None:
    """Raise ConfigError for more model.blocks_to_swap than there are blocks, before any weight is read."""
    if config.model.blocks_to_swap:
        model, _ = unfilled(FluxTransformer2DModel, Path(config.model.name_or_path) / "transformer")
        last_blocks(model, config.model.blocks_to_swap)


def load_encoders(config: RunConfig, dtype: str | None) -> FluxPipeline:
    """The pipeline without its transformer, in `dtype` (None: float32 on CPU, bfloat16 on a GPU)."""
    return FluxPipeline.from_pretrained(config.model.name_or_path, dtype, without=("transformer",))


def exchange_for_transformer(
    pipeline: FluxPipeline, config: RunConfig, dtype: str | None, ranks: Ranks, keep_copy: bool = True
) -> None:
    """Drop the text encoders, send the VAE away (it stays for previews only), load the transformer.

    With model.quantize its Linears are in FP8, and the FP8 weights are kept for the next start (unless
    keep_copy is off); the first rank writes them.
    """
    drop_encoders(pipeline, ("text_encoder", "text_encoder_2"), config.sample.wanted)
    pipeline.transformer = load_base(load_transformer, load_fp8_transformer, config, dtype, ranks, keep_copy)


def load_base(
    plain: Callable[..., paddle.nn.Layer],
    in_fp8: Callable[..., paddle.nn.Layer],
    config: RunConfig,
    dtype: str | None,
    ranks: Ranks,
    keep_copy: bool,
) -> paddle.nn.Layer:
    """The transformer by plain(folder, dtype) or, with model.quantize, by in_fp8(folder, dtype, copy,
    blocks_to_swap); the copy is the first rank's to write, None without keep_copy."""
    folder = Path(config.model.name_or_path) / "transformer"
    if not config.model.quantize:
        return plain(folder, dtype)
    copy = fp8_copy_of(config) if keep_copy else None
    with ranks.first_ahead():
        return in_fp8(folder, dtype, copy, config.model.blocks_to_swap)


def fp8_copy_of(config: RunConfig) -> FP8Copy:
    """Where the FP8 weights of the config's transformer are kept for the next start. Reads pieces of the
    model's files, to know whose copy it is."""
    model = Path(config.model.name_or_path)
    source = folder_identity(model / "transformer")
    return FP8Copy.beside_or_in(model, config.cache_folder, source, config.model.quantized_beside_model)


def drop_encoders(pipeline: Any, names: tuple[str, ...], keep_vae: bool) -> None:
    """Take these parts out of a pipeline (from here on, all text comes from the cache) and give their memory
    back. keep_vae: it waits in main memory instead of leaving too."""
    for name in (*names, *(() if keep_vae else ("vae",))):
        setattr(pipeline, name, None)
    if _on_gpu():
        if keep_vae:
            pipeline.vae.to("cpu")
        paddle.device.cuda.empty_cache()


@contextmanager
def vae_on_device(pipeline: Any) -> Iterator[None]:
    """Within it, the VAE is where the transformer is; afterwards in main memory."""
    if not _on_gpu():
        yield
        return
    pipeline.vae.to(paddle.get_device())
    try:
        yield
    finally:
        pipeline.vae.to("cpu")


def _on_gpu() -> bool:
    return paddle.get_device().startswith("gpu")
