"""The FLUX.1 transformer: a rectified-flow model of double and single blocks.

    image tokens, text tokens, time, guidance, pooled text -> velocity of the image tokens

Parameter names, config keys and the call are those of diffusers' `FluxTransformer2DModel`, so weights
interchange (Paddle's Linear stores [in, out]). Every matrix is a plain `paddle.nn.Linear` at its diffusers
path: LoRA and FP8 weights are put in from outside, and this file knows nothing of them. What a block saves
for backward is decided in the ops that it calls (nn/ops.py).
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle
import paddle.nn as nn
import paddle.nn.functional as F
from ppdiffusers.configuration_utils import ConfigMixin, register_to_config
from ppdiffusers.models.modeling_utils import ModelMixin
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from ppcoat.errors import ConfigError
from ppcoat.models.blocks import BlockModel, adapters, adapters_set, finite_half, wanted_scale
from ppcoat.nn import ops
from ppcoat.nn.attention import rotary_angles

SINUSOID_CHANNELS = 256


class FluxTransformer2DModel(BlockModel, ModelMixin, ConfigMixin):
    """FLUX.1 (black-forest-labs/flux; names as in diffusers). The defaults are FLUX.1-schnell's; FLUX.1-dev
    also has `guidance_embeds=True`: 1160 tensors, 11,901,408,320 parameters.

    Raises ConfigError if `axes_dims_rope` does not split `attention_head_dim` into even parts.
    """

    block_lists = ("transformer_blocks", "single_transformer_blocks")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ):
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(dim % 2 for dim in axes_dims_rope):
            raise ConfigError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must be even numbers that sum to attention_head_dim "
                f"{attention_head_dim}: correct the transformer's config.json"
            )
        heads, head_dim = num_attention_heads, attention_head_dim
        self.out_channels = out_channels or in_channels
        self.inner_dim = inner_dim = heads * head_dim

        self.time_text_embed = TimeTextEmbedding(inner_dim, pooled_projection_dim, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, inner_dim)
        self.x_embedder = nn.Linear(in_channels, inner_dim)
        self.transformer_blocks = nn.LayerList([DoubleBlock(heads, head_dim) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.LayerList(
            [SingleBlock(heads, head_dim) for _ in range(num_single_layers)]
        )
        self.norm_out = Modulation(inner_dim, 2)
        self.proj_out = nn.Linear(inner_dim, patch_size * patch_size * self.out_channels)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, subfolder: str = "", paddle_dtype: Any = None, **options: Any
    ) -> "FluxTransformer2DModel":
        """Of its folder, of a pipeline's (subfolder="transformer"), or of a model file. paddle_dtype and
        options: as for FluxPipeline.from_pretrained."""
        from ppcoat.models.loading import pretrained_transformer

        return pretrained_transformer(Path(folder) / subfolder, paddle_dtype, **options)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor = None,
        pooled_projections: paddle.Tensor = None,
        timestep: paddle.Tensor = None,
        img_ids: paddle.Tensor = None,
        txt_ids: paddle.Tensor = None,
        guidance: paddle.Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        controlnet_block_samples: Sequence[paddle.Tensor] | None = None,
        controlnet_single_block_samples: Sequence[paddle.Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """Predicts the velocity (noise - image) of packed latents.

        hidden_states [B, image tokens, in_channels], encoder_hidden_states [B, text tokens,
        joint_attention_dim] and pooled_projections [B, pooled_projection_dim], in the dtype of the weights.
        timestep [B] in 0..1, where 1 is pure noise. guidance [B], the distilled guidance scale, is wanted
        exactly if the config has guidance_embeds. img_ids, txt_ids [tokens, 3]: (unused, row, column).
        joint_attention_kwargs: {"scale": s} multiplies what adapters add (`adapters`) during this call.
        controlnet_*_samples: residuals [B, image tokens, dim], added after the blocks they are spread over.
        Returns Transformer2DModelOutput(sample) or (sample,): [B, image tokens, out_channels * patch_size^2].
        Raises ConfigError for an unknown joint_attention_kwargs key and for a missing or unwanted guidance.
        """
        scale = wanted_scale(joint_attention_kwargs)
        self._check_guidance(guidance)
        with adapters_set(adapters(self, scale) if scale is not None else {}):
            img, txt, vec = self._embed(
                hidden_states, encoder_hidden_states, timestep, guidance, pooled_projections
            )
            cos, sin = self._angles(txt_ids, img_ids)

            for i, block in enumerate(self.transformer_blocks):
                img, txt = self.run_block(i, block, img, txt, vec, cos, sin)
                if controlnet_block_samples:
                    blocks = len(self.transformer_blocks)
                    img = img + _pick(controlnet_block_samples, i, blocks, controlnet_blocks_repeat)

            text_tokens, image_tokens = txt.shape[1], img.shape[1]
            both = paddle.concat([txt, img], axis=1)
            for i, block in enumerate(self.single_transformer_blocks):
                both = self.run_block(len(self.transformer_blocks) + i, block, both, vec, cos, sin)
                if controlnet_single_block_samples:
                    txt, img = paddle.split(both, [text_tokens, image_tokens], axis=1)
                    img = img + _pick(controlnet_single_block_samples, i, len(self.single_transformer_blocks))
                    both = paddle.concat([txt, img], axis=1)

            sample = self._velocity(both[:, text_tokens:], vec)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def jit_forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor = None,
        pooled_projections: paddle.Tensor = None,
        timestep: paddle.Tensor = None,
        img_ids: paddle.Tensor = None,
        txt_ids: paddle.Tensor = None,
        guidance: paddle.Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """`forward` by way of the two methods below, in whose place their static graphs may stand.

        hidden_states [B, image tokens, in_channels] in the dtype of the weights; arguments, result and errors
        are those of `forward`; there are no controlnets, and blocks are not checkpointed. A graph keeps the
        strength that adapters had when it was traced, so a model with adapters refuses a "scale" with
        ConfigError. Names as in PaddleMIX's FLUX-Lightning example.
        """
        if wanted_scale(joint_attention_kwargs) is not None and adapters(self):
            raise ConfigError("a static graph cannot change the scale of a LoRA: merge_lora(model) first")
        self._check_guidance(guidance)
        img, txt, vec = self._embed(
            hidden_states, encoder_hidden_states, timestep, guidance, pooled_projections
        )
        cos, sin = self._angles(txt_ids, img_ids)
        img, txt = self.jit_transformer_blocks(img, txt, vec, cos, sin)
        both = self.jit_single_transformer_blocks(paddle.concat([txt, img], axis=1), vec, cos, sin)
        sample = self._velocity(both[:, txt.shape[1] :], vec)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def jit_transformer_blocks(
        self,
        img: paddle.Tensor,
        txt: paddle.Tensor,
        vec: paddle.Tensor,
        cos: paddle.Tensor,
        sin: paddle.Tensor,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """All double blocks, tensors in and out as paddle.jit wants it -> (img, txt).

        img [B, image tokens, dim], txt [B, text tokens, dim], vec [B, dim], cos and sin float32 [text +
        image tokens, head_dim / 2] (`rotary_angles`).
        """
        for block in self.transformer_blocks:
            img, txt = block(img, txt, vec, cos, sin)
        return img, txt

    def jit_single_transformer_blocks(
        self, both: paddle.Tensor, vec: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor
    ) -> paddle.Tensor:
        """All single blocks; both: [B, text + image tokens, dim], text first, as it comes back; cos and sin
        float32 as above."""
        for block in self.single_transformer_blocks:
            both = block(both, vec, cos, sin)
        return both

    def follow_inputs(self) -> None:
        """config.in_channels is what x_embedder takes, also where another was put in its place."""
        inputs = self.x_embedder.weight.shape[0]
        if inputs != self.config.in_channels:
            self.register_to_config(in_channels=inputs, out_channels=self.out_channels)

    def _check_guidance(self, guidance: paddle.Tensor | None) -> None:
        if (guidance is not None) != self.config.guidance_embeds:
            wanted = "a guidance tensor [B]" if self.config.guidance_embeds else "guidance=None"
            raise ConfigError(
                f"guidance is {'absent' if guidance is None else 'given'}, but the transformer has "
                f"guidance_embeds={self.config.guidance_embeds}: pass {wanted}"
            )

    def _embed(self, hidden_states, encoder_hidden_states, timestep, guidance, pooled_projections):
        """-> img, txt [B, tokens, dim] and vec [B, dim]: what blocks work on."""
        img = self.x_embedder(hidden_states)
        txt = self.context_embedder(encoder_hidden_states)
        # Each block begins with the same SiLU of the same vector: it is taken here, once.
        return img, txt, F.silu(self.time_text_embed(timestep, guidance, pooled_projections, img.dtype))

    def _angles(self, txt_ids, img_ids):
        ids = paddle.concat([_one_for_all(txt_ids), _one_for_all(img_ids)], axis=0)
        return rotary_angles(ids, self.config.axes_dims_rope)

    def _velocity(self, img, vec):
        scale_out, shift_out = self.norm_out(vec)  # here the scale comes first, unlike in the blocks
        return self.proj_out(ops.modulated_norm(img, shift_out, scale_out))


class DoubleBlock(nn.Layer):
    """Image and text each have their own weights and meet in one attention over all tokens, text first."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        dim = heads * head_dim
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 6)
        self.attn = JointAttention(heads, head_dim)
        self.ff = FeedForward(dim)
        self.ff_context = FeedForward(dim)

    def forward(self, img, txt, vec, cos, sin):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1(vec)
        txt_shift_a, txt_scale_a, txt_gate_a, txt_shift_m, txt_scale_m, txt_gate_m = self.norm1_context(vec)
        img_attn, txt_attn = self.attn(
            ops.modulated_norm(img, shift_a, scale_a),
            ops.modulated_norm(txt, txt_shift_a, txt_scale_a),
            cos,
            sin,
        )
        img = ops.gated_residual(img_attn, gate_a, img)
        txt = ops.gated_residual(txt_attn, txt_gate_a, txt)
        img = ops.gated_residual(self.ff(ops.modulated_norm(img, shift_m, scale_m)), gate_m, img)
        txt_mlp = self.ff_context(ops.modulated_norm(txt, txt_shift_m, txt_scale_m))
        txt = ops.gated_residual(txt_mlp, txt_gate_m, txt)
        return finite_half(img), finite_half(txt)


