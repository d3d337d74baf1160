"""The parts of a FLUX block: each forward holds what a saving policy names, each backward is by hand.

Each object serves one forward pass: `forward` computes and holds, `backward` takes the gradient of its
result and gives that of its input. Held tensors go through a Keeper, which packs and lists them. No autograd
graph is built, except for attention, whose own gradient is taken on detached tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import nn

from ppcoat.fp8.norm import (
    Angles,
    modulated_norm,
    modulated_norm_grad,
    rms_norm_grad,
    rms_norm_rotated,
    rms_norm_rotated_grad,
    rms_rstd,
    turned,
)
from ppcoat.fp8.operands import Groups
from ppcoat.fp8.pointwise import gelu, gelu_grad

from .attention import attention, uses_flash_attention
from .checkpoint import LocalGraph
from .held import FinelyPackedTensor, HeldTensor, PackedTensor, PlainTensor, finely_pack, pack_tensor
from .linear import LinearUse
from .policy import SavingPolicy

Tensors = tuple[paddle.Tensor, ...]


class Keeper:
    """Turns tensors into what the policy holds of them, and lists all that it gave out."""

    def __init__(self, policy: SavingPolicy) -> None:
        self.policy = policy
        self.kept: list[HeldTensor] = []

    def packed(self, x: paddle.Tensor, group_size: int | None) -> PackedTensor | PlainTensor:
        """FP8, or x itself under a policy without a format."""
        fmt = self.policy.fmt
        if fmt is None:
            return self.plain(x)
        return self._listed(pack_tensor(x, fmt, group_size))

    def finely_packed(self, x: paddle.Tensor, group_size: int | None) -> FinelyPackedTensor | PlainTensor:
        """FP8 and half a byte, for what 3 bits of mantissa are too few."""
        return self.plain(x) if self.policy.fmt is None else self._listed(finely_pack(x, group_size))

    def plain(self, x: paddle.Tensor, statistic: bool = False) -> PlainTensor:
        """x itself. statistic: see PlainTensor."""
        return self._listed(PlainTensor(x, statistic))

    def _listed(self, kept: HeldTensor) -> HeldTensor:
        self.kept.append(kept)
        return kept


@dataclass(frozen=True)
class FlashRemainder:
    """What flash attention would hold beside q, k, v [B, tokens, heads, head_dim]: the output in bfloat16 and
    a float32 per token and head. Without flash attention it is computed again, so nothing is held.
    """

    shape: list[int]
    nbytes: int = 0
    nbytes_unpacked: int = 0

    @property
    def nbytes_bf16(self) -> int:
        batch, tokens, heads, head_dim = self.shape
        return batch * tokens * heads * (2 * head_dim + 4)


class LinearPart:
    """A Linear with its LoRA; holds drop(x) A for dB. Its input x is held by whoever computes it."""

    def __init__(self, keeper: Keeper, use: LinearUse) -> None:
        self.keeper, self.use = keeper, use
        self.lora_gradients: Tensors | None = None

    @property
    def needs_x(self) -> bool:
        return self.use.needs_x

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y, xa = self.use.forward(x)
        self.xa = self.keeper.plain(xa) if self.needs_x else None
        return y

    def backward(self, x: paddle.Tensor | None, dy: paddle.Tensor, needs_dx: bool) -> paddle.Tensor | None:
        """-> dx; sets `lora_gradients` to (dA, dB). x is wanted where `needs_x`."""
        xa = None if self.xa is None else self.xa.tensor
        dx, *self.lora_gradients = self.use.gradients(x, dy, needs_dx, xa)
        return dx


def backward_of_readers(
    readers: Sequence[tuple[LinearPart, paddle.Tensor]],
    x: Callable[[], paddle.Tensor],
    needs_dx: bool = True,
) -> paddle.Tensor | None:
    """Linears that read the same x, each with the gradient of its output -> dx. x() is called if needed."""
    value = x() if any(linear.needs_x for linear, _ in readers) else None
    total = None
    for linear, dy in readers:
        dx = linear.backward(value, dy, needs_dx)
        total = dx if total is None else total.add_(dx)
    return total


class ModulatedNorm:
    """x = LN(h) * (1 + scale) + shift, and the Linears that read x."""

    def __init__(self, keeper: Keeper, shift: paddle.Tensor, scale: paddle.Tensor) -> None:
        self.keeper, self.shift, self.scale = keeper, shift, scale

    def forward(self, h: paddle.Tensor, readers: Sequence[LinearPart]) -> paddle.Tensor:
        x = modulated_norm(h, self.shift, self.scale)
        self.h, self.x = self.keeper.packed(h, self.keeper.policy.group_size), None
        if any(linear.needs_x for linear in readers) and not self.keeper.policy.recompute:
            self.x = self.keeper.packed(x, self.keeper.policy.linear_group_size)
        return x

    def result(self) -> paddle.Tensor:
        """x again, as the readers' LoRA gradients see it."""
        if self.x is not None:
            return self.x.unpack()
        h, groups = _codes_or_floats(self.h)
        return modulated_norm(h, self.shift, self.scale, groups)

    def backward(self, dx: paddle.Tensor) -> paddle.Tensor:
        h, groups = _codes_or_floats(self.h)
        return modulated_norm_grad(h, self.scale, dx, groups)


