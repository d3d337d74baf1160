"""The autoencoder picture by picture, and in tiles: what `enable_slicing()` and `enable_tiling()` of
ppdiffusers' AutoencoderKL ask for, whose own tiles want a `post_quant_conv` that FLUX has not.

Only where a picture is large does an autoencoder need much memory: the stages next to the pixels go tile by
tile, those next to the latents over the whole picture, as does attention (some rows of scores at a time). A
tile comes with a margin as wide as its convolutions see, which is cut off, so they give what they give for
the whole picture. What is left are the group norms, whose statistics are of the whole picture: rounds over
all tiles gather them, each with the statistics of the round before, the first with the tile's own. All tiles
are then normalised alike, so there is no seam; after as many rounds as there are norms, only rounding is
left. With ROUNDS, pixels of the built-in tiny FLUX differ by less than one level of 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers import AutoencoderKL

TILE = 512  # pixels along a side, without the margin
ROUNDS = 3
SCORES = 2**25  # of attention at a time

# A group norm, its input [1, C, h, w] -> its output.
Norm = Callable[[nn.GroupNorm, paddle.Tensor], paddle.Tensor]


@dataclass(frozen=True)
class _Step:
    """run(x [1, C, h, w], norm) -> its output, `factor` times as large; radius: pixels of x beyond its own
    that an output pixel sees."""

    run: Callable[[paddle.Tensor, Norm], paddle.Tensor]
    radius: int
    factor: float = 1


@dataclass
class _SharedNorms:
    """Group norms with the statistics of all tiles together. known: by the norm's place in a tile, mean and
    variance float32 [groups] of the last round; found: (pixels, mean, variance) of each tile of this one."""

    known: list[tuple[paddle.Tensor, paddle.Tensor]] = field(default_factory=list)
    found: list[list[tuple[int, paddle.Tensor, paddle.Tensor]]] = field(default_factory=list)

    def of_tile(self, own: Callable[[paddle.Tensor], paddle.Tensor]) -> Norm:
        """The norm of a tile. own: what is its own of a tensor [1, C, h, w] at any stage, the margin cut
        off."""
        place = iter(range(10**6))

        def norm(layer: nn.GroupNorm, x: paddle.Tensor) -> paddle.Tensor:
            index = next(place)
            inner = own(x)
            mean, variance = _statistics(inner, layer._num_groups)
            if index == len(self.found):
                self.found.append([])
            self.found[index].append((inner.shape[2] * inner.shape[3], mean, variance))
            return _normalized(layer, x, *(self.known[index] if self.known else (mean, variance)))

        return norm

    def share(self) -> None:
        """End a round."""
        self.known = [_pooled(tiles) for tiles in self.found]
        self.found = []


def through_decoder(vae: AutoencoderKL, latents: paddle.Tensor) -> paddle.Tensor:
    """Latents [B, C, h, w] as the VAE takes them -> pixels [B, 3, h * factor, w * factor], both in its
    dtype; as vae.use_tiling and vae.use_slicing say."""
    if not vae.use_tiling or _is_one_tile(latents, _tile(vae) // _factor(vae)):
        return vae.decode(latents).sample
    return paddle.concat([_tiled_decode(vae, picture) for picture in latents.split(latents.shape[0])])


def through_encoder(vae: AutoencoderKL, pixels: paddle.Tensor) -> Any:
    """Pixels [B, 3, height, width] in -1..1 in the VAE's dtype -> its distribution of latents; as
    vae.use_tiling and vae.use_slicing say."""
    if not vae.use_tiling or _is_one_tile(pixels, _tile(vae)):
        return vae.encode(pixels).latent_dist
    from ppdiffusers.models.vae import DiagonalGaussianDistribution

    pictures = pixels.split(pixels.shape[0])
    return DiagonalGaussianDistribution(paddle.concat([_tiled_encode(vae, each) for each in pictures]))


def decoded_at_once(vae: AutoencoderKL) -> int:
    """Pixels along a side of the largest tile that is decoded, with its margins."""
    return _tile(vae) + 2 * _margin(_decoder_steps(vae)) * _factor(vae) // 2


def _tiled_decode(vae: AutoencoderKL, latents: paddle.Tensor) -> paddle.Tensor:
    """Of one picture [1, C, h, w]."""
    decoder = vae.decoder
    x = latents if vae.post_quant_conv is None else vae.post_quant_conv(latents)
    x = decoder.up_blocks[0](_middle(decoder.mid_block, decoder.conv_in(x)))
    return _in_tiles(x, _decoder_steps(vae), 2 * _tile(vae) // _factor(vae))


def _decoder_steps(vae: AutoencoderKL) -> list[_Step]:
    """From twice the size of the latents on."""
    decoder = vae.decoder
    steps = [step for block in decoder.up_blocks[1:] for step in _stage(block, block.upsamplers, 2)]
    return [*steps, _Step(lambda x, norm: decoder.conv_out(F.silu(norm(decoder.conv_norm_out, x))), 1)]


def _tiled_encode(vae: AutoencoderKL, pixels: paddle.Tensor) -> paddle.Tensor:
    """Of one picture [1, 3, height, width] -> moments."""
    encoder = vae.encoder
    steps = [_Step(lambda x, norm: encoder.conv_in(x), 1)]
    for block in encoder.down_blocks[:-2]:
        steps += _stage(block, block.downsamplers, 0.5)
    x = _in_tiles(pixels, steps, _tile(vae))
    for block in encoder.down_blocks[-2:]:
        x = block(x)
    x = _middle(encoder.mid_block, x)
    x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
    return x if vae.quant_conv is None else vae.quant_conv(x)


def _stage(block: nn.Layer, resampling: nn.LayerList | None, factor: float) -> Iterator[_Step]:
    """The steps of a block. What makes a picture smaller sees two pixels to the right and below."""
    for resnet in block.resnets:
        yield _Step(lambda x, norm, resnet=resnet: _resnet(resnet, x, norm), 2)
    for layer in resampling or ():
        yield _Step(lambda x, norm, layer=layer: layer(x), 1 if factor > 1 else 2, factor)


def _in_tiles(x: paddle.Tensor, steps: list[_Step], side: int) -> paddle.Tensor:
    """The steps over x [1, C, h, w], a tile of at most side x side at a time -> [1, C', h * factor, w *
    factor]."""
    rows, columns = (_spans(length, side, _margin(steps), _whole(steps)) for length in x.shape[2:])
    norms = _SharedNorms()
    for _ in range(ROUNDS):
        for row in rows:
            for column in columns:
                _tile_of(x, steps, row, column, norms)
        norms.share()
    return paddle.concat(
        [paddle.concat([_tile_of(x, steps, row, column, norms) for column in columns], 3) for row in rows], 2
    )


def _margin(steps: list[_Step]) -> int:
    """Pixels beside a tile that its own see."""
    size, margin = 1.0, 0.0
    for step in steps:
        margin += step.radius / size
        size *= step.factor
    return math.ceil(margin / _whole(steps)) * _whole(steps)


def _whole(steps: list[_Step]) -> int:
    """A tile begins at a multiple of it, where a pixel of the output does."""
    return max(1, round(1 / math.prod(step.factor for step in steps)))


@dataclass(frozen=True)
class _Span:
    """start, stop: of a tile with its margins, along one side; first, last: of what is its own, in it."""

    start: int
    stop: int
    first: int
    last: int

    def inner(self, length: int) -> slice:
        """What is its own, where the tile is `length` long."""
        scale = length / (self.stop - self.start)
        return slice(round(self.first * scale), round(self.last * scale))


def _spans(length: int, side: int, margin: int, whole: int) -> list[_Span]:
    count = math.ceil(length / side)
    edges = [round(i * length / count / whole) * whole for i in range(count)] + [length]
    spans = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        start = max(0, first - margin)
        spans.append(_Span(start, min(length, last + margin), first - start, last - start))
    return spans


def _tile_of(
    x: paddle.Tensor, steps: list[_Step], row: _Span, column: _Span, norms: _SharedNorms
) -> paddle.Tensor:
    def own(x: paddle.Tensor) -> paddle.Tensor:
        return x[:, :, row.inner(x.shape[2]), column.inner(x.shape[3])]

    norm = norms.of_tile(own)
    x = x[:, :, row.start : row.stop, column.start : column.stop]
    for step in steps:
        x = step.run(x, norm)
    return own(x)


def _resnet(block: nn.Layer, x: paddle.Tensor, norm: Norm) -> paddle.Tensor:
    """ppdiffusers' ResnetBlock2D without time, its norms by `norm`."""
    h = block.conv1(F.silu(norm(block.norm1, x)))
    h = block.conv2(F.silu(norm(block.norm2, h)))
    return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + h


