"""The mathematics of a FLUX block with a backward by hand, which keeps only what its saving policy names.

A `DoublePass` or `SinglePass` is one forward pass through one block: `forward` computes what the block's own
forward computes and holds what backward needs; `backward` gives the gradients of the block's inputs and of
the LoRAs on its Linears. Everything else in the block is frozen. The parts are in block_parts.py.

Bytes per block in U = tokens * width * 2 bytes, LoRA on every Linear, head_dim 128, groups of 128, bfloat16.
Each LoRA adds rank / width for its x A: at width 512 and rank 16 the blocks hold 10.4 and 9.8, 6.4 and 5.8,
5.4 and 4.9 U in all.

    held                             coat        +recompute  +attention
    inputs of LayerNorms             .52 each    .52         .52
    inputs of Linears                .5 each     rebuilt     rebuilt
    1 / rms of queries and keys      .03         .03         .03
    rotated q, k, and v              3           3           2.05
    attention's output               1           rebuilt     rebuilt
    GELU input                       2.06        2.06        2.06
    total of a double block          10.2        6.2         5.2
    total of a single block          9.7         5.7         4.7

Source: COAT (arXiv 2410.19313) section 5 for what to keep in FP8; the rest is the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import nn

from ppcoat.fp8.pointwise import gated_residual

from .block_parts import (
    Attention,
    Gelu,
    Keeper,
    LinearPart,
    ModulatedNorm,
    Projections,
    Tensors,
    backward_of_readers,
)
from .convert import sublayer_at
from .linear import LinearUse
from .policy import SavingPolicy


class BlockPass:
    """One pass through one block: what both kinds share. After backward, `linears` have the LoRA's
    gradients.
    """

    # In the order in which the block's own forward calls them: so dropout draws the same masks.
    linear_paths: tuple[str, ...] = ()

    def __init__(self, block: nn.Layer, policy: SavingPolicy, uses: dict[str, LinearUse]) -> None:
        self.block, self.keeper = block, Keeper(policy)
        self.linears = {path: LinearPart(self.keeper, use) for path, use in uses.items()}

    @classmethod
    def uses_of(cls, block: nn.Layer) -> dict[str, LinearUse]:
        """The block's Linears as they are now. A pass with the same uses repeats the same numbers."""
        return {path: LinearUse.of(sublayer_at(block, path)) for path in cls.linear_paths}

    def _modulation(self, norm: nn.Layer, vec: paddle.Tensor) -> list[paddle.Tensor]:
        return [self.keeper.plain(part.contiguous()).tensor for part in norm(vec)]


class SinglePass(BlockPass):
    """A single block: x [B, tokens, dim] -> the same shape."""

    linear_paths = ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out")

    def forward(
        self, x: paddle.Tensor, vec: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor
    ) -> Tensors:
        block, keeper = self.block, self.keeper
        up, *qkv, out = self.linears.values()
        shift, scale, self.gate = self._modulation(block.norm, vec)
        self.norm, self.attn, self.gelu = (
            ModulatedNorm(keeper, shift, scale),
            Attention(keeper),
            Gelu(keeper),
        )
        norms = (block.attn.norm_q, block.attn.norm_k)
        self.projections = Projections(keeper, qkv, norms, (cos, sin))
        y = self.norm.forward(x, (up, *qkv))
        mlp = self.gelu.forward(up.forward(y))
        both = paddle.concat([self.attn.forward(*self.projections.forward(y)), mlp], axis=-1)
        self.both = None
        if out.needs_x and not keeper.policy.recompute:
            self.both = keeper.packed(both, keeper.policy.linear_group_size)
        return (gated_residual(out.forward(both), self.gate, x),)

    def backward(self, grads: Tensors, needs_dx: bool) -> Tensors:
        (dy,) = grads
        up, *_, out = self.linears.values()
        attn = self.attn.again()

        def both() -> paddle.Tensor:
            if self.both is not None:
                return self.both.unpack()
            return paddle.concat([attn.output.flatten(2), self.gelu.result()], axis=-1)

        d_both = backward_of_readers([(out, gated_residual(dy, self.gate))], both)
        width = dy.shape[-1]
        do, d_mlp = paddle.split(d_both, [width, d_both.shape[-1] - width], axis=-1)
        du = self.gelu.backward(d_mlp)
        d_qkv = self.attn.backward(attn, do)
        linears = [(up, du), *self.projections.backward(d_qkv, self.attn.rotated(attn))]
        dx = backward_of_readers(linears, self.norm.result, needs_dx)
        return (self.norm.backward(dx).add_(dy),) if needs_dx else (None,)


