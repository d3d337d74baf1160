"""NextDiT_CLIP, the transformer of NewBie-image: latents at time t and two text encodings -> velocity.

    caption -> context refiner --+
                                 +-> [caption, image] -> layers -> velocity of the image tokens
    image   -> noise refiner ----+

Time runs from noise to picture: x_t = t * latents + (1 - t) * noise, and the velocity is latents - noise.
Source: the public NewBie-image code (NextDiT_3B_GQA_patch2_Adaln_Refiner_WHIT_CLIP), after Lumina-Image 2.0
(arXiv 2503.21758). Parameter names and shapes are the original's (Paddle's Linear stores [in, out]); every
matrix is a plain nn.Linear, so LoRA, FP8 and saving policies are put in from outside.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import ConfigMixin, register_to_config
from ppdiffusers.models.modeling_utils import ModelMixin

from ppcoat.errors import ConfigError
from ppcoat.models.blocks import BlockModel
from ppcoat.models.flux.transformer import SINUSOID_CHANNELS, sinusoid
from ppcoat.nn import ops
from ppcoat.nn.attention import padding_of, rotary_angles

MAX_ADALN_DIM = 1024
HEAD_NORM_EPSILON = 1e-6  # of q_norm, k_norm and clip_text_pooled_proj.0; norm_eps does not reach them


class NextDiT_CLIP(BlockModel, ModelMixin, ConfigMixin):
    """The defaults are those of NewBie-image 3B: 535 tensors, 3,486,636,096 parameters.

    axes_dims: channels of a head for (caption position, row, column). axes_lens: how many positions each of
    them has. Raises ConfigError for sizes that do not fit together. The refiners are never checkpointed.
    """

    block_lists = ("layers",)

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        dim: int = 2304,
        n_layers: int = 36,
        n_refiner_layers: int = 2,
        n_heads: int = 24,
        n_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        clip_text_dim: int = 1024,
        axes_dims: Sequence[int] = (32, 32, 32),
        axes_lens: Sequence[int] = (1024, 512, 512),
    ):
        super().__init__()
        _check_sizes(dim, n_heads, n_kv_heads, axes_dims, qk_norm)
        adaln_dim, patch_dim = min(dim, MAX_ADALN_DIM), patch_size**2 * in_channels
        hidden_dim = int(4 * dim * (ffn_dim_multiplier or 1))
        sizes = (dim, n_heads, n_kv_heads, -(-hidden_dim // multiple_of) * multiple_of, norm_eps)

        self.x_embedder = nn.Linear(patch_dim, dim)
        self.t_embedder = TimeEmbedding(SINUSOID_CHANNELS, adaln_dim)
        self.cap_embedder = nn.Sequential(RMSNorm(cap_feat_dim, norm_eps), nn.Linear(cap_feat_dim, dim))
        self.clip_text_pooled_proj = nn.Sequential(
            RMSNorm(clip_text_dim, HEAD_NORM_EPSILON), nn.Linear(clip_text_dim, clip_text_dim)
        )
        self.time_text_embed = nn.Sequential(nn.Silu(), nn.Linear(adaln_dim + clip_text_dim, adaln_dim))
        self.noise_refiner = nn.LayerList([Block(*sizes, adaln_dim) for _ in range(n_refiner_layers)])
        self.context_refiner = nn.LayerList([Block(*sizes, None) for _ in range(n_refiner_layers)])
        self.layers = nn.LayerList([Block(*sizes, adaln_dim) for _ in range(n_layers)])
        self.norm_final = RMSNorm(dim, norm_eps)  # in the checkpoint, but no part of the computation
        self.final_layer = FinalLayer(dim, patch_dim, adaln_dim)

    def forward(
        self,
        x: paddle.Tensor | Sequence[paddle.Tensor],
        t: paddle.Tensor,
        cap_feats: paddle.Tensor,
        cap_mask: paddle.Tensor,
        clip_text_pooled: paddle.Tensor | None = None,
    ) -> paddle.Tensor | list[paddle.Tensor]:
        """The velocity (latents - noise), in the form of x.

        x: [B, in_channels, H, W], or a list of B latents [in_channels, H_i, W_i]; H and W even. t [B] in
        0..1, where 0 is pure noise. cap_feats [B, L, cap_feat_dim] and cap_mask [B, L], 1 for tokens and 0
        for padding, which stands on the right. clip_text_pooled [B, clip_text_dim]; without it the time alone
        steers the blocks. Floating tensors have the dtype of the weights. Raises ConfigError for odd sizes, a
        mask with gaps, and more tokens, rows or columns than axes_lens.
        """
        same_size = isinstance(x, paddle.Tensor)
        patches, grids = self._patchify(x)
        lengths = caption_lengths(cap_mask)
        self._check_positions(lengths, grids)
        cap_positions, img_positions, joint_positions = token_positions(lengths, grids)
        counts = [rows * columns for rows, columns in grids]
        totals = [length + count for length, count in zip(lengths, counts, strict=True)]

        adaln = self._adaln(t, clip_text_pooled, patches.dtype)
        # Padding beyond the longest caption takes no part: samples of equal length need no mask at all.
        cap = self.cap_embedder(cap_feats[:, : max(lengths)])
        cos, sin = self._angles(cap_positions)
        padding = padding_of(lengths, cap.shape[1])
        for block in self.context_refiner:
            cap = block(cap, cos, sin, padding=padding)

        img = self.x_embedder(patches)
        cos, sin = self._angles(img_positions)
        padding = padding_of(counts, img.shape[1])
        for block in self.noise_refiner:
            img = block(img, cos, sin, adaln, padding)

        joint = _join(cap, img, lengths, counts)
        cos, sin = self._angles(joint_positions)
        padding = padding_of(totals, joint.shape[1])
        for index, block in enumerate(self.layers):
            joint = self.run_block(index, block, joint, cos, sin, adaln, padding=padding)
        out = self.final_layer(joint, adaln)
        images = [
            self._unpatchify(out[i, length : length + count], grid)
            for i, (length, count, grid) in enumerate(zip(lengths, counts, grids, strict=True))
        ]
        return paddle.stack(images) if same_size else images

    def _adaln(self, t, clip_text_pooled, dtype) -> paddle.Tensor:
        """[B, adaln width]: the time, mixed with the pooled text if there is one (time first)."""
        time = self.t_embedder(sinusoid(t).astype(dtype))  # t is not multiplied by 1000, unlike in FLUX
        if clip_text_pooled is None:
            return time
        text = self.clip_text_pooled_proj(clip_text_pooled.astype(dtype))
        return self.time_text_embed(paddle.concat([time, text], axis=-1))

    def _angles(self, positions: np.ndarray) -> tuple[paddle.Tensor, paddle.Tensor]:
        return rotary_angles(paddle.to_tensor(positions.reshape([-1, 3])), self.config.axes_dims)

    def _patchify(self, x) -> tuple[paddle.Tensor, list[tuple[int, int]]]:
        """Latents -> patches [B, tokens, patch^2 * channels] and (rows, columns) of each sample.

        Tokens go row by row; in a patch the channel runs fastest. Shorter samples are padded with zeros.
        """
        p = self.config.patch_size
        for image in x:
            if image.shape[1] % p or image.shape[2] % p:
                raise ConfigError(
                    f"latents {image.shape[1:]}: height and width must be multiples of {p} "
                    f"(of the picture, of {8 * p})"
                )
        grids = [(image.shape[1] // p, image.shape[2] // p) for image in x]
        if isinstance(x, paddle.Tensor):
            return _patches(x, p), grids
        tokens = max(rows * columns for rows, columns in grids)
        single = [_patches(image.unsqueeze(0), p) for image in x]
        return paddle.concat([_padded(patches, tokens) for patches in single]), grids

    def _unpatchify(self, tokens: paddle.Tensor, grid: tuple[int, int]) -> paddle.Tensor:
        """The way back for one sample: [rows * columns, patch^2 * channels] -> [channels, H, W]."""
        (rows, columns), p, channels = grid, self.config.patch_size, self.config.in_channels
        pixels = tokens.reshape([rows, columns, p, p, channels]).transpose([4, 0, 2, 1, 3])
        return pixels.reshape([channels, rows * p, columns * p])

    def _check_positions(self, lengths: list[int], grids: list[tuple[int, int]]) -> None:
        """Images stand at position `caption length` of the first axis, so it must be one of its positions."""
        last = (max(lengths), max(rows for rows, _ in grids) - 1, max(columns for _, columns in grids) - 1)
        for what, position, limit in zip(
            ("caption tokens", "rows", "columns"), last, self.config.axes_lens, strict=True
        ):
            if position >= limit:
                raise ConfigError(
                    f"position {position} ({what}) is beyond axes_lens {list(self.config.axes_lens)}: "
                    "shorten the caption or the picture, or raise axes_lens in the transformer's config.json"
                )


def caption_lengths(cap_mask: paddle.Tensor) -> list[int]:
    """Tokens of each caption. Raises ConfigError unless a row of cap_mask [B, L], int64 or bool, is one or
    more ones, then zeros."""
    mask = cap_mask.numpy().astype(bool)
    lengths = mask.sum(axis=1)
    if not lengths.all():
        raise ConfigError("cap_mask has a row without tokens: an empty caption still has its <bos>")
    if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        raise ConfigError("cap_mask has padding before or between tokens: pad captions on the right")
    return lengths.tolist()


def token_positions(
    lengths: list[int], grids: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (caption, row, column) of the caption tokens, of the image tokens and of both in a row.

    Caption token k is at (k, 0, 0), the image of a caption of n tokens at (n, row, column), padding at
    (0, 0, 0). Each int64 [B, longest, 3].
    """
    captions = [np.stack([np.arange(n), np.zeros(n), np.zeros(n)], axis=1) for n in lengths]
    images = []
    for n, (rows, columns) in zip(lengths, grids, strict=True):
        row, column = np.divmod(np.arange(rows * columns), columns)
        images.append(np.stack([np.full_like(row, n), row, column], axis=1))
    both = [np.concatenate(pair) for pair in zip(captions, images, strict=True)]

    def stacked(parts: list[np.ndarray]) -> np.ndarray:
        longest = max(len(part) for part in parts)
        return np.stack([np.pad(part, ((0, longest - len(part)), (0, 0))) for part in parts]).astype("int64")

    return stacked(captions), stacked(images), stacked(both)


