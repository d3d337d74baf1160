"""Attention and rotary position embedding: the operations of FLUX that mix or mark token positions.

Both take and return [batch, tokens, heads, head_dim], the layout in which the Linears leave their output.
"""

import paddle
import paddle.nn.functional as F

from ppcoat.fp8.norm import turned


def attention(q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, without a mask.

    q, k, v and the result: [batch, tokens, heads, head_dim] of one floating dtype; k and v may have another
    number of tokens than q. Half precision on a GPU goes to flash attention; everything else is written out
    in matmuls, which on CPU takes a third of the time of Paddle's own composed form.
    """
    if uses_flash_attention(q):
        return F.scaled_dot_product_attention(q, k, v)
    q, k, v = (_swap_tokens_and_heads(x) for x in (q * q.shape[-1] ** -0.5, k, v))
    weights = F.softmax(paddle.matmul(q, k, transpose_y=True), axis=-1)
    return _swap_tokens_and_heads(paddle.matmul(weights, v))


def uses_flash_attention(q: paddle.Tensor) -> bool:
    """Whether `attention` keeps q, k, v, the output and a row statistic for backward, and no score matrix."""
    # While a static graph is traced, tensors have no place yet: it will be the current device.
    on_gpu = q.place.is_gpu_place() if paddle.in_dynamic_mode() else paddle.get_device().startswith("gpu")
    return on_gpu and q.dtype in (paddle.bfloat16, paddle.float16)


def _swap_tokens_and_heads(x: paddle.Tensor) -> paddle.Tensor:
    """[batch, a, b, d] -> [batch, b, a, d], contiguous.

    `paddle.transpose` returns a strided view, and making that contiguous takes 3 ms for 400k floats on a CPU
    core. Shuffling a*b channels in a groups is the same permutation, and its kernel takes 0.2 ms.
    """
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
    return turned(x, cos, sin)


class _Rotate(paddle.autograd.PyLayer):
    """The backward of a rotation is the rotation back, so only cos and sin are kept, and nothing of x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensor()
        return turned(grad, cos, -sin)
