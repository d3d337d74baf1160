"""What a distillation holds encoded: all its pictures at once, or window after window of them.

Both give the same bits, because each picture and each caption goes through the encoders alone.

Windows are encoded beside the transformer. To leave room for T5 (9.8 GB in bfloat16, with CLIP and the VAE),
frozen blocks of about that weight wait in host memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import paddle
from paddle import nn

from ppcoat.config.lightning import WINDOW, LightningConfig
from ppcoat.config.schema import RunConfig
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, TrainingCache, WindowedCache
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example
from ppcoat.device import compute_dtype
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.tensor_files import Component
from ppcoat.nn.swap import swap_blocks
from ppcoat.train.base_model import drop_encoders
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import encode_dataset, encode_for_all

AT_ONCE_BYTES = 16 * 10**9  # of host memory, of all ranks together


def encode_pictures(
    spec: OneByOne,
    config: LightningConfig,
    run: RunConfig,
    examples: list[Example],
    batches: ResumableBatches,
    pipeline: FluxPipeline,
    ranks: Ranks,
) -> TrainingCache | WindowedCache:
    """What the trainer of this run draws batches from; one line says which kind. Pictures that the run does
    not see are never encoded.

    batches: the sampler that the trainer draws from. pipeline: with its encoders, still without transformer.
    Raises ConfigError as build_cache does.
    """
    in_step = config.train_batch_size * config.gradient_accumulation_steps
    last = config.max_train_steps * config.gradient_accumulation_steps
    seen, ahead = _seen(batches, last), config.encode_ahead or max(WINDOW, in_step)
    if len(seen) <= ahead:
        return _at_once(spec, run, examples, seen, pipeline, ranks)
    kept = encode_dataset(spec, run, [examples[seen[0]]], pipeline)
    size = _bytes_of_first(kept)
    if config.encode_ahead is None and len(seen) * size * ranks.size <= AT_ONCE_BYTES:
        return _at_once(spec, run, examples, seen, pipeline, ranks)
    if ranks.is_first:
        print(
            f"encoding {ahead:,} pictures ahead on each rank ({ahead * size / 1e9:.2g} GB of host memory) of "
            f"the {len(seen):,} of this run; encoders are loaded again for each window"
        )
    weight = sum(_weight(part) for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae))
    return WindowedCache(
        examples,
        batches,
        lambda: _encoders(spec, run, pipeline, weight),
        length=ahead // in_step * config.gradient_accumulation_steps,
        last=last,
        permanent=kept,
        share=ranks.share,
        store=EmbeddingStore(run.cache_folder) if config.cache_to_disk else None,
    )


class OneByOne(FluxSpec):
    """FLUX whose encodings do not depend on what else is encoded. Matrix products of other sizes may differ
    in the last bits: measured with MKL, 1.4e-6 in T5 between one caption and eight."""

    def parts(self, config: RunConfig) -> dict[str, Component]:
        """Those of FluxSpec and the scheduler, whose shift decides the noise levels."""
        scheduler = FluxFiles.found(config.model.name_or_path, **config.model.beside)["scheduler"]
        return super().parts(config) | {"scheduler": scheduler}

    def encoders(self, config: RunConfig, pipeline: FluxPipeline) -> Encoders:
        """Those of FluxSpec, called once for each picture and for each caption."""
        several = super().encoders(config, pipeline)

        def image(pixels: paddle.Tensor) -> paddle.Tensor:
            return paddle.concat([several.image(picture.unsqueeze(0)) for picture in pixels])

        def text(captions: list[str]) -> tuple[paddle.Tensor, ...]:
            columns = zip(*(several.text([caption]) for caption in captions), strict=True)
            return tuple(paddle.concat(list(column)) for column in columns)

        return replace(several, image=image, text=text)


def blocks_to_leave(transformer: nn.Layer, swapped: int, weight: int) -> list[nn.Layer]:
    """The last blocks that weigh `weight` bytes together, or all; but for the `swapped` last ones, which are
    in host memory already."""
    blocks = list(transformer.named_blocks().values())
    chosen: list[nn.Layer] = []
    for block in reversed(blocks[: len(blocks) - swapped]):
        if weight <= 0:
            break
        chosen.insert(0, block)
        weight -= _weight(block)
    return chosen


@contextmanager
def _encoders(spec: OneByOne, run: RunConfig, pipeline: FluxPipeline, weight: int) -> Iterator[Encoders]:
    """Context manager: encoders of `weight` bytes are loaded; frozen blocks of the transformer make room."""
    swapper = swap_blocks(blocks_to_leave(pipeline.transformer, run.model.blocks_to_swap, weight))
    try:
        loaded = spec.load_encoders(run, compute_dtype(run.model.dtype))
        try:
            yield spec.encoders(run, loaded)
        finally:
            drop_encoders(loaded, spec.text_encoders, keep_vae=False)
    finally:
        swapper.remove()


def _at_once(
    spec: OneByOne,
    run: RunConfig,
    examples: list[Example],
    seen: list[int],
    pipeline: FluxPipeline,
    ranks: Ranks,
) -> TrainingCache:
    if ranks.is_first:
        print(f"encoding the {len(seen):,} pictures of this run at once")
    cache = encode_for_all(spec, run, [examples[i] for i in seen], pipeline, ranks)
    latents = dict(zip(seen, cache.latents, strict=True))
    return replace(cache, examples=examples, latents=[latents.get(i) for i in range(len(examples))])


def _seen(batches: ResumableBatches, count: int) -> list[int]:
    """Numbers of the examples in the next `count` batches, each once."""
    seen: set[int] = set()
    for batch in batches.ahead(count):
        seen.update(batch)
        if len(seen) == batches.num_examples:
            break
    return sorted(seen)


def _weight(layer: nn.Layer) -> int:
    """Bytes of its parameters and buffers."""
    return sum(x.size * x.element_size() for x in (*layer.parameters(), *layer.buffers()))


def _bytes_of_first(cache: TrainingCache) -> int:
    """Of the first picture and its captions, encoded."""
    texts = (cache.embeddings[caption] for caption in cache.examples[0].captions)
    return sum(x.size * x.element_size() for x in (cache.latents[0], *(x for text in texts for x in text)))
