"""The ops that models call by their mathematical names. Here, and nowhere else, it is decided what a block
saves for backward.

An op is its plain formula, `compute`, and a backward by hand. When a gradient is wanted it asks the active
Saver (saved_tensors.py) what to save of its inputs: as they are, in FP8, in FP8 with a 4-bit residual, or
nothing where another op can give it back. Under "+recompute" an op offers its result (attention under every
policy): a Linear that wants its input for a LoRA, or an op that wants it, then saves nothing and asks for it
in backward. Under the policy "none" autograd differentiates the plain formula.

Bytes in U = tokens * width * 2 bytes of a FLUX block with a LoRA on every Linear, head_dim 128, groups of
128, bfloat16. Each LoRA adds rank / width for its x A: at width 512 and rank 16 the blocks save 10.4 and 9.8,
6.4 and 5.8, 5.4 and 4.9 U in all.

    saved                            coat        +recompute  +attention
    inputs of modulated norms        .52 each    .52         .52
    inputs of Linears                .5 each     again       again
    1 / rms of queries and keys      .03         .03         .03
    rotated q, k, and v              3           3           2.05
    attention's output               1           again       again
    GELU's input                     2.06        2.06        2.06
    total of a double block          10.2        6.2         5.2
    total of a single block          9.7         5.7         4.7

Formulas and kernels, forward and backward, are in fp8/norm.py and fp8/pointwise.py; attention's are in
attention.py. Source: COAT (arXiv 2410.19313) section 5 for what to save in FP8; the rest is the chain rule.

Dtypes: inputs are of one floating dtype, that in which the model computes (cosines and sines float32), and so
is the result. Statistics are float32 inside.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F

from ppcoat.fp8 import norm, pointwise
from ppcoat.fp8.formats import NORM_EPSILON

from . import attention as plain
from .op import OpCall, Tensors, run_op
from .saved_forms import codes_or_floats
from .saved_tensors import Saver

# Largest ratio of weights of an RMSNorm at which its input is recovered by dividing its output by them.
WEIGHT_RATIO = 64.0


def modulated_norm(h: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor) -> paddle.Tensor:
    """LayerNorm(h) (1 + scale) + shift. h and the result [B, tokens, dim]; shift, scale [B, 1, dim]."""
    return run_op(_ModulatedNorm, h, shift, scale)


def rms_norm(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    scale: paddle.Tensor | None = None,
    epsilon: float = NORM_EPSILON,
) -> paddle.Tensor:
    """x / rms(x) weight, times 1 + scale if there is one. x and the result [B, tokens, dim], weight [dim],
    scale [B, 1, dim]."""
    return run_op(_RMSNorm, x, weight, scale, epsilon=epsilon)


@paddle.jit.not_to_static  # a transcribed function does not see the global of a default
def rms_norm_rotated(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    cos: paddle.Tensor,
    sin: paddle.Tensor,
    epsilon: float = NORM_EPSILON,
) -> paddle.Tensor:
    """Queries or keys, RMS-normalised in each head and turned by the angles of their tokens.

    x [B, tokens, dim] or [B, tokens, heads, head_dim] -> [B, tokens, heads, head_dim]; weight [head_dim]; cos
    and sin float32 [tokens, head_dim / 2], or [B * tokens, head_dim / 2] where samples differ. The result has
    to go to `attention`, which gives it back in backward (an AssertionError there says if it did not).
    """
    return run_op(_RMSNormRotated, x, weight, cos, sin, epsilon=epsilon)


def attention(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, padding: plain.Padding | None = None
) -> paddle.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over each sample's tokens. q [B, tokens, heads, head_dim], k and v
    [B, tokens, key heads, head_dim], padding as `padding_of` gives it -> [B, tokens, heads * head_dim]."""
    (o,) = run_op(plain.AttentionCall, q, k, v, padding=padding)
    return o


def joint_attention(first: Tensors, second: Tensors) -> Tensors:
    """`attention` over the tokens of two streams in a row. Each comes as (q, k, v) [B, tokens, heads,
    head_dim] and gets its own rows of the result [B, tokens, heads * head_dim]."""
    return run_op(plain.AttentionCall, *first, *second)


def gelu(u: paddle.Tensor) -> paddle.Tensor:
    """GELU in its tanh form, of u [B, tokens, dim]."""
    return run_op(_Gelu, u)


