"""The parts of NextDiT_CLIP: blocks, attention with shared key heads, feed-forward, norms, the last layer.

Names are those of the original checkpoint. Tokens x are [B, tokens, dim], adaln [B, width]; cos and sin are
`nn.attention.rotary_angles` of all B * tokens positions, float32 [B * tokens, head_dim / 2].
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import nn

from ppcoat.nn import ops

HEAD_NORM_EPSILON = 1e-6  # of q_norm, k_norm and clip_text_pooled_proj.0; norm_eps does not reach them


class Block(nn.Layer):
    """Attention and feed-forward, each between two norms. A modulated block scales what goes in and gates
    what comes out (tanh) by adaln; there is no shift."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, hidden_dim: int, epsilon: float, adaln_dim: int | None
    ):
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads)
        self.feed_forward = SwiGLU(dim, hidden_dim)
        self.attention_norm1, self.attention_norm2 = RMSNorm(dim, epsilon), RMSNorm(dim, epsilon)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(dim, epsilon), RMSNorm(dim, epsilon)
        self.modulated = adaln_dim is not None
        if self.modulated:
            self.adaLN_modulation = nn.Sequential(nn.Silu(), nn.Linear(adaln_dim, 4 * dim))

    def forward(self, x, cos, sin, adaln=None, padding=None):
        scale_a = gate_a = scale_m = gate_m = None
        if self.modulated:
            scale_a, gate_a, scale_m, gate_m = self.adaLN_modulation(adaln).unsqueeze(1).chunk(4, axis=-1)
        attended = self.attention(self.attention_norm1(x, scale_a), cos, sin, padding)
        x = _residual(self.attention_norm2(attended), gate_a, x)
        fed = self.feed_forward(self.ffn_norm1(x, scale_m))
        return _residual(self.ffn_norm2(fed), gate_m, x)


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

    def forward(self, x, cos, sin, padding):
        heads = self.qkv(x).reshape([0, 0, sum(self.heads_of_parts), self.head_dim])
        q, k, v = paddle.split(heads, self.heads_of_parts, axis=2)
        q = ops.rms_norm_rotated(q, self.q_norm.weight, cos, sin, self.q_norm.epsilon)
        k = ops.rms_norm_rotated(k, self.k_norm.weight, cos, sin, self.k_norm.epsilon)
        return self.out(ops.attention(q, k, v, padding))


class SwiGLU(nn.Layer):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, hidden_dim, bias_attr=False) for _ in range(2))
        self.w2 = nn.Linear(hidden_dim, dim, bias_attr=False)

    def forward(self, x):
        return self.w2(ops.gated_silu(self.w1(x), self.w3(x)))


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
    """x / rms(x) in x's dtype, times weight, and times 1 + scale [B, 1, dim] if there is one."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([dim], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x, scale=None):
        return ops.rms_norm(x, self.weight, scale, self.epsilon)


def _residual(y: paddle.Tensor, gate: paddle.Tensor | None, x: paddle.Tensor) -> paddle.Tensor:
    """x + tanh(gate) y; without the factor if gate is None."""
    return x + y if gate is None else ops.gated_residual(y, F.tanh(gate), x)
