"""The text half of Gemma 3 as an encoder: token ids -> the residual stream before the last layer.

NewBie-image was trained on `hidden_states[-2]` of a 34-layer Gemma3-4B: the output of layer 32, without the
final norm. So the last layer, the final norm and the vision tower do not exist here.

Source: HF transformers' gemma3 (names and numbers as there); Gemma 3 report, arXiv 2503.19786. Linears are
[in, out]. bfloat16 or float32 only: Gemma's residual stream leaves float16's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.nn.attention import (
    attention,
    attention_bias,
    half_split_angles,
    rotate_halves,
)

# Config keys that would change the computation in a way not written here, with the values that do not.
_ONLY = {
    "attention_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}


@dataclass(frozen=True)
class Gemma3Config:
    """The defaults are Gemma3-4B's; its config.json names only some of them."""

    vocab_size: int = 262208
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 34
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    rms_norm_eps: float = 1e-6
    sliding_window: int = 1024
    sliding_window_pattern: int = 6
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    rope_factor: float = 8.0
    layer_types: tuple[str, ...] | None = None

    @classmethod
    def from_dict(cls, config: dict) -> Gemma3Config:
        """From config.json of a Gemma3 text model, or of a multimodal one (its text_config).

        Raises ConfigError for a value that asks for something not implemented, such as another kind of RoPE
        scaling.
        """
        text = dict(config.get("text_config", config))
        for key, allowed in _ONLY.items():
            if text.get(key) not in allowed:
                raise ConfigError(f"Gemma3 config: {key} is {text[key]!r}, wanted {allowed[0]!r}")
        _flatten_rope(text)
        if "_sliding_window_pattern" in text:
            text.setdefault("sliding_window_pattern", text["_sliding_window_pattern"])
        values = {key: text[key] for key in cls.__dataclass_fields__ if text.get(key) is not None}
        if "layer_types" in values:
            values["layer_types"] = tuple(values["layer_types"])
        return cls(**values)

    def is_global(self, layer: int) -> bool:
        """Whether layer 0, 1, ... sees all earlier tokens; the others see the last sliding_window."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "full_attention"
        return (layer + 1) % self.sliding_window_pattern == 0


class Gemma3TextEncoder(nn.Layer):
    """All layers but the last; parameter names are transformers' after `language_model.model.`."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([DecoderLayer(config) for _ in range(config.num_hidden_layers - 1)])

    def forward(self, input_ids: paddle.Tensor, attention_mask: paddle.Tensor) -> paddle.Tensor:
        """hidden_states[-2], [B, L, hidden_size] in the dtype of the weights.

        input_ids int64 [B, L]; attention_mask [B, L], 1 for tokens and 0 for padding on the right. Rows of
        padding hold numbers without meaning.
        """
        weight, config = self.embed_tokens.weight, self.config
        # Rounded to the weights' dtype first, as in the original: 50.5 instead of 50.596 in bfloat16.
        scale = paddle.to_tensor(config.hidden_size**0.5, dtype="float32").astype(weight.dtype)
        x = self.embed_tokens(input_ids) * scale
        kinds = {True: self._global(attention_mask), False: self._local(attention_mask)}
        for i, layer in enumerate(self.layers):
            x = layer(x, *kinds[config.is_global(i)])
        return x

    def _global(self, mask: paddle.Tensor):
        """(cos, sin, bias) of a layer that sees all earlier tokens; its positions are stretched."""
        config, tokens = self.config, mask.shape[1]
        angles = half_split_angles(tokens, config.head_dim, config.rope_theta, config.rope_factor)
        return *angles, attention_bias(_causal(mask))

    def _local(self, mask: paddle.Tensor):
        """(cos, sin, bias) of a layer that sees the last sliding_window tokens, its own included."""
        config, tokens = self.config, mask.shape[1]
        angles = half_split_angles(tokens, config.head_dim, config.rope_local_base_freq)
        age = np.subtract.outer(np.arange(tokens), np.arange(tokens))
        return *angles, attention_bias(_causal(mask) & (age < config.sliding_window))


class DecoderLayer(nn.Layer):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        norms = [Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4)]
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]
        self.self_attn = Gemma3SelfAttention(config)
        self.mlp = Gemma3FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x, cos, sin, bias):
        attended = self.self_attn(self.input_layernorm(x), cos, sin, bias)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3SelfAttention(nn.Layer):
    """Queries and keys are normalised per head, then rotated; key heads serve adjacent query heads."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        dim, head_dim = config.hidden_size, config.head_dim
        query_dim, key_dim = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.head_dim = head_dim
        self.query_factor = (head_dim / config.query_pre_attn_scalar) ** 0.5
        self.q_proj = nn.Linear(dim, query_dim, bias_attr=False)
        self.k_proj = nn.Linear(dim, key_dim, bias_attr=False)
        self.v_proj = nn.Linear(dim, key_dim, bias_attr=False)
        self.o_proj = nn.Linear(query_dim, dim, bias_attr=False)
        self.q_norm, self.k_norm = (Gemma3RMSNorm(head_dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x, cos, sin, bias):
        q, k, v = (
            project(x).reshape([0, 0, -1, self.head_dim])
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_halves(self.q_norm(q), cos, sin), rotate_halves(self.k_norm(k), cos, sin)
        return self.o_proj(attention(q * self.query_factor, k, v, bias).flatten(2))


class Gemma3FeedForward(nn.Layer):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(dim, hidden_dim, bias_attr=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden_dim, dim, bias_attr=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))


class Gemma3RMSNorm(nn.Layer):
    """x / rms(x) * (1 + weight), all in float32: Gemma stores weights around zero and rounds last."""

    def __init__(self, dim: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([dim], default_initializer=nn.initializer.Constant(0.0))

    def forward(self, x):
        x32 = x.astype("float32")
        rstd = paddle.rsqrt(paddle.square(x32).mean(axis=-1, keepdim=True) + self.epsilon)
        return (x32 * rstd * (1 + self.weight.astype("float32"))).astype(x.dtype)


def _causal(mask: paddle.Tensor) -> np.ndarray:
    """[B, L] -> bool [B, L, L]: a token sees itself and what stands before it, except padding."""
    keys = mask.numpy().astype(bool)
    return np.tril(np.ones([keys.shape[1]] * 2, dtype=bool)) & keys[:, None]


def _flatten_rope(text: dict) -> None:
    """Puts the RoPE settings into the flat keys of Gemma3Config; transformers 5 nests them per layer type."""
    scaling = text.get("rope_scaling")
    if "rope_parameters" in text:
        scaling = text["rope_parameters"].get("full_attention", {})
        text["rope_theta"] = scaling.get("rope_theta")
        text["rope_local_base_freq"] = text["rope_parameters"].get("sliding_attention", {}).get("rope_theta")
    elif "rope_scaling" not in text:
        return
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind not in ("linear", "default"):
        raise ConfigError(f"Gemma3 config: RoPE scaling {kind!r} is not implemented, wanted 'linear'")
    text["rope_factor"] = scaling["factor"] if kind == "linear" else 1.0