class SingleBlock(nn.Layer):
    """One stream of all tokens; attention and feed-forward run side by side, with one output projection."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        dim = heads * head_dim
        self.norm = Modulation(dim, 3)
        self.attn = SelfAttention(heads, head_dim)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x, vec, cos, sin):
        shift, scale, gate = self.norm(vec)
        y = ops.modulated_norm(x, shift, scale)
        mlp = ops.gelu(self.proj_mlp(y))
        out = self.proj_out(ops.concat(self.attn(y, cos, sin), mlp))
        return finite_half(ops.gated_residual(out, gate, x))


class SelfAttention(nn.Layer):
    """Multi-head attention with RMS-normalised queries and keys; the output projection is the caller's."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        dim = heads * head_dim
        self.head_shape = [0, 0, heads, head_dim]  # 0 keeps a dimension in Paddle's reshape
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = HeadNorm(head_dim), HeadNorm(head_dim)

    def forward(self, x, cos, sin):
        q, k = self.norm_q(self.to_q(x), cos, sin), self.norm_k(self.to_k(x), cos, sin)
        return ops.attention(q, k, self.to_v(x).reshape(self.head_shape))


class JointAttention(SelfAttention):
    """The same over two streams: `add_*` are the text's projections, and text tokens stand first."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__(heads, head_dim)
        dim = heads * head_dim
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = HeadNorm(head_dim), HeadNorm(head_dim)
        self.to_out = nn.LayerList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def forward(self, img, txt, cos, sin):
        text_tokens = txt.shape[1]
        of_text, of_image = (cos[:text_tokens], sin[:text_tokens]), (cos[text_tokens:], sin[text_tokens:])
        q, k = self.norm_q(self.to_q(img), *of_image), self.norm_k(self.to_k(img), *of_image)
        v = self.to_v(img).reshape(self.head_shape)
        txt_q = self.norm_added_q(self.add_q_proj(txt), *of_text)
        txt_k = self.norm_added_k(self.add_k_proj(txt), *of_text)
        txt_v = self.add_v_proj(txt).reshape(self.head_shape)
        txt_attn, img_attn = ops.joint_attention((txt_q, txt_k, txt_v), (q, k, v))
        return self.to_out[0](img_attn), self.to_add_out(txt_attn)


class FeedForward(nn.Layer):
    """Linear, tanh-GELU, Linear; four times as wide inside. `net.1` is diffusers' unused dropout."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.LayerList([GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class GELUProjection(nn.Layer):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x):
        return ops.gelu(self.proj(x))