def gated_silu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) up, both [B, tokens, dim]: the inner product of a SwiGLU feed-forward."""
    return run_op(_GatedSilu, gate, up)


def gated_residual(y: paddle.Tensor, gate: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """x + gate y. x, y and the result [B, tokens, dim]; gate [B, 1, dim]."""
    return run_op(_GatedResidual, y, gate, x)


def concat(*parts: paddle.Tensor) -> paddle.Tensor:
    """Results of ops [B, tokens, dim_i], side by side -> [B, tokens, sum of dim_i]."""
    return run_op(_Concat, *parts)


class _ModulatedNorm(OpCall):
    compute = norm.modulated_norm

    def forward(self, h, shift, scale):
        self.h, (self.shift, self.scale) = self.saver.save(h), _small(self.saver, shift, scale)
        return norm.modulated_norm(h, self.shift, self.scale)

    def again(self):
        h, groups = codes_or_floats(self.h)
        return norm.modulated_norm(h, self.shift, self.scale, groups)

    def backward(self, dy):
        wants_h, wants_shift, wants_scale = self.wants
        h, groups = codes_or_floats(self.h)
        dh = norm.modulated_norm_grad(h, self.scale, dy, groups) if wants_h else None
        dshift = _sum_of_tokens(dy, self.shift) if wants_shift else None
        if not wants_scale:
            return dh, dshift, None
        zero = paddle.zeros_like(self.scale)
        return dh, dshift, _sum_of_tokens(dy * norm.modulated_norm(h, zero, zero, groups), self.scale)


class _RMSNorm(OpCall):
    compute = norm.rms_norm

    def forward(self, x, weight, scale):
        self.x, self.weight = self.saver.save(x), weight
        (self.scale,) = (None,) if scale is None else _small(self.saver, scale)
        return norm.rms_norm(x, weight, self.scale, **self.settings)

    def again(self):
        x, groups = codes_or_floats(self.x)
        return norm.rms_norm(x, self.weight, self.scale, groups=groups, **self.settings)

    def backward(self, dy):
        wants_x, wants_weight, wants_scale = self.wants
        x, groups = codes_or_floats(self.x)
        dx = dweight = dscale = None
        if wants_x:
            dx = norm.rms_norm_grad(x, self.weight, self.scale, dy, groups=groups, **self.settings)
        if wants_weight:
            ones = paddle.ones_like(self.weight)
            g = dy * norm.rms_norm(x, ones, self.scale, groups=groups, **self.settings)
            dweight = _sum_of_rows(g, self.weight)
        if wants_scale:
            y = norm.rms_norm(x, self.weight, groups=groups, **self.settings)
            dscale = _sum_of_tokens(dy * y, self.scale)
        return dx, dweight, dscale


class _RMSNormRotated(OpCall):
    """Saves 1 / rms alone where it can: `attention` gives the result back in backward, and turned back and
    divided by the weight that is the normalised input. Else it saves its input."""

    output: paddle.Tensor | None = None

    @staticmethod
    def compute(x, weight, cos, sin, epsilon):
        x = plain.split_heads(x, weight.shape[0])
        return norm.rms_norm_rotated(_rows_of(cos, x), weight, (cos, sin), epsilon)[0].reshape(x.shape)

    @classmethod
    def differentiable(cls, x, weight, cos, sin, epsilon):
        x = plain.split_heads(x, weight.shape[0])
        y = norm.rms_norm.reference(x, weight, epsilon=epsilon)
        return plain.rotate(_rows_of(cos, y), cos, sin).reshape(x.shape)

    def forward(self, x, weight, cos, sin):
        self.shape, self.weight, self.angles = x.shape, weight, (cos, sin)
        self.inverts = self.saver.policy.invert_head_norms and not self.wants[1] and _divides(weight)
        x = plain.split_heads(x, weight.shape[0])
        y, rstd = norm.rms_norm_rotated(_rows_of(cos, x), weight, self.angles, **self.settings)
        if self.inverts:
            self.rstd = self.saver.save_plain(rstd, statistic=True).tensor
        else:
            self.x = self.saver.save(x.flatten(2))
        return y.reshape(x.shape)

    def tell(self, result):
        if self.inverts:
            self.saver.wants_back(result, self)

    def backward(self, dy):
        dy = _rows_of(self.angles[0], dy)
        if self.inverts:
            assert self.output is not None, (
                "a rotated norm's result went elsewhere than to ops.attention with gradients"
            )
            y, self.output = _rows_of(self.angles[0], self.output), None
            dx = norm.rms_norm_rotated_grad(dy, y, self.rstd, self.weight, self.angles)
            return dx.reshape(self.shape), None, None, None
        cos, sin = self.angles
        dy = norm.apply_rope(dy, cos, -sin)
        x = plain.split_heads(self.x.unpack(), self.weight.shape[0]).reshape(dy.shape)
        dx = dweight = None
        if self.wants[0]:
            dx = norm.rms_norm_grad(x, self.weight, None, dy, **self.settings).reshape(self.shape)
        if self.wants[1]:
            ones = paddle.ones_like(self.weight)
            dweight = _sum_of_rows(dy * norm.rms_norm(x, ones, **self.settings), self.weight)
        return dx, dweight, None, None


class _Gelu(OpCall):
    compute = pointwise.gelu

    def forward(self, u):
        self.u = self.saver.save(u)
        return pointwise.gelu(u)

    def again(self):
        return pointwise.gelu(*codes_or_floats(self.u))

    def backward(self, dy):
        u, groups = codes_or_floats(self.u)
        return (pointwise.gelu_grad(u, dy, groups),)


class _GatedSilu(OpCall):
    @staticmethod
    def compute(gate, up):
        return pointwise.silu(gate) * up

    @classmethod
    def differentiable(cls, gate, up):
        return F.silu(gate) * up

    def forward(self, gate, up):
        self.gate, self.up = self.saver.save(gate), self.saver.save(up)
        return self.compute(gate, up)

    def again(self):
        return pointwise.silu(*codes_or_floats(self.gate)).multiply_(self.up.unpack())

    def backward(self, dy):
        gate, groups = codes_or_floats(self.gate)
        dgate = pointwise.silu_grad(gate, dy * self.up.unpack(), groups) if self.wants[0] else None
        return dgate, pointwise.silu(gate, groups).multiply_(dy) if self.wants[1] else None


class _GatedResidual(OpCall):
    compute = pointwise.gated_residual

    @classmethod
    def differentiable(cls, y, gate, x):
        return x + gate * y

    def forward(self, y, gate, x):
        (self.gate,) = _small(self.saver, gate)
        self.y = (self.saver.offered(y) or self.saver.save(y)) if self.wants[1] else None
        return pointwise.gated_residual(y, self.gate, x)

    def tell(self, result):
        """The result is the stream itself, which nobody has to compute again."""

    def backward(self, dz):
        dy = pointwise.gated_residual(dz, self.gate) if self.wants[0] else None
        dgate = _sum_of_tokens(dz * self.y.unpack(), self.gate) if self.wants[1] else None
        return dy, dgate, dz


class _Concat(OpCall):
    @staticmethod
    def compute(*parts):
        return paddle.concat(parts, axis=-1)

    def forward(self, *parts):
        self.widths, self.parts = [x.shape[-1] for x in parts], [None]
        if self.saver.policy.recompute:
            self.parts = [self.saver.offered(x) for x in parts]
        return self.compute(*parts)

    def tell(self, result):
        if None not in self.parts:
            self.saver.offer(result, self.again)

    def again(self):
        return self.compute(*(part.unpack() for part in self.parts))

    def backward(self, dy):
        return [d.contiguous() for d in paddle.split(dy, self.widths, axis=-1)]


def _small(active: Saver, *parts: paddle.Tensor) -> list[paddle.Tensor]:
    """Shifts, scales and gates [B, 1, dim], saved as they are."""
    return [active.save_plain(part).tensor for part in parts]


def look_at_weights_again(model: paddle.nn.Layer) -> None:
    """Forget what was found out about the weights of head norms in `model`: they got other values."""
    for parameter in model.parameters():
        if hasattr(parameter, "divides"):
            del parameter.divides


def _divides(weight: paddle.Tensor) -> bool:
    """Whether no weight of an RMSNorm is too small to divide by. Looked at once, because it waits for the
    device; see `look_at_weights_again`."""
    if not hasattr(weight, "divides"):
        size = weight.detach().abs()
        weight.divides = bool((size.max() < WEIGHT_RATIO * size.min()).item())
    return weight.divides


def _rows_of(cos: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """x [B, tokens, heads, head_dim] with a row for each of `cos`: samples end to end where angles are."""
    return x if cos.shape[0] == x.shape[1] else x.reshape([1, -1, *x.shape[2:]])


def _sum_of_tokens(x: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
    """[B, tokens, dim] -> [B, 1, dim], or [1, 1, dim] where one row of `like` served all samples; added up in
    float32."""
    axes = [0, 1] if like.shape[0] == 1 else 1
    return x.astype("float32").sum(axis=axes, keepdim=True).astype(x.dtype)


def _sum_of_rows(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """[..., D] -> [D] in the weight's dtype, added up in float32."""
    return x.astype("float32").reshape([-1, x.shape[-1]]).sum(axis=0).astype(weight.dtype)
