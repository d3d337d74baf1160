"""Put a saving policy into a FLUX model from outside: each block becomes one operation with its own backward.

    apply_saving_policy(transformer, "coat+recompute")     # after inject_lora
    ...                                                    # train as before
    remove_saving_policy(transformer)

A block is recognised by its sublayers; parameters, their names and what the model computes stay the same.
Under gradient checkpointing the operation holds the block's inputs only and runs the block again in
backward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import E4M3

from .block_parts import Keeper, Tensors
from .convert import sublayer_at
from .flux_block import BlockPass, DoublePass, SinglePass
from .linear import FrozenLinear, LoRALinear
from .policy import SavingPolicy, get_policy
from .saved import record

_log = logging.getLogger(__name__)

# The names by which a block is known, the number of its token inputs, its pass.
_KINDS = (
    (("norm1", "norm1_context", "attn", "ff", "ff_context"), 2, DoublePass),
    (("norm", "attn", "proj_mlp", "proj_out"), 1, SinglePass),
)
# Largest ratio of weights of an RMSNorm at which its input can be had by dividing its output by them.
WEIGHT_RATIO = 64.0


@dataclass(frozen=True)
class BlockSaving:
    """How one block is run. checkpoint: the policy that holds its inputs, None without checkpointing."""

    kind: type[BlockPass]
    token_inputs: int
    policy: SavingPolicy
    checkpoint: SavingPolicy | None = None


def apply_saving_policy(
    model: nn.Layer, policy: SavingPolicy | str, checkpoint_blocks: int = 0, fp8_checkpoints: bool = True
) -> list[str]:
    """Set the forward of every FLUX block inside `model`, in place -> paths of blocks that stay as they are.

    policy: a name or an object, see policy.py. The first `checkpoint_blocks` blocks hold their inputs only,
    in FP8 or (fp8_checkpoints=False) as they are; the rest exists only while the block goes backward, in
    compute dtype. Call it after inject_lora, and again after a change of what is trained; a second call
    replaces the first.

    A block that trains anything but LoRAs on its attention and feed-forward Linears stays as it is, with one
    warning for all such blocks: hooks (`fp8_saved_tensors`) serve it. Raises ConfigError for an unknown
    policy, a negative checkpoint_blocks, a model without FLUX blocks or one that checkpoints by itself.
    """
    policy = get_policy(policy) if isinstance(policy, str) else policy
    if isinstance(checkpoint_blocks, bool) or not isinstance(checkpoint_blocks, int) or checkpoint_blocks < 0:
        raise ConfigError(f"checkpoint_blocks must be a whole number from 0, got {checkpoint_blocks!r}")
    if getattr(model, "gradient_checkpointing", False):
        raise ConfigError(
            "the model checkpoints its blocks by itself: call its disable_gradient_checkpointing() and give "
            "checkpoint_blocks instead"
        )
    remove_saving_policy(model)
    blocks = list(flux_blocks(model))
    if not blocks:
        raise ConfigError(f"no FLUX block inside {type(model).__name__}: use fp8_saved_tensors instead")
    inputs = replace(policy, fmt=E4M3 if fp8_checkpoints else None)
    left = {}
    for index, (path, block, saving) in enumerate(blocks):
        reason = _unusual(block, saving.kind)
        if reason:
            left[path] = reason
        elif index < checkpoint_blocks:
            block.forward = partial(_run, block, replace(saving, policy=_AS_IT_IS, checkpoint=inputs))
        elif policy.name != "none":
            block.forward = partial(_run, block, replace(saving, policy=_fitting(block, policy)))
    if left and (policy.name != "none" or checkpoint_blocks):
        first, reason = next(iter(left.items()))
        _log.warning(
            "%d blocks do not follow the saving policy %s, because they train more than LoRAs on attention "
            "and feed-forward Linears, e.g. %s: %s", len(left), policy.name, first, reason,
        )  # fmt: skip
    return list(left)


def remove_saving_policy(model: nn.Layer) -> None:
    """Give every block its own forward back."""
    for layer in model.sublayers(include_self=True):
        forward = layer.__dict__.get("forward")
        if isinstance(forward, partial) and forward.func is _run:
            del layer.__dict__["forward"]


def flux_blocks(model: nn.Layer) -> Iterator[tuple[str, nn.Layer, BlockSaving]]:
    """(path, block, how it is run without any policy), in model order."""
    for path, layer in model.named_sublayers(include_self=True):
        for names, token_inputs, kind in _KINDS:
            if all(name in layer._sub_layers for name in names):
                yield path, layer, BlockSaving(kind, token_inputs, _AS_IT_IS)


_AS_IT_IS = SavingPolicy("none")


def _unusual(block: nn.Layer, kind: type[BlockPass]) -> str | None:
    """Why `kind` cannot stand for the block's own forward, or None."""
    linears = {path: sublayer_at(block, path) for path in kind.linear_paths}
    for path, layer in linears.items():
        if type(layer) not in (nn.Linear, FrozenLinear, LoRALinear):
            return f"{path} is a {type(layer).__name__}"
    loras = {id(p) for layer in linears.values() if isinstance(layer, LoRALinear)
             for p in (layer.lora_A, layer.lora_B)}  # fmt: skip
    for name, parameter in block.named_parameters():
        if not parameter.stop_gradient and id(parameter) not in loras:
            return f"{name} is trained"
    return None


