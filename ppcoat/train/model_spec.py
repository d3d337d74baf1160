"""What an adapter run needs to know of its model (flux.py and newbie.py hold one each), and which Linears of
a transformer get an adapter, by the config's filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import paddle
from PIL import Image

from ppcoat.config.schema import NetworkConfig, PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.errors import ConfigError
from ppcoat.lora import LoKrSettings, inject_lokr, inject_lora
from ppcoat.lora.layer import target_paths
from ppcoat.nn.convert import multiply_in_fp8
from ppcoat.train.objective import Objective
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights


class ModelSpec(Protocol):
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

    def save_weights(self, config: RunConfig, transformer: paddle.nn.Layer) -> SaveWeights:
        """What writes the adapter of a step; see Trainer."""

    def draw(self, pipeline: Any, preview: PreviewConfig, cache: TrainingCache) -> list[Image.Image]:
        """One preview from cached text."""


def put_adapter(
    config: RunConfig, transformer: paddle.nn.Layer, policy: str, group_size: int | None
) -> dict[str, paddle.nn.Layer]:
    """Freeze `transformer` and put the adapter of section `network` on it -> {path: adapter layer}.

    policy, group_size: how a LoRA keeps its input for backward, see inject_lora. With model.quantize_matmul
    the FP8 weights under it multiply in FP8.
    """
    if config.model.quantize_matmul:
        multiply_in_fp8(transformer)
    network = config.network
    paths = chosen_modules(network, transformer)
    if network.type == "lokr":
        return inject_lokr(
            transformer,
            LoKrSettings(network.linear, network.linear_alpha, network.lokr_factor),
            paths,
            (network.lokr_rank_dropout, network.lokr_module_dropout),
            config.seed,
        )
    return inject_lora(
        transformer,
        rank=network.linear,
        alpha=network.linear_alpha,
        dropout=network.dropout,
        targets=paths,
        policy=policy,
        seed=config.seed,
        group_size=group_size,
    )


def trained_parameters(modules: dict[str, paddle.nn.Layer]) -> dict[str, paddle.Tensor]:
    """What trains of the adapter layers that `put_adapter` gives, by path in the transformer."""
    return {
        f"{path}.{name}": parameter
        for path, layer in modules.items()
        for name, parameter in layer.named_parameters()
        if not parameter.stop_gradient
    }


def chosen_modules(network: NetworkConfig, transformer: paddle.nn.Layer) -> list[str]:
    """Paths of the Linears that get a LoRA. Raises ConfigError if the filters leave none."""
    all_paths = target_paths(transformer, network.targets)
    paths = [p for p in all_paths if _is_in_range(p, network, transformer)]
    if network.only_if_contains:
        paths = [p for p in paths if any(part in f"transformer.{p}" for part in network.only_if_contains)]
    if network.ignore_if_contains:
        paths = [
            p for p in paths if not any(part in f"transformer.{p}" for part in network.ignore_if_contains)
        ]
    if not paths:
        raise ConfigError(
            f"network: only_if_contains {network.only_if_contains}, ignore_if_contains "
            f"{network.ignore_if_contains} and the ranges of blocks leave no module; "
            f"names look like transformer.{all_paths[0]}"
        )
    return paths


def _is_in_range(path: str, network: NetworkConfig, transformer: paddle.nn.Layer) -> bool:
    """Whether network.double_blocks and network.single_blocks let the LoRA onto this Linear. Raises
    ConfigError for a range beyond the blocks of the model."""
    kinds = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
    blocks, _, rest = path.partition(".")
    wanted = getattr(network, kinds[blocks]) if blocks in kinds else None
    if wanted is None:
        return True
    count = len(getattr(transformer, blocks))
    if wanted and wanted[1] >= count:
        raise ConfigError(
            f"network.{kinds[blocks]}: came {list(wanted)}, but this model has {count}: 0 to {count - 1}"
        )
    return bool(wanted) and wanted[0] <= int(rest.partition(".")[0]) <= wanted[1]
