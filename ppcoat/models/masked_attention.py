"""Attention with padded keys and shared key heads, and the rotation of half-split channels: what the NewBie
models need beside ppcoat.nn.attention.

Tokens are [batch, tokens, heads, head_dim]. A mask is added to the scores as a bias, 0 or a number so low
that its weight is exactly 0; it stays finite, for a row without any key must not become NaN.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F

from ppcoat.nn.attention import attention, uses_flash_attention

MASKED_SCORE = -1e9


def attention_bias(keep: np.ndarray) -> paddle.Tensor | None:
    """keep: bool [B, queries or 1, keys] -> float32 [B, 1, queries or 1, keys], None if every key is kept.

    None lets `masked_attention` use the kernels without a mask, so decide on the host and once per call.
    """
    if keep.all():
        return None
    return paddle.to_tensor(np.where(keep, 0.0, MASKED_SCORE).astype("float32")).unsqueeze(1)


def padding_bias(lengths: list[int], tokens: int) -> paddle.Tensor | None:
    """The bias [B, 1, 1, tokens] that lets sample i attend to its first lengths[i] tokens."""
    return attention_bias((np.arange(tokens) < np.array(lengths)[:, None])[:, None])


def masked_attention(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, bias: paddle.Tensor | None
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v; query head h reads key head h // (heads / key heads).

    q [B, T, heads, head_dim]; k and v [B, S, key heads, head_dim]; bias as `attention_bias` gives it. Returns
    q's shape and dtype.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, axis=2) for x in (k, v))
    if bias is None:
        return attention(q, k, v)
    if uses_flash_attention(q):
        bias = bias.astype(q.dtype).expand([q.shape[0], 1, q.shape[1], k.shape[1]])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q, k, v = (x.transpose([0, 2, 1, 3]) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = paddle.matmul(q, k, transpose_y=True)
    weights = F.softmax(scores + bias.astype(scores.dtype), axis=-1)
    return paddle.matmul(weights, v).transpose([0, 2, 1, 3])


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