class DoublePass(BlockPass):
    """A double block: img, txt [B, tokens, dim] -> the same shapes; text stands first in attention."""

    linear_paths = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        *("attn.to_out.0", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def forward(
        self,
        img: paddle.Tensor,
        txt: paddle.Tensor,
        vec: paddle.Tensor,
        cos: paddle.Tensor,
        sin: paddle.Tensor,
    ) -> Tensors:
        block, attn = self.block, self.block.attn
        linears, self.text_tokens = list(self.linears.values()), txt.shape[1]
        txt_angles = cos[: self.text_tokens], sin[: self.text_tokens]
        img_angles = cos[self.text_tokens :], sin[self.text_tokens :]
        img_projections = Projections(self.keeper, linears[0:3], (attn.norm_q, attn.norm_k), img_angles)
        txt_projections = Projections(
            self.keeper, linears[3:6], (attn.norm_added_q, attn.norm_added_k), txt_angles
        )
        self.img = _Stream(self.keeper, self._modulation(block.norm1, vec), img_projections)
        self.txt = _Stream(self.keeper, self._modulation(block.norm1_context, vec), txt_projections)
        self.img.out, self.txt.out, self.img.up, self.img.down, self.txt.up, self.txt.down = linears[6:]
        self.attn = Attention(self.keeper)
        heads = zip(self.txt.heads(txt), self.img.heads(img), strict=True)
        both = self.attn.forward(*(paddle.concat(pair, axis=1) for pair in heads))
        attn_txt, attn_img = self._split(both)
        return self.img.rest(img, attn_img), self.txt.rest(txt, attn_txt)

    def backward(self, grads: Tensors, needs_dx: bool) -> Tensors:
        d_img, d_txt = grads
        graph = self.attn.again()
        o_txt, o_img = self._split(graph.output.flatten(2))
        d_img, do_img = self.img.rest_backward(d_img, o_img)
        d_txt, do_txt = self.txt.rest_backward(d_txt, o_txt)
        d_qkv = self.attn.backward(graph, paddle.concat([do_txt, do_img], axis=1))
        d_qkv_txt, d_qkv_img = zip(*(self._split(d) for d in d_qkv), strict=True)
        results_txt, results_img = zip(*(self._split(x) for x in self.attn.rotated(graph)), strict=True)
        return (
            self.img.heads_backward(d_img, d_qkv_img, results_img, needs_dx),
            self.txt.heads_backward(d_txt, d_qkv_txt, results_txt, needs_dx),
        )

    def _split(self, both: paddle.Tensor | None) -> Sequence[paddle.Tensor | None]:
        """[B, tokens, ...] -> the text's and the image's part."""
        if both is None:
            return None, None
        parts = paddle.split(both, [self.text_tokens, both.shape[1] - self.text_tokens], axis=1)
        return [part.contiguous() for part in parts]


class _Stream:
    """Image or text in a double block: `heads` before attention, `rest` after it."""

    out: LinearPart
    up: LinearPart
    down: LinearPart

    def __init__(self, keeper: Keeper, modulation: Sequence[paddle.Tensor], projections: Projections) -> None:
        shift_a, scale_a, self.gate_a, shift_m, scale_m, self.gate_m = modulation
        self.norm1, self.norm2 = (
            ModulatedNorm(keeper, shift_a, scale_a),
            ModulatedNorm(keeper, shift_m, scale_m),
        )
        self.projections, self.gelu = projections, Gelu(keeper)

    def heads(self, h: paddle.Tensor) -> list[paddle.Tensor]:
        return self.projections.forward(self.norm1.forward(h, self.projections.linears))

    def rest(self, h: paddle.Tensor, o: paddle.Tensor) -> paddle.Tensor:
        h = gated_residual(self.out.forward(o), self.gate_a, h)
        mlp = self.gelu.forward(self.up.forward(self.norm2.forward(h, (self.up,))), self.down)
        return gated_residual(self.down.forward(mlp), self.gate_m, h)

    def rest_backward(self, dy: paddle.Tensor, o: paddle.Tensor) -> Tensors:
        """dy -> gradients of h (the part that does not go through attention) and of o."""
        d_mlp = backward_of_readers([(self.down, gated_residual(dy, self.gate_m))], self.gelu.result)
        du = self.gelu.backward(d_mlp)
        dh = self.norm2.backward(backward_of_readers([(self.up, du)], self.norm2.result)).add_(dy)
        return dh, backward_of_readers([(self.out, gated_residual(dh, self.gate_a))], lambda: o)

    def heads_backward(
        self,
        dh: paddle.Tensor,
        d_qkv: Sequence[paddle.Tensor],
        results: Sequence[paddle.Tensor | None],
        needs_dx: bool,
    ) -> paddle.Tensor | None:
        dx = backward_of_readers(self.projections.backward(d_qkv, results), self.norm1.result, needs_dx)
        return self.norm1.backward(dx).add_(dh) if needs_dx else None
