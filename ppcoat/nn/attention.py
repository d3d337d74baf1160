"""Attention, its formula and its op, and rotary position embedding: what mixes or marks token positions.

All take and return [batch, tokens, heads, head_dim], the layout in which the Linears leave their output.
Which kernel computes attention is Paddle's choice (`attention_kernel`). A mask is added to the scores as a
bias, 0 or a number so low that its weight is exactly 0; it stays finite, for a row without any key must not
become NaN. Padding needs no bias of all pairs of tokens: the fused kernels see each sample without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import paddle
import paddle.nn.functional as F

from ppcoat.fp8.norm import apply_rope

from .op import OpCall, Tensors
from .recompute import LocalGraph

MASKED_SCORE = -1e9
# Paddle's names of what computes attention. The first two save q, k, v, the output and a float32 per row and
# head for backward; the last saves the scores of all pairs of tokens.
FLASH, EFFICIENT, MATH = "flash_attn", "mem_efficient", "math"


def attention(
    q: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    padding: Padding | None = None,
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v; query head h reads key head h // (heads / key heads).

    q [B, T, heads, head_dim]; k and v [B, S, key heads, head_dim]; bias as `attention_bias` gives it, or
    padding (S = T): keys behind a sample's end have no weight, and rows there hold anything finite. Returns
    q's shape and dtype. Where Paddle takes no fused kernel, the formula is written out in matmuls, which on a
    CPU takes a third of the time of Paddle's own composed form.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (_repeat_heads(x, groups) for x in (k, v))
    if attention_kernel(q, bias) == MATH:
        return _written_out(q, k, v, bias if padding is None else padding.bias)
    if padding is not None:
        return _sample_by_sample(q, k, v, padding.lengths)
    if bias is not None:
        bias = bias.astype(q.dtype).expand([q.shape[0], 1, q.shape[1], k.shape[1]])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_kernel(q: paddle.Tensor, bias: paddle.Tensor | None = None) -> str:
    """FLASH, EFFICIENT or MATH: what `attention` of q [B, T, heads, head_dim] of any dtype with this bias
    runs. Memory-efficient attention wants a bias of every head and pair of tokens, so it runs without one.
    """
    kernel = kernel_of_paddle(_place_of(q), q.shape[-1], q.dtype)
    return MATH if bias is not None and kernel == EFFICIENT else kernel


def kernel_of_paddle(place: paddle.base.core.Place, head_dim: int, dtype: paddle.dtype) -> str:
    """FLASH, EFFICIENT or MATH: what Paddle's selector takes at a place for heads of this size and dtype,
    by what it was built with, the card's capability and the user's `sdpa_kernel` context."""
    if not place.is_gpu_place():
        return MATH
    sdpa = getattr(F, "sdpa", None)
    if sdpa is None:  # an older Paddle looks at the size of heads only, and has half precision in mind
        half = dtype in (paddle.bfloat16, paddle.float16)
        return F.flash_attention._select_sdp(head_dim) if half else MATH
    if not sdpa._config:
        sdpa.init_config()
    shape, threefold = [1, 1, 1, head_dim], (dtype,) * 3
    asked = sdpa.SDPParams(shape, shape, shape, None, 0.0, False, None, False, threefold, (place,) * 3)
    return sdpa.select_sdp_for_sdpa(asked)


def _written_out(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    q, k, v = (_swap_tokens_and_heads(x) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = paddle.matmul(q, k, transpose_y=True)
    weights = F.softmax(scores if bias is None else scores + bias.astype(scores.dtype), axis=-1)
    return _swap_tokens_and_heads(paddle.matmul(weights, v))


def _sample_by_sample(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, lengths: Sequence[int]
) -> paddle.Tensor:
    """Each sample's own tokens without a mask, then zeros.

    A bias [B, 1, 1, T] would not do: flash attention accepts it, but then reads a row of it for every query,
    so from beyond its end (row stride `seqlen_k` in flash_fwd_kernel.h of Paddle's flash-attention).
    """
    rows = []
    for i, length in enumerate(lengths):
        row = F.scaled_dot_product_attention(*(x[i : i + 1, :length] for x in (q, k, v)))
        rest = [1, q.shape[1] - length, *q.shape[2:]]
        rows.append(row if not rest[1] else paddle.concat([row, paddle.zeros(rest, row.dtype)], axis=1))
    return paddle.concat(rows)


def _repeat_heads(x: paddle.Tensor, times: int) -> paddle.Tensor:
    """[B, S, heads, D] -> [B, S, heads * times, D], each head `times` in a row. Autograd saves nothing of
    x."""
    batch, tokens, heads, head_dim = x.shape
    x = x.unsqueeze(3).expand([batch, tokens, heads, times, head_dim])
    return x.reshape([batch, tokens, heads * times, head_dim])


class AttentionCall(OpCall):
    """q, k, v of one or two streams. Saves them all in one; under "+attention" values in FP8, queries and
    keys with a residual, because scores go through an exponential: 2.5 % of rounding in q or k would be 8 %
    behind it. Its result is never saved by whoever reads it, but computed again or saved by a fused kernel.
    """

    @staticmethod
    def compute(*qkv, padding=None):
        q, k, v = _joined(qkv)
        o = attention(q, k, v, padding=padding).flatten(2)
        return tuple(_split_tokens(o, [x.shape[1] for x in qkv[::3]]))

    def forward(self, *qkv):
        policy = self.saver.policy
        self.makers = [self.saver.maker_of(x) for x in qkv]
        self.tokens, self.head_dim = [x.shape[1] for x in qkv[::3]], qkv[0].shape[-1]
        self._graph, (q, k, v) = None, _joined(qkv)
        if not policy.recompute and attention_kernel(q) != MATH:
            # Its graph is what "coat" saves: q, k, v, the output and a statistic per row.
            self._graph = self._new_graph(q, k, v)
            return self._parts(self._graph.output.flatten(2))
        q_save = self.saver.save_residual if policy.attention_in_fp8 else self.saver.save_plain
        v_save = self.saver.save if policy.attention_in_fp8 else self.saver.save_plain
        self.qkv = [q_save(q.flatten(2)), q_save(k.flatten(2)), v_save(v.flatten(2))]
        if not policy.recompute:
            self.saver.count(_FusedRemainder(q.shape, k.shape[2]))
        return self._parts(attention(q, k, v, **self.settings).flatten(2))

    def tell(self, result):
        for i, part in enumerate(result):
            self.saver.offer(part, partial(self._part_again, i))

    def backward(self, *grads):
        graph, self._graph = self._again(), None
        do = paddle.concat(grads, axis=1) if len(grads) > 1 else grads[0]
        gradients = graph.gradients(split_heads(do, self.head_dim))
        found = list(zip(*(self._parts(d) for d in gradients), strict=True))
        for i, x in enumerate(graph.inputs):  # q, k, v
            makers = self.makers[i::3]
            for maker, part in zip(makers, self._parts(x.detach()) if any(makers) else makers, strict=True):
                if maker is not None:
                    maker.output = part
        return _flat(found)

    def _part_again(self, index: int) -> paddle.Tensor:
        return self._parts(self._again().output.flatten(2))[index]

    def _again(self) -> LocalGraph:
        """The attention of the forward pass, ready for backward."""
        if self._graph is None:
            self._graph = self._new_graph(*(split_heads(x.unpack(), self.head_dim) for x in self.qkv))
        return self._graph

    def _new_graph(self, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> LocalGraph:
        return LocalGraph(partial(attention, **self.settings), q, k, v)

    def _parts(self, x: paddle.Tensor) -> Tensors:
        return tuple(_split_tokens(x, self.tokens))


@dataclass(frozen=True)
class _FusedRemainder:
    """What a fused kernel would save beside q [B, tokens, heads, head_dim], k and v. Without one attention is
    computed again, so nothing is saved.
    """

    shape: list[int]
    key_heads: int
    nbytes: int = 0
    nbytes_unpacked: int = 0

    @property
    def nbytes_bf16(self) -> int:
        batch, tokens, heads, head_dim = self.shape
        return batch * tokens * fused_remainder(heads, self.key_heads, head_dim, 2)


def fused_remainder(heads: int, key_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes per token that flash and memory-efficient attention save beside q, k and v: the output, a float32
    per head, and keys and values for heads that share them."""
    return heads * (itemsize * head_dim + 4) + 2 * (heads - key_heads) * itemsize * head_dim


def attention_bias(keep: np.ndarray) -> paddle.Tensor | None:
    """keep: bool [B, queries or 1, keys] -> float32 [B, 1, queries or 1, keys], None if no key is masked.

    None lets `attention` use the kernels without a mask, so decide on the host and once per call.
    """
    if keep.all():
        return None
    return paddle.to_tensor(np.where(keep, 0.0, MASKED_SCORE).astype("float32")).unsqueeze(1)


@dataclass(frozen=True)
class Padding:
    """Sample i of a batch has lengths[i] tokens; what follows, up to `tokens`, is none of it."""

    lengths: tuple[int, ...]
    tokens: int

    @cached_property
    def bias(self) -> paddle.Tensor:
        """float32 [B, 1, 1, tokens], made once."""
        return attention_bias((np.arange(self.tokens) < np.array(self.lengths)[:, None])[:, None])


def padding_of(lengths: Sequence[int], tokens: int) -> Padding | None:
    """None where every sample fills its row: then no kernel needs a mask."""
    return None if min(lengths) == tokens else Padding(tuple(lengths), tokens)


def _place_of(x: paddle.Tensor) -> paddle.base.core.Place:
    """While a static graph is traced, tensors have no place yet: it will be the current device."""
    return x.place if paddle.in_dynamic_mode() else paddle.framework._current_expected_place_()


def _swap_tokens_and_heads(x: paddle.Tensor) -> paddle.Tensor:
    """[batch, a, b, d] -> [batch, b, a, d].

    `paddle.transpose` returns a strided view, and making that contiguous takes 3 ms for 400k floats on a CPU
    core. Shuffling a*b channels in a groups is the same permutation, and its kernel takes 0.2 ms; on a GPU it
    has no half precision.
    """
    if _place_of(x).is_gpu_place():
        return x.transpose([0, 2, 1, 3])
    batch, a, b, d = x.shape
    return F.channel_shuffle(x.reshape([batch, a * b, d, 1]), a).reshape([batch, b, a, d])


def rotary_angles(
    ids: paddle.Tensor, axes_dims: tuple[int, ...], theta: float = 10000.0
) -> tuple[paddle.Tensor, ...]:
    """Cosines and sines by which FLUX rotates queries and keys.

    ids: [tokens, len(axes_dims)], the position of each token along each axis. axes_dims: how many channels of
    a head belong to each axis, even numbers. Returns (cos, sin), both float32 [tokens, sum(axes_dims) / 2];
    the angles are computed in float64, because position times frequency loses digits in float32.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = theta ** (-paddle.arange(0, dim, 2, dtype="float64") / dim)
        angles.append(ids[:, axis : axis + 1].astype("float64") * frequencies)
    angles = paddle.concat(angles, axis=-1)
    return angles.cos().astype("float32"), angles.sin().astype("float32")


def rotate(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Turns each adjacent pair of channels (x[2i], x[2i+1]) by its token's angle i; computed in float32.

    x: [batch, tokens, heads, head_dim]; cos, sin: float32 [tokens, head_dim / 2]. Returns x's shape, dtype.
    """
    if paddle.is_grad_enabled() and not x.stop_gradient:
        return _Rotate.apply(x, cos, sin)
    return apply_rope(x, cos, sin)


class _Rotate(paddle.autograd.PyLayer):
    """The backward of a rotation is the rotation back, so nothing of x is saved. The tables are the model's,
    for all of its blocks, and not counted here."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.angles = cos, sin
        return apply_rope(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.angles
        return apply_rope(grad, cos, -sin), None, None


def half_split_angles(
    tokens: int, head_dim: int, theta: float, factor: float = 1.0
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(cos, sin), float32 [tokens, 1, head_dim / 2], of the angles position / factor * theta^(-2j/head_dim).

    In float64 until the end, because position times frequency loses digits in float32.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim) / factor
    angles = np.outer(np.arange(tokens), frequencies)[:, None]
    return tuple(paddle.to_tensor(part.astype("float32")) for part in (np.cos(angles), np.sin(angles)))


def rotate_halves(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Turns the pairs (x[j], x[j + head_dim / 2]), as Gemma and XLM-R do; cos and sin from
    `half_split_angles`, rounded to x's dtype first as in the original. x [B, T, heads, head_dim]."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = x.chunk(2, axis=-1)
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


def split_heads(x: paddle.Tensor, head_dim: int) -> paddle.Tensor:
    """[B, tokens, ...] of any dtype -> [B, tokens, heads, head_dim]."""
    return x.reshape([*x.shape[:2], -1, head_dim])


def _joined(qkv: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
    """(q, k, v) of each stream in a row -> q, k, v of all tokens."""
    if len(qkv) == 3:
        return list(qkv)
    return [paddle.concat(qkv[i::3], axis=1) for i in range(3)]


def _split_tokens(x: paddle.Tensor, tokens: Sequence[int]) -> list[paddle.Tensor]:
    """[B, all tokens, ...] -> a part [B, tokens[i], ...] for each stream."""
    if len(tokens) == 1:
        return [x]
    return [part.contiguous() for part in paddle.split(x, list(tokens), axis=1)]


def _flat(rows: Sequence[Sequence]) -> list:
    return [x for row in rows for x in row]