class Modulation(nn.Layer):
    """vec [B, dim] -> `parts` tensors [B, 1, dim]: shifts, scales and gates of the adaptive norms."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, vec):
        return self.linear(vec).unsqueeze(1).chunk(self.parts, axis=-1)


class HeadNorm(nn.Layer):
    """Queries or keys [B, tokens, dim] -> [B, tokens, heads, head_dim], RMS-normalised in each head and
    turned by the angles of their tokens."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = self.create_parameter([head_dim], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x, cos, sin):
        return ops.rms_norm_rotated(x, self.weight, cos, sin)


class TimeTextEmbedding(nn.Layer):
    """time, guidance (if the model has it) and pooled text -> vec [B, dim], which steers every block."""

    def __init__(self, dim: int, pooled_dim: int, guidance_embeds: bool):
        super().__init__()
        self.timestep_embedder = TwoLayerEmbedding(SINUSOID_CHANNELS, dim)
        if guidance_embeds:
            self.guidance_embedder = TwoLayerEmbedding(SINUSOID_CHANNELS, dim)
        self.text_embedder = TwoLayerEmbedding(pooled_dim, dim)

    def forward(self, timestep, guidance, pooled, dtype):
        vec = self.timestep_embedder(sinusoid(timestep.astype(dtype) * 1000).astype(dtype))
        if guidance is not None:
            vec = vec + self.guidance_embedder(sinusoid(guidance.astype(dtype) * 1000).astype(dtype))
        return vec + self.text_embedder(pooled.astype(dtype))


class TwoLayerEmbedding(nn.Layer):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(t: paddle.Tensor) -> paddle.Tensor:
    """t [B] -> float32 [B, 256]: cosines, then sines, of t at 128 frequencies from 1 to almost 1/10000."""
    half = SINUSOID_CHANNELS // 2
    exponents = -math.log(10000.0) / half * paddle.arange(half, dtype="float32")
    # Rounded once, as torch's exp is: Paddle's float32 exp on CPU is one digit off, which t = 1000 enlarges.
    frequencies = exponents.astype("float64").exp().astype("float32")
    angles = t.astype("float32").unsqueeze(-1) * frequencies
    return paddle.concat([angles.cos(), angles.sin()], axis=-1)


def _one_for_all(ids: paddle.Tensor) -> paddle.Tensor:
    """Position ids [tokens, axes]; in the older form [B, tokens, axes] all rows are the same."""
    return ids[0] if ids.ndim == 3 else ids


def _pick(samples: Sequence[paddle.Tensor], index: int, blocks: int, repeat: bool = False) -> paddle.Tensor:
    """The controlnet sample of block `index`: samples are cycled (repeat) or spread evenly over blocks."""
    return samples[index % len(samples) if repeat else index // math.ceil(blocks / len(samples))]
