"""What differs from model to model in an adapter run: a ModelSpec each (flux.py and newbie.py), which run.py
looks up by `model.family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.data.examples import Example
from ppcoat.models.tensor_files import Component
from ppcoat.objective import Objective
from ppcoat.plan.phases import MemoryModel
from ppcoat.train.base_model import drop_encoders, fingerprints, quantized_copy_of
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights


class ModelSpec(ABC):
    """What a run needs to know of its model. A pipeline has `vae`, `transformer` (None until it is loaded)
    and encode_image."""

    config_format: ClassVar[Literal["yaml", "toml"]]  # in which a plan gives its advice
    memory_model: ClassVar[type[MemoryModel]]  # what a run holds, phase by phase
    text_encoders: ClassVar[tuple[str, ...]]  # parts of the pipeline that leave when all is encoded
    # The transformer of (component, dtype) as it is, and of (component, dtype, copy, blocks_to_swap, format)
    # with quantised Linears.
    load_plain: ClassVar[Callable[..., paddle.nn.Layer]]
    load_quantized: ClassVar[Callable[..., paddle.nn.Layer]]
    preview_negatives: ClassVar[tuple[str, ...]] = ()  # prompts that previews need beside their own

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raise ConfigError for a wrong folder or setting, before any weight is read."""

    @abstractmethod
    def unfilled(self, config: RunConfig) -> paddle.nn.Layer:
        """The transformer with parameters that have a shape and no memory."""

    @abstractmethod
    def parts(self, config: RunConfig) -> dict[str, Component]:
        """The components on whose contents the result depends, by name. What only draws is not among them."""

    def check_captions(self, config: RunConfig, captions: Sequence[str]) -> None:
        """Warn of captions that are cut, and raise ConfigError for those that cannot be read."""
        return None  # a model whose encoders cut reads any

    def check_examples(self, config: RunConfig, examples: Sequence[Example]) -> None:
        """Raise ConfigError for examples that lack what the model is given beside the noise."""
        return None  # most are given nothing that an example may lack

    @abstractmethod
    def load_encoders(self, config: RunConfig, dtype: str | None) -> Any:
        """The pipeline without its transformer, in `dtype` (None: float32 on CPU, bfloat16 on a GPU)."""

    @abstractmethod
    def encoders(self, config: RunConfig, pipeline: Any) -> Encoders:
        """What encodes pictures and captions, with the identities that a cache on disk needs."""

    def identities(self, config: RunConfig) -> tuple[str, str]:
        """What stands for the VAE and for the text encoders in the keys of a cache on disk; without one, for
        which files are read, nothing."""
        if not any(data.cache_to_disk for data in config.datasets):
            return "", ""
        parts = self.parts(config)
        del parts["transformer"]
        known = fingerprints(config, parts)
        return known.pop("vae"), " ".join(known.values())

    def load_base(
        self, pipeline: Any, config: RunConfig, dtype: str | None, ranks: Ranks, keep_copy: bool = True
    ) -> None:
        """Drop the text encoders, send the VAE away (it stays for previews only), load the transformer.

        With model.quantize its Linears are in that format, and the first rank keeps a copy of them for the
        next start (unless keep_copy is off).
        """
        drop_encoders(pipeline, self.text_encoders, config.sample.wanted)
        component, model = self.parts(config)["transformer"], config.model
        if not model.quantize:
            pipeline.transformer = self.load_plain(component, dtype)
            return
        copy = quantized_copy_of(config) if keep_copy else None
        with ranks.first_ahead():
            pipeline.transformer = self.load_quantized(
                component, dtype, copy, model.blocks_to_swap, model.quantize
            )

    @abstractmethod
    def objective(self, config: RunConfig) -> Objective:
        """What the steps of this run minimise."""

    @abstractmethod
    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """What writes the adapter of a step; see Trainer."""

    @abstractmethod
    def draw(
        self, config: RunConfig, pipeline: Any, preview: PreviewConfig, cache: TrainingCache
    ) -> list[Image.Image]:
        """One preview from cached text."""
