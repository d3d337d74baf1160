"""What an adapter run needs to know of its model; flux_lora.py and newbie_lora.py hold one each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import paddle
from PIL import Image

from ppcoat.config.schema import PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.train.objective import Objective
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights


class Family(Protocol):
    """What a run needs to know of its model. A pipeline has `vae`, `transformer` (None until it is loaded)
    and encode_image."""

    preview_negatives: tuple[str, ...]  # prompts that previews need beside their own

    def with_memory_plan(self, config: RunConfig) -> RunConfig:
        """What `memory: auto` makes of a config."""

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError for a wrong folder or setting, before any weight is read."""

    def check_captions(self, config: RunConfig, captions: Sequence[str]) -> None:
        """Warn of captions that are cut, and raise ConfigError for those that cannot be read."""

    def load_encoders(self, config: RunConfig, dtype: str | None) -> Any:
        """The pipeline without its transformer."""

    def encoders(self, config: RunConfig, pipeline: Any) -> Encoders:
        """What encodes pictures and captions, with the identities that a cache on disk needs."""

    def exchange_for_transformer(
        self, pipeline: Any, config: RunConfig, dtype: str | None, ranks: Ranks, keep_copy: bool = True
    ) -> None:
        """Drop the text encoders and load the transformer."""

    def objective(self, config: RunConfig) -> Objective:
        """What the steps of this run minimise."""

    def set_up_checkpointing(self, config: RunConfig, transformer: paddle.nn.Layer) -> None:
        """Gradient checkpointing where the COAT policies do not bring it."""

    def last_blocks(self, transformer: paddle.nn.Layer, count: int) -> dict[str, paddle.nn.Layer]:
        """The blocks that model.blocks_to_swap means, by path."""

    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """What writes the adapter of a step; see Trainer."""

    def draw(self, pipeline: Any, preview: PreviewConfig, cache: TrainingCache) -> list[Image.Image]:
        """One preview from cached text."""
