"""COAT put into a model and its optimizer from outside: one object that reads the `coat` section of a config.
And `prepare`, which makes any transformer ready to train: adapter, COAT, swapped blocks.

    coat = COATTrainer(COATConfig())
    optimizer = coat.create_optimizer(lora_parameters, lr=1e-4)
    with coat.saved_tensors() as saved:
        loss = ...
    loss.backward()

COAT: arXiv 2410.19313. With `enabled: false` the same calls give AdamW and ordinary activations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import paddle
from pydantic import Field

from ppcoat.config.schema import CoatConfig, ModelConfig, NetworkConfig
from ppcoat.errors import ConfigError
from ppcoat.lora import DoRALinear, LoKrSettings, inject_lokr, inject_lora
from ppcoat.lora.layer import lora_parameters, target_paths
from ppcoat.models.blocks import BlockModel
from ppcoat.nn.convert import multiply_in_fp8, save_linears_in_fp8
from ppcoat.nn.linear import FactorCopies, LoRALinear
from ppcoat.nn.ops import look_at_weights_again
from ppcoat.nn.policy import granularity_groups
from ppcoat.nn.saved_tensors import SavedTensors, fp8_saved_tensors
from ppcoat.nn.swap import last_blocks, swap_blocks
from ppcoat.optim import FlatOptimizer, FP8AdamW, FP8QuantizationConfig

_log = logging.getLogger(__name__)


class COATConfig(CoatConfig):
    """The `coat` section of a config, switched on."""

    enabled: bool = Field(True, description="train with COAT")


class COATTrainer:
    """Chooses optimizer, saving policy and Linears of a run from its `coat` settings. It trains nothing: the
    loop is the caller's.

    gradient_checkpointing: `convert` tells the model. Blocks of FLUX and NextDiT_CLIP (the first
    coat.memory.checkpoint_blocks, or all) are computed again in backward and save their inputs only, in FP8
    if coat.memory.enable_efficient_checkpoint. Any other model checkpoints by itself; Paddle allows no second
    pair of saved-tensor hooks beside those of its recompute, so nothing is saved in FP8 or counted there.
    """

    def __init__(self, config: CoatConfig | None = None, gradient_checkpointing: bool = False):
        self.config = config if config is not None else COATConfig()
        self.gradient_checkpointing = gradient_checkpointing
        self._model_takes_hooks = gradient_checkpointing  # until `convert` meets one that does not

    @property
    def fp8_activations(self) -> bool:
        """Whether activations are saved in FP8 for backward."""
        return (
            self.config.enabled and self.config.activation.use_fp8 and self.config.activation.policy != "none"
        )

    @property
    def policy(self) -> str:
        """Name of the saving policy, "none" where FP8 activations are off."""
        return self.config.activation.policy if self.fp8_activations else "none"

    @property
    def linear_group_size(self) -> int | None:
        """Features that share one scale in the input saved for a LoRA; None: one scale per tensor."""
        return granularity_groups(
            self.config.activation.linear_granularity, self.config.activation.group_size
        )

    def convert(self, model: paddle.nn.Layer) -> paddle.nn.Layer:
        """Make `model` ready, in place; call it after inject_lora. Frozen Linears without LoRA save nothing
        for backward, the others their input in FP8; blocks are checkpointed where that is wanted.
        """
        look_at_weights_again(model)
        if self.fp8_activations:
            save_linears_in_fp8(model, self.linear_group_size)
        if isinstance(model, BlockModel):
            self._model_takes_hooks = False
            model.checkpoint_blocks = self.config.memory.checkpoint_blocks
        if self.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        return model

    def saved_tensors(self) -> AbstractContextManager[SavedTensors | None]:
        """Context for the forward pass: what autograd saves becomes FP8, or is only counted.

        Where a model takes the hooks for its own recompute nothing can be counted: the context gives None.
        """
        if self._model_takes_hooks:
            return nullcontext()
        activation = self.config.activation
        return fp8_saved_tensors(
            self.policy,
            activation.nonlinear_granularity,
            activation.group_size,
            fp8_checkpoints=self._fp8_checkpoints,
        )

    @property
    def _fp8_checkpoints(self) -> bool:
        return self.config.enabled and self.config.memory.enable_efficient_checkpoint

    def create_optimizer(
        self,
        parameters: Sequence[paddle.Tensor],
        lr: float | paddle.optimizer.lr.LRScheduler = 1e-4,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        max_grad_norm: float = 1.0,
        fp8_states: bool | None = None,
    ) -> paddle.optimizer.Optimizer:
        """FP8AdamW, or paddle's AdamW where FP8 states are off, for float parameters of any shape.
        max_grad_norm 0 clips nothing.

        fp8_states: overrides what the config says (train.optimizer: coat_fp8_adamw asks for FP8 by name).
        """
        clip = paddle.nn.ClipGradByGlobalNorm(max_grad_norm) if max_grad_norm > 0 else None
        shared = {"learning_rate": lr, "parameters": list(parameters), "beta1": betas[0], "beta2": betas[1],
                  "epsilon": epsilon, "weight_decay": weight_decay, "grad_clip": clip}  # fmt: skip
        if fp8_states is None:
            fp8_states = self.config.enabled and self.config.optimizer.use_fp8
        if not fp8_states:
            return paddle.optimizer.AdamW(**shared)
        rounding = self.config.optimizer.stochastic_rounding
        return FP8AdamW(**shared, fp8_config=state_config(self.config, True), stochastic_rounding=rounding)


def state_config(coat: CoatConfig, fp8: bool) -> FP8QuantizationConfig:
    """How optimizer states are stored under these settings: in FP8, or all in float32."""
    states = coat.optimizer
    return FP8QuantizationConfig(
        use_fp8_m1=fp8,
        use_fp8_m2=fp8,
        m1_format=states.m1_format,
        m2_format=states.m2_format,
        block_size=states.block_size,
        use_dynamic_range_expansion=states.use_dynamic_range_expansion,
    )


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
            lokr_settings(network),
            paths,
            (network.lokr_rank_dropout, network.lokr_module_dropout),
            seed,
            coat.policy,
            coat.linear_group_size,
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
        layer=DoRALinear if network.type == "dora" else LoRALinear,
    )


def lokr_settings(network: NetworkConfig) -> LoKrSettings:
    """Of the LoKrs that a config asks for."""
    return LoKrSettings(network.linear, network.linear_alpha, network.lokr_factor, network.lokr_full_rank)


def trained_parameters(modules: dict[str, paddle.nn.Layer]) -> dict[str, paddle.Tensor]:
    """What trains of the adapter layers that `prepare` gives, float32 of any shape, by path in the
    transformer."""
    return {
        f"{path}.{name}": parameter
        for path, layer in modules.items()
        for name, parameter in layer.named_parameters()
        if not parameter.stop_gradient
    }


def factor_copies(model: paddle.nn.Layer, optimizers: Sequence[paddle.optimizer.Optimizer]) -> FactorCopies:
    """For steps that train LoRAs in `model`: their factors are cast from the flat buffer of the optimizer
    that updates them all, or gathered first where none does."""
    factors = lora_parameters(model)
    wanted = set(map(id, factors))
    for optimizer in optimizers:
        if isinstance(optimizer, FlatOptimizer) and wanted <= set(map(id, optimizer.space.params)):
            return FactorCopies(factors, optimizer.space)
    return FactorCopies(factors)


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


def warn_of_rank(network: NetworkConfig, transformer: paddle.nn.Layer) -> None:
    """One line for a rank beyond the width of Linears that get a LoRA. transformer: its parameters need no
    memory. Raises ConfigError as `chosen_modules` does."""
    paths, layers = chosen_modules(network, transformer), dict(transformer.named_sublayers())
    widths = [min(layers[path].weight.shape) for path in paths]
    narrow = [width for width in widths if width < network.linear]
    if narrow and network.type != "lokr":
        _log.warning(
            "rank %d is more than the width of %d of the %d layers that get a LoRA (at the least %d): there "
            "it only takes memory and time",
            network.linear, len(narrow), len(paths), min(narrow),
        )  # fmt: skip


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