def _patches(x: paddle.Tensor, p: int) -> paddle.Tensor:
    b, c, h, w = x.shape
    patches = x.reshape([b, c, h // p, p, w // p, p]).transpose([0, 2, 4, 3, 5, 1])
    return patches.reshape([b, (h // p) * (w // p), p * p * c])


def _join(cap: paddle.Tensor, img: paddle.Tensor, lengths: list[int], counts: list[int]) -> paddle.Tensor:
    """[B, longest sum, dim]: each sample's caption, its image right after it, then zeros."""
    if len({*lengths}) == len({*counts}) == 1:
        return paddle.concat([cap, img], axis=1)
    longest = max(length + count for length, count in zip(lengths, counts, strict=True))
    rows = [
        paddle.concat([cap[i : i + 1, :length], img[i : i + 1, :count]], axis=1)
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]
    return paddle.concat([_padded(row, longest) for row in rows])


def _padded(x: paddle.Tensor, tokens: int) -> paddle.Tensor:
    """[B, n, dim] -> [B, tokens, dim] with zeros at the end."""
    if x.shape[1] == tokens:
        return x
    return F.pad(x, [0, 0, 0, tokens - x.shape[1], 0, 0], pad_from_left_axis=True)


def _check_sizes(dim: int, heads: int, kv_heads: int, axes_dims: Sequence[int], qk_norm: bool) -> None:
    advice = "correct the transformer's config.json"
    if dim % heads or heads % kv_heads:
        raise ConfigError(
            f"dim {dim} must be a multiple of n_heads {heads}, and that a multiple of n_kv_heads {kv_heads}: "
            f"{advice}"
        )
    if len(axes_dims) != 3 or sum(axes_dims) != dim // heads or any(part % 2 for part in axes_dims):
        raise ConfigError(
            f"axes_dims {list(axes_dims)} must be three even numbers that sum to dim / n_heads "
            f"= {dim // heads}: {advice}"
        )
    if not qk_norm:
        raise ConfigError(f"qk_norm is false, but every NewBie model normalises queries and keys: {advice}")


class Block(nn.Layer):
    """Attention and feed-forward, each between two norms. A modulated block scales what goes in and gates
    what comes out (tanh) by adaln [B, adaln_dim]; there is no shift. x: tokens [B, tokens, dim]; cos, sin:
    `rotary_angles` of all B * tokens positions, float32 [B * tokens, head_dim / 2]."""

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