class Gelu:
    """g = gelu(u), tanh form; holds u, and g for the Linear behind it unless it is rebuilt."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def forward(self, u: paddle.Tensor, reader: LinearPart | None = None) -> paddle.Tensor:
        """reader: the Linear that reads g alone, if there is one."""
        policy, g = self.keeper.policy, gelu(u)
        self.u, self.g = self.keeper.packed(u, policy.group_size), None
        if reader is not None and reader.needs_x and not policy.recompute:
            self.g = self.keeper.packed(g, policy.linear_group_size)
        return g

    def result(self) -> paddle.Tensor:
        """g again, as the reader's LoRA gradients see it."""
        return gelu(*_codes_or_floats(self.u)) if self.g is None else self.g.unpack()

    def backward(self, dg: paddle.Tensor) -> paddle.Tensor:
        u, groups = _codes_or_floats(self.u)
        return gelu_grad(u, dg, groups)


class HeadNorm:
    """RMSNorm of the queries or keys of one stream, and their rotation. Holds its input x [B, tokens, dim],
    or only 1 / rms: the output, known from attention, turned back and divided by the weight is the normalised
    input.
    """

    def __init__(self, keeper: Keeper, weight: paddle.Tensor, angles: Angles) -> None:
        self.keeper, self.weight, self.angles = keeper, weight, angles

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """x [B, tokens, dim] -> [B, tokens, heads, head_dim]."""
        y, rstd = rms_norm_rotated(_heads(x, self.weight.shape[0]), self.weight, self.angles)
        if self.keeper.policy.rebuild_heads:
            self.rstd = self.keeper.plain(rstd, statistic=True)
        else:
            self.x = self.keeper.packed(x, self.keeper.policy.group_size)
        return y

    def backward(self, dy: paddle.Tensor, y: paddle.Tensor | None) -> paddle.Tensor:
        """dy, y [B, tokens, heads, head_dim], y wanted under `rebuild_heads` -> dx [B, tokens, dim]."""
        if self.keeper.policy.rebuild_heads:
            return rms_norm_rotated_grad(dy, y, self.rstd.tensor, self.weight, self.angles).flatten(2)
        x = _heads(self.x.unpack(), self.weight.shape[0]).astype("float32")
        rstd, (cos, sin) = rms_rstd(x), self.angles
        return rms_norm_grad(x * rstd, rstd, self.weight, turned(dy, cos, -sin)).flatten(2)


class Attention:
    """Attention over all tokens: q, k (rotated), v [B, tokens, heads, head_dim] -> o [B, tokens, dim]."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.graph = keeper, None

    def forward(self, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
        policy, self.head_dim = self.keeper.policy, q.shape[-1]
        if not policy.recompute and uses_flash_attention(q):
            # Its graph is what "coat" holds: q, k, v, the output and a statistic per row.
            self.graph = LocalGraph(attention, q, k, v)
            return self.graph.output.flatten(2)
        flat = [x.flatten(2) for x in (q, k, v)]
        if policy.pack_attention:
            # Scores go through an exponential: 2.5 % of rounding in q or k would be 8 % behind it.
            finer = [self.keeper.finely_packed(x, policy.group_size) for x in flat[:2]]
            self.qkv = [*finer, self.keeper.packed(flat[2], policy.group_size)]
        else:
            self.qkv = [self.keeper.plain(x) for x in flat]
        if not policy.recompute:
            self.keeper.kept.append(FlashRemainder(q.shape))
        return attention(q, k, v).flatten(2)

    def again(self) -> LocalGraph:
        """The attention of the forward pass, ready for backward."""
        if self.graph is None:
            return LocalGraph(attention, *(_heads(x.unpack(), self.head_dim) for x in self.qkv))
        return self.graph

    def backward(self, graph: LocalGraph, do: paddle.Tensor) -> Tensors:
        """do [B, tokens, dim] -> gradients of q, k, v."""
        return tuple(graph.gradients(_heads(do, self.head_dim)))

    def rotated(self, graph: LocalGraph) -> list[paddle.Tensor | None]:
        """q and k again; None where no norm wants them."""
        if not self.keeper.policy.rebuild_heads:
            return [None, None]
        return [x.detach() for x in graph.inputs[:2]]


class Projections:
    """x -> q, k (normalised and rotated) and v of one stream, [B, tokens, heads, head_dim]."""

    def __init__(
        self, keeper: Keeper, linears: Sequence[LinearPart], norms: Sequence[nn.Layer], angles: Angles
    ) -> None:
        self.linears = linears
        self.norms = [HeadNorm(keeper, norm.weight, angles) for norm in norms]

    def forward(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        q, k, v = (linear.forward(x) for linear in self.linears)
        q, k = self.norms[0].forward(q), self.norms[1].forward(k)
        return [q, k, _heads(v, q.shape[-1])]

    def backward(
        self, grads: Sequence[paddle.Tensor], results: Sequence[paddle.Tensor | None]
    ) -> list[tuple[LinearPart, paddle.Tensor]]:
        """Gradients of q, k, v -> those of the Linears' outputs. results: q, k, where rebuilt."""
        dq, dk = (norm.backward(dy, y) for norm, dy, y in zip(self.norms, grads, results, strict=False))
        return list(zip(self.linears, (dq, dk, grads[2].flatten(2)), strict=True))


def _codes_or_floats(held: HeldTensor) -> tuple[paddle.Tensor, Groups | None]:
    """What an op reads of a held tensor: codes and how to read them, or floats."""
    if isinstance(held, PackedTensor):
        return held.codes, Groups(held.scale, held.fmt, held.group_size, held.dtype)
    return held.unpack(), None


def _heads(x: paddle.Tensor, head_dim: int) -> paddle.Tensor:
    """[B, tokens, dim] -> [B, tokens, heads, head_dim]."""
    return x.reshape([*x.shape[:2], -1, head_dim])