def _fitting(block: nn.Layer, policy: SavingPolicy) -> SavingPolicy:
    """`policy`, holding queries and keys before their norm where a norm weight is too small to divide by."""
    weights = [p.abs() for name, p in block.attn.named_parameters() if name.startswith("norm_")]
    divisible = all(float(w.max()) < WEIGHT_RATIO * float(w.min()) for w in weights)
    return policy if divisible else replace(policy, rebuild_heads=False)


def _run(block: nn.Layer, saving: BlockSaving, *args: paddle.Tensor) -> paddle.Tensor | Tensors:
    """What the block's own forward returns, for its arguments: tokens, vec, cos, sin."""
    tokens, constants = args[: saving.token_inputs], args[saving.token_inputs :]
    once = _Once(block, saving, constants)
    loras = [p for use in once.uses.values() if use.needs_x for p in (use.layer.lora_A, use.layer.lora_B)]
    wanted = paddle.is_grad_enabled() and (loras or not all(x.stop_gradient for x in tokens))
    # float16 is clipped at the end of a block, and a trained vec wants gradients that a pass does not give
    if not wanted or tokens[0].dtype == paddle.float16 or not all(x.stop_gradient for x in constants):
        return type(block).forward(block, *args)
    return _BlockOperation.apply(once, *tokens, *loras)


class _Once:
    """One call of a block; also hides tensors from PyLayer.apply, which would take them for inputs."""

    def __init__(self, block: nn.Layer, saving: BlockSaving, constants: Tensors) -> None:
        self.block, self.saving, self.constants = block, saving, constants
        self.uses = saving.kind.uses_of(block)

    def run(self, tokens: Tensors) -> tuple[Tensors, BlockPass]:
        done = self.saving.kind(self.block, self.saving.policy, self.uses)
        return done.forward(*tokens, *self.constants), done


class _BlockOperation(PyLayer):
    @staticmethod
    def forward(ctx, once: _Once, *tensors: paddle.Tensor) -> paddle.Tensor | Tensors:
        tokens, checkpoint = tensors[: once.saving.token_inputs], once.saving.checkpoint
        ctx.once, ctx.token_gradients = once, [not x.stop_gradient for x in tokens]
        outputs, done = once.run(tokens)
        ctx.done = ctx.inputs = None
        if checkpoint is None:
            ctx.done, kept = done, done.keeper.kept
        else:
            keeper = Keeper(checkpoint)
            ctx.inputs = [keeper.packed(x, checkpoint.group_size) for x in tokens]
            kept = keeper.kept
        record(kept)
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx, *grads: paddle.Tensor) -> Tensors:
        done = ctx.done
        if done is None:
            _, done = ctx.once.run(tuple(x.unpack() for x in ctx.inputs))
        d_tokens = done.backward(grads, any(ctx.token_gradients))
        d_tokens = [d if wanted else None for d, wanted in zip(d_tokens, ctx.token_gradients, strict=True)]
        loras = (d for linear in done.linears.values() if linear.needs_x for d in linear.lora_gradients)
        return *d_tokens, *loras
