"""What differs from model to model in an adapter run: a ModelSpec each (flux.py and newbie.py), looked up by
`model_spec`. And `prepare`, which makes any transformer ready to train.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import paddle
from PIL import Image

from ppcoat.config.schema import ModelConfig, NetworkConfig, PreviewConfig, RunConfig
from ppcoat.data.cache import Encoders, TrainingCache
from ppcoat.errors import ConfigError
from ppcoat.lora import LoKrSettings, inject_lokr, inject_lora
from ppcoat.lora.layer import target_paths
from ppcoat.nn.convert import multiply_in_fp8
from ppcoat.nn.swap import last_blocks, swap_blocks
from ppcoat.train.coat import COATTrainer
from ppcoat.train.objective import Objective
from ppcoat.train.ranks import Ranks
from ppcoat.train.trainer import SaveWeights


def model_spec(family: str) -> ModelSpec:
    """The spec of that `model.family`. Its module, and with it the model's, is imported only now."""
    if family == "flux":
        from ppcoat.train.flux import FluxSpec

        return FluxSpec()
    assert family == "newbie", "the schema knows no other"
    from ppcoat.train.newbie import NewbieSpec

    return NewbieSpec()


class ModelSpec(ABC):
    """What a run needs to know of its model. A pipeline has `vae`, `transformer` (None until it is loaded)
    and encode_image."""

    script: ClassVar[str]  # that trains it
    config_format: ClassVar[Literal["yaml", "toml"]]  # in which a plan gives its advice
    preview_negatives: ClassVar[tuple[str, ...]] = ()  # prompts that previews need beside their own

    @abstractmethod
    def memory_model(self, config: RunConfig, on_gpu: bool) -> Any:
        """What the run will hold, phase by phase: a plan.phases.MemoryModel."""

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Raise ConfigError for a wrong folder or setting, before any weight is read."""

    def check_captions(self, config: RunConfig, captions: Sequence[str]) -> None:
        """Warn of captions that are cut, and raise ConfigError for those that cannot be read."""
        return None  # a model whose encoders cut reads any

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
    def draw(self, pipeline: Any, preview: PreviewConfig, cache: TrainingCache) -> list[Image.Image]:
        """One preview from cached text."""


def prepare(
    transformer: paddle.nn.Layer,
    coat: COATTrainer,
    network: NetworkConfig | None,
    model: ModelConfig | None = None,
    paths: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, paddle.nn.Layer]:
    """Make a transformer ready to train, in place: adapter, COAT, swapped blocks, training mode -> {path:
    adapter layer}.

    network: the adapter, for which all else is frozen; None: all parameters train. paths: of the Linears that
    get it, by default those that `network` chooses. model: whether FP8 weights multiply in FP8
    (quantize_matmul), and blocks_to_swap. seed: of the adapter's first values.
    """
    if model is not None and model.quantize_matmul:
        multiply_in_fp8(transformer)
    modules = {}
    if network is not None:
        paths = chosen_modules(network, transformer) if paths is None else paths
        modules = _put_adapter(transformer, coat, network, paths, seed)
    coat.convert(transformer)
    if model is not None and model.blocks_to_swap:
        swap_blocks(list(last_blocks(transformer, model.blocks_to_swap).values()))
    transformer.train()
    return modules


def _put_adapter(
    transformer: paddle.nn.Layer,
    coat: COATTrainer,
    network: NetworkConfig,
    paths: Sequence[str],
    seed: int,
) -> dict[str, paddle.nn.Layer]:
    if network.type == "lokr":
        return inject_lokr(
            transformer,
            LoKrSettings(network.linear, network.linear_alpha, network.lokr_factor),
            paths,
            (network.lokr_rank_dropout, network.lokr_module_dropout),
            seed,
        )
    return inject_lora(
        transformer,
        rank=network.linear,
        alpha=network.linear_alpha,
        dropout=network.dropout,
        targets=paths,
        policy=coat.policy,
        seed=seed,
        group_size=coat.linear_group_size,
    )


def trained_parameters(modules: dict[str, paddle.nn.Layer]) -> dict[str, paddle.Tensor]:
    """What trains of the adapter layers that `prepare` gives, any shape, by path in the transformer."""
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
