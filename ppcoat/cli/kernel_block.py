"""A FLUX double block with LoRA forward and backward, as `benchmark kernels` times it with Paddle.

Four ways through the same weights: the saving policy "coat+recompute", the same with an FP8 base whose
Linears multiply in FP8 (model.quantize_matmul), and the block's own forward under autograd in 16-bit floats,
without and with gradient checkpointing. For a machine without Paddle there is
tests/fp8/launcher_block.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from ppcoat.fp8 import backend
from ppcoat.lora import inject_lora
from ppcoat.models.flux.transformer import DoubleBlock
from ppcoat.nn.convert import multiply_in_fp8, quantize_linears
from ppcoat.nn.flux_block import DoublePass
from ppcoat.nn.saving import apply_saving_policy

from .kernels import CHECKPOINTED, COAT, FP8_PRODUCTS, PLAIN

if TYPE_CHECKING:
    from .kernels import Sizes

USED = ("quantize", "dequantize", "modulated_norm", "modulated_norm_grad", "rms_norm_rotated",
        "rms_norm_rotated_grad", "gelu", "gelu_grad", "gated_residual", "scaled_matmul")  # fmt: skip
LORA_DEVIATION = 0.02  # of a LoRA's B, so that its A has a gradient

Call = Callable[[], list[paddle.Tensor]]


def double_block(tokens: int, sizes: Sizes, dtype: str) -> dict[str, Call]:
    """Way -> one forward and backward on `tokens` tokens, giving img, txt, their gradients and the LoRAs',
    which last until the next call.

    The block has random weights in `dtype`, a LoRA of `sizes.rank` (float32, alpha = rank) on every Linear of
    attention and feed-forward; everything else is frozen.
    """
    block = DoubleBlock(sizes.heads, sizes.width // sizes.heads)
    block.to(dtype=dtype)
    own_forward = block.forward
    quantised = _with_fp8_products(block, sizes)
    _train_loras(block, sizes.rank)

    inputs = _inputs(tokens, sizes, dtype)
    return {
        COAT: partial(_forward_and_backward, block, block, *inputs),
        FP8_PRODUCTS: partial(_forward_and_backward, quantised, quantised, *inputs),
        PLAIN: partial(_forward_and_backward, block, own_forward, *inputs),
        CHECKPOINTED: partial(
            _forward_and_backward, block, partial(recompute, own_forward, use_reentrant=False), *inputs
        ),
    }


def _with_fp8_products(block: DoubleBlock, sizes: Sizes) -> DoubleBlock:
    """A block of the same weights in FP8; its Linears of attention and feed-forward multiply in FP8."""
    model = nn.Layer()
    model.blocks = nn.LayerList([DoubleBlock(sizes.heads, sizes.width // sizes.heads)])
    (quantised,) = model.blocks
    quantised.to(dtype=str(block.attn.to_q.weight.dtype).rpartition(".")[2])
    quantised.set_state_dict(block.state_dict())
    quantize_linears(model)
    multiply_in_fp8(model)
    _train_loras(quantised, sizes.rank)
    return quantised


def _train_loras(block: DoubleBlock, rank: int) -> None:
    """Put LoRAs into `block`, every time the same."""
    rng = np.random.default_rng(1)
    for layer in inject_lora(block, rank, rank, targets=DoublePass.linear_paths).values():
        b = rng.standard_normal(layer.lora_B.shape) * LORA_DEVIATION
        layer.lora_B.set_value(b.astype(np.float32))
    block.train()
    apply_saving_policy(block, COAT)


def fallbacks() -> list[str]:
    """A line for each reason for which ops of the block do not run in their kernels on Paddle's device."""
    wanted = backend.forced()
    if wanted not in (None, "triton"):
        return [f"without kernels: all of the double block: {backend.VARIABLE} asks for {wanted}"]
    names: dict[str, list[str]] = {}
    for name in USED:
        names.setdefault(backend.OPS[name].verdict("triton").reason, []).append(name)
    return [f"without kernels: {', '.join(which)}: {reason}" for reason, which in names.items() if reason]


def _inputs(tokens: int, sizes: Sizes, dtype: str) -> tuple[tuple[paddle.Tensor, ...], ...]:
    """-> (img, txt), (vec, cos, sin) and the gradients of img and txt."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> paddle.Tensor:
        return paddle.to_tensor(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)

    shapes = [(1, tokens - sizes.text, sizes.width), (1, sizes.text, sizes.width)]
    angles = paddle.to_tensor(rng.uniform(0, 6, [tokens, sizes.width // sizes.heads // 2]).astype("float32"))
    streams, grads = (tuple(normal(*shape) for shape in shapes) for _ in range(2))
    return streams, (normal(1, sizes.width), angles.cos(), angles.sin()), grads


def _forward_and_backward(
    block: DoubleBlock,
    forward: Callable,
    streams: tuple[paddle.Tensor, ...],
    constants: tuple[paddle.Tensor, ...],
    grads: tuple[paddle.Tensor, ...],
) -> list[paddle.Tensor]:
    streams = [x.detach() for x in streams]
    for x in streams:
        x.stop_gradient = False
    loras = [p for p in block.parameters() if not p.stop_gradient]
    for p in loras:
        p.clear_gradient(set_to_zero=False)
    outputs = forward(*streams, *constants)
    # Not paddle.grad: the block's backward takes gradients itself.
    paddle.autograd.backward(list(outputs), list(grads))
    return [x.detach() for x in outputs] + [x.grad for x in (*streams, *loras)]
