"""What differs from model to model in an adapter run: a ModelSpec each (flux.py and newbie.py), which run.py
looks up by `model.family`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.data.examples import Example
from ppcoat.models.tensor_files import Component
from ppcoat.objective import Objective
from ppcoat.plan.phases import MemoryModel
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights


class ModelSpec(ABC):
    """What a run needs to know of its model. A pipeline has `vae`, `transformer` (None until it is loaded)
    and encode_image."""

    config_format: ClassVar[Literal["yaml", "toml"]]  # in which a plan gives its advice
    memory_model: ClassVar[type[MemoryModel]]  # what a run holds, phase by phase
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

    @abstractmethod
    def load_base(
        self, pipeline: Any, config: RunConfig, dtype: str | None, ranks: Ranks, keep_copy: bool = True
    ) -> None:
        """Drop the text encoders, send the VAE away (it stays for previews only), load the transformer.

        With model.quantize its Linears are in FP8, and the first rank keeps a copy of them for the next start
        (unless keep_copy is off).
        """

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