def _middle(block: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    x = block.resnets[0](x, None)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = resnet(x if attention is None else _attended(attention, x), None)
    return x


def _attended(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """ppdiffusers' Attention of one head over the pixels of x [1, C, h, w], at most SCORES scores at once."""
    tokens = layer.group_norm(x.flatten(2)).transpose([0, 2, 1])
    q, k, v = layer.to_q(tokens), layer.to_k(tokens).transpose([0, 2, 1]), layer.to_v(tokens)
    rows = max(1, SCORES // q.shape[1])
    attended = []
    for start in range(0, q.shape[1], rows):
        scores = (q[:, start : start + rows] @ k * layer.scale).astype("float32")
        attended.append(F.softmax(scores, axis=-1).astype(v.dtype) @ v)
    out = layer.to_out[0](paddle.concat(attended, 1))
    return out.transpose([0, 2, 1]).reshape(x.shape) + x


def _statistics(x: paddle.Tensor, groups: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mean and variance float32 [groups] of x [1, C, h, w], in parts: they are float32 for a moment."""
    parts = math.gcd(groups, 8)
    rows = (part.reshape([groups // parts, -1]).astype("float32") for part in x.split(parts, 1))
    found = [(part.mean(-1), part.var(-1, unbiased=False)) for part in rows]
    return tuple(paddle.concat(each) for each in zip(*found, strict=True))


def _pooled(tiles: list[tuple[int, paddle.Tensor, paddle.Tensor]]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Mean and variance of all pixels, of those of the tiles."""
    total = sum(count for count, _, _ in tiles)
    mean = sum(mean * (count / total) for count, mean, _ in tiles)
    variance = sum((own + (there - mean).square()) * (count / total) for count, there, own in tiles)
    return mean, variance


def _normalized(
    layer: nn.GroupNorm, x: paddle.Tensor, mean: paddle.Tensor, variance: paddle.Tensor
) -> paddle.Tensor:
    """What the layer gives for x [1, C, h, w] with statistics [groups] of a larger picture."""
    each = x.shape[1] // layer._num_groups
    mean, variance = (values.repeat_interleave(each) for values in (mean, variance))
    weight, bias = (values.astype("float32") for values in (layer.weight, layer.bias))
    return F.batch_norm(x, mean, variance, weight, bias, epsilon=layer._epsilon)


def _tile(vae: AutoencoderKL) -> int:
    return min(TILE, vae.config.sample_size)


def _factor(vae: AutoencoderKL) -> int:
    """Pixels along a side of a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _is_one_tile(x: paddle.Tensor, side: int) -> bool:
    return max(x.shape[2:]) <= side
