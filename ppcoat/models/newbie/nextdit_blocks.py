"""The parts of NextDiT_CLIP: blocks, attention with shared key heads, feed-forward, norms, the last layer.

Names are those of the original checkpoint. Tokens x are [B, tokens, dim], adaln [B, width]; cos and sin are
`nn.attention.rotary_angles` of all B * tokens positions, float32 [B * tokens, head_dim / 2].
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from ppcoat.models.masked_attention import masked_attention
from ppcoat.nn.attention import rotate
from ppcoat.nn.checkpoint import recomputed, recomputed_attention

HEAD_NORM_EPSILON = 1e-6  # of q_norm, k_norm and clip_text_pooled_proj.0; norm_eps does not reach them


class Block(nn.Layer):
    """Attention and feed-forward, each between two norms. A modulated block scales what goes in and gates
    what comes out (tanh) by adaln; there is no shift."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, hidden_dim: int, epsilon: float, adaln_dim: int | None
    ):
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, epsilon), RMSNorm(dim, epsilon)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, epsilon), RMSNorm(dim, epsilon)
        self.modulated = adaln_dim is not None
        if self.modulated:
            self.adaLN_modulation = nn.Sequential(nn.Silu(), nn.Linear(adaln_dim, 4 * dim))

    def forward(self, x, cos, sin, bias, adaln=None):
        scale_a = gate_a = scale_m = gate_m = None
        if self.modulated:
            scale_a, gate_a, scale_m, gate_m = self.adaLN_modulation(adaln).unsqueeze(1).chunk(4, axis=-1)
        attended = self.attention(_scaled(self.attention_norm1, x, scale_a), cos, sin, bias)
        x = x + _gated(self.attention_norm2, attended, gate_a)
        fed = self.feed_forward(_scaled(self.ffn_norm1, x, scale_m))
        return x + _gated(self.ffn_norm2, fed, gate_m)


class Attention(nn.Layer):
    """Both ways over all tokens of a sample; every kv head serves heads / kv_heads adjacent query heads."""

    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        head_dim = dim // heads
        self.heads_of_parts = [heads, kv_heads, kv_heads]
        self.qkv = nn.Linear(dim, sum(self.heads_of_parts) * head_dim, bias_attr=False)
        self.out = nn.Linear(dim, dim, bias_attr=False)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, HEAD_NORM_EPSILON) for _ in range(2))
        self.head_dim = head_dim

    def forward(self, x, cos, sin, bias):
        heads = self.qkv(x).reshape([0, 0, sum(self.heads_of_parts), self.head_dim])
        q, k, v = paddle.split(heads, self.heads_of_parts, axis=2)
        return self.out(recomputed_attention(self._core, q, k, v, cos, sin, bias))

    def _core(self, q, k, v, cos, sin, bias):
        """[B, tokens, dim]."""
        q, k = _rotate_all(self.q_norm(q), cos, sin), _rotate_all(self.k_norm(k), cos, sin)
        return masked_attention(q, k, v, bias).flatten(2)


class FeedForward(nn.Layer):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden_dim, bias_attr=False) for _ in range(2))
        self.w2 = nn.Linear(hidden_dim, dim, bias_attr=False)

    def forward(self, x):
        return self.w2(recomputed(lambda gate, up: F.silu(gate) * up, self.w1(x), self.w3(x)))


class FinalLayer(nn.Layer):
    """Tokens -> patches of velocity, [B, tokens, patch_size^2 * channels]."""

    def __init__(self, dim: int, out_dim: int, adaln_dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.Silu(), nn.Linear(adaln_dim, dim))

    def forward(self, x, adaln):
        scale = self.adaLN_modulation(adaln).unsqueeze(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], epsilon=1e-6) * (1 + scale))


class TimeEmbedding(nn.Layer):
    """Sinusoids of t [B, 256] -> [B, dim]."""

    def __init__(self, sinusoid_dim: int, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(sinusoid_dim, dim), nn.Silu(), nn.Linear(dim, dim))

    def forward(self, x):
        return self.mlp(x)


class RMSNorm(nn.Layer):
    """x / rms(x) in x's dtype, times weight. Written out: Paddle's fused form has no CPU gradient."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([dim], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x):
        x32 = x.astype("float32")
        rstd = paddle.rsqrt(paddle.square(x32).mean(axis=-1, keepdim=True) + self.epsilon)
        return (x32 * rstd).astype(x.dtype) * self.weight


def _scaled(norm: RMSNorm, x: paddle.Tensor, scale: paddle.Tensor | None) -> paddle.Tensor:
    """norm(x) (1 + scale); without the factor if scale is None."""
    if scale is None:
        return recomputed(norm, x)
    return recomputed(lambda x, scale: norm(x) * (1 + scale), x, scale)


def _gated(norm: RMSNorm, y: paddle.Tensor, gate: paddle.Tensor | None) -> paddle.Tensor:
    """tanh(gate) norm(y); without the factor if gate is None."""
    if gate is None:
        return recomputed(norm, y)
    return recomputed(lambda y, gate: F.tanh(gate) * norm(y), y, gate)


def _rotate_all(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """`rotate` takes one row of angles per token; samples differ here, so they are laid end to end."""
    batch, tokens, heads, head_dim = x.shape
    return rotate(x.reshape([1, batch * tokens, heads, head_dim]), cos, sin).reshape(x.shape)
