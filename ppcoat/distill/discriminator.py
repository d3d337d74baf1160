"""The discriminator: frozen FLUX blocks see a noisy picture, and a small head on each judges what it sees.

A head is a 1x1 network on image tokens, as in phased consistency models (arXiv 2405.18407): two layers of
width dim with GroupNorm(32) and LeakyReLU, the second with a residual, then one score per token. At FLUX.1's
width a head has 18.9 M parameters, the 57 of them 1,077 M: twelve times a LoRA of rank 16.

Heads never exist all at once in memory: each runs, forward and backward, as soon as its block has given its
features. The gradients are those of running them together, because no head sees another's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from ppcoat.nn.saved_tensors import saved_as_they_are, saver

GROUPS = 32
EPSILON = 1e-5


class Head(nn.Layer):
    """Image tokens [B, tokens, dim] -> scores [B, tokens, 1] in their dtype; parameters are float32."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.conv1, self.norm1 = _linear(dim, dim, rng), GroupNorm(dim)
        self.conv2, self.norm2 = _linear(dim, dim, rng), GroupNorm(dim)
        self.conv_out = _linear(dim, 1, rng)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = F.leaky_relu(self.norm1(_apply(self.conv1, x)), 0.01)
        x = F.leaky_relu(self.norm2(_apply(self.conv2, x)), 0.01) + x
        return _apply(self.conv_out, x)


class GroupNorm(nn.Layer):
    """GroupNorm over tokens and the channels of a group, for [B, tokens, dim]; computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.groups = math.gcd(GROUPS, dim)  # 32 for FLUX; small models may be narrower than that
        self.weight = self.create_parameter([dim], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([dim], is_bias=True)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        batch, tokens, dim = x.shape
        y = x.astype("float32").reshape([batch, tokens, self.groups, dim // self.groups])
        y = y - y.mean([1, 3], keepdim=True)
        y = y * (y.square().mean([1, 3], keepdim=True) + EPSILON).rsqrt()
        return (y.reshape([batch, tokens, dim]) * self.weight + self.bias).astype(x.dtype)


def discriminator_hinge(scores: paddle.Tensor, is_real: bool) -> paddle.Tensor:
    """Scores of one head [B, tokens, 1] -> scalar float32: real ones should be above 1, fakes below -1."""
    scores = scores.astype("float32")
    return F.relu(1.0 - scores if is_real else 1.0 + scores).mean()


def generator_hinge(scores: paddle.Tensor) -> paddle.Tensor:
    """Scores that one head gives to fakes [B, tokens, 1] -> scalar float32: they should be above 1."""
    return F.relu(1.0 - scores.astype("float32")).mean()


class Discriminator(nn.Layer):
    """Heads on the blocks of a transformer. blocks "fixed": on all; "published": on every other one.

    The transformer is not part of it, so that its parameters are those of the heads alone.
    """

    def __init__(self, transformer: nn.Layer, seed: int = 0, blocks: str = "fixed") -> None:
        super().__init__()
        chosen = list(transformer.named_blocks())[:: 2 if blocks == "published" else 1]
        self.paths = chosen
        self.heads = nn.LayerList([Head(transformer.inner_dim, seed + i) for i in range(len(chosen))])

    def train_heads(
        self, transformer: nn.Layer, run: Callable[[], object], is_real: bool, weight: float = 1.0
    ) -> paddle.Tensor:
        """Add `weight` times the gradients of the hinge loss to those of the heads -> the loss, a float32
        scalar.

        run(): a pass of noisy pictures through `transformer`. Of the loss, the mean over heads, only values
        leave a head: its graph is gone when the next one runs, and no pass saves anything.
        """
        losses = []

        def judge(head: Head, features: paddle.Tensor) -> None:
            features = features.detach()
            with paddle.enable_grad(), saved_as_they_are():
                loss = discriminator_hinge(head(features), is_real)
                (loss * (weight / len(self.heads))).backward()
            losses.append(loss.detach())

        with paddle.no_grad(), self._on_features(transformer, judge):
            run()
        return paddle.stack(losses).mean()

    def generator_loss(self, transformer: nn.Layer, run: Callable[[], object]) -> paddle.Tensor:
        """The hinge loss of fakes, a float32 scalar, mean over heads, with its graph back to what run() put
        in.

        Heads get no gradients. Each is run backward at once; until the blocks' own backward, only the
        gradient of its features is saved.
        """
        losses = []

        def judge(head: Head, features: paddle.Tensor) -> None:
            leaf = features.detach()
            leaf.stop_gradient = False
            with paddle.enable_grad(), saved_as_they_are():
                loss = generator_hinge(head(leaf)) / len(self.heads)
                (gradient,) = paddle.grad(loss, leaf)
            losses.append(_WithGradient.apply(features, _LossAndGradient(loss.detach(), gradient)))

        for parameter in self.parameters():
            parameter.stop_gradient = True
        try:
            with self._on_features(transformer, judge):
                run()
        finally:
            for parameter in self.parameters():
                parameter.stop_gradient = False
        return paddle.stack(losses).sum()

    @contextmanager
    def _on_features(
        self, transformer: nn.Layer, judge: Callable[[Head, paddle.Tensor], None]
    ) -> Iterator[None]:
        """Context manager: judge(head, image tokens [B, tokens, dim]) is called after each block with one."""
        image_tokens = [0]

        def note_size(layer: nn.Layer, inputs: tuple) -> None:
            image_tokens[0] = inputs[0].shape[1]

        def after(head: Head) -> Callable:
            def hook(layer: nn.Layer, inputs: tuple, outputs: Any) -> None:
                # a double block gives (image, text), a single one both in a row, text first
                image = outputs[0] if isinstance(outputs, tuple | list) else outputs[:, -image_tokens[0] :]
                judge(head, image)

            return hook

        blocks = transformer.named_blocks()
        hooks = [transformer.x_embedder.register_forward_pre_hook(note_size)]
        hooks += [
            blocks[path].register_forward_post_hook(after(head))
            for path, head in zip(self.paths, self.heads, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _LossAndGradient:
    """A loss and its gradient for some features; hides both from PyLayer.apply, which takes tensors for
    inputs that want gradients."""

    def __init__(self, loss: paddle.Tensor, gradient: paddle.Tensor) -> None:
        self.loss, self.gradient = loss, gradient


class _WithGradient(PyLayer):
    """features -> a loss that is known already, with a gradient that is known already."""

    @staticmethod
    def forward(ctx, features: paddle.Tensor, known: _LossAndGradient) -> paddle.Tensor:
        ctx.gradient = known.gradient
        saver().save_plain(known.gradient)
        return known.loss.clone()

    @staticmethod
    def backward(ctx, upstream: paddle.Tensor) -> paddle.Tensor:
        return ctx.gradient * upstream.astype(ctx.gradient.dtype)


def _linear(dim_in: int, dim_out: int, rng: np.random.Generator) -> nn.Linear:
    """A Linear [in, out] that starts as a 1x1 convolution does in the reference: uniform in 1/sqrt(in)."""
    bound = 1.0 / math.sqrt(dim_in)
    linear = nn.Linear(dim_in, dim_out)
    linear.weight.set_value(rng.uniform(-bound, bound, [dim_in, dim_out]).astype("float32"))
    linear.bias.set_value(rng.uniform(-bound, bound, [dim_out]).astype("float32"))
    return linear


def _apply(linear: nn.Linear, x: paddle.Tensor) -> paddle.Tensor:
    return F.linear(x, linear.weight.astype(x.dtype), linear.bias.astype(x.dtype))
