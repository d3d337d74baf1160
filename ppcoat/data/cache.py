"""VAE latents and text embeddings, computed once before training and handed out in batches.

Kept in main memory. The trainer knows only batch() and text(), so where the entries lie can change behind
them. Encoders come as functions, so nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from tqdm import tqdm

from ppcoat.data.captions import dropped_captions, final_caption
from ppcoat.data.sources import Item, load_image
from ppcoat.errors import ConfigError

# pixels float32 [N, 3, H, W] in [-1, 1] -> latents [N, C, h, w]: the VAE posterior's mean, shifted and scaled
EncodeImage = Callable[[paddle.Tensor], paddle.Tensor]
# N captions -> (prompt_embeds [N, T, D], pooled [N, P])
EncodeText = Callable[[list[str]], tuple[paddle.Tensor, paddle.Tensor]]


@dataclass(frozen=True)
class TrainingCache:
    """Encoded pictures and captions, in main memory, in the dtype the encoders gave.

    latents: one tensor [C, h, w] per item; captions: the final caption per item; embeddings: caption ->
    (prompt_embeds [T, D], pooled [P]), each caption once.
    """

    latents: list[paddle.Tensor]
    captions: list[str]
    embeddings: dict[str, tuple[paddle.Tensor, paddle.Tensor]]
    caption_dropout_rate: float = 0.0

    def batch(self, indices: Sequence[int], rng: np.random.Generator) -> dict[str, paddle.Tensor]:
        """Items by number -> {"latents" [B, C, h, w], "prompt_embeds" [B, T, D], "pooled" [B, P]}.

        On the current device. rng decides which captions are dropped; it always gives B numbers.
        """
        dropped = dropped_captions(len(indices), self.caption_dropout_rate, rng)
        captions = ["" if drop else self.captions[i] for i, drop in zip(indices, dropped, strict=True)]
        prompt_embeds, pooled = self.text(captions)
        latents = _stack([self.latents[i] for i in indices])
        return {"latents": latents, "prompt_embeds": prompt_embeds, "pooled": pooled}

    def text(self, captions: Sequence[str]) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Cached captions -> (prompt_embeds [B, T, D], pooled [B, P]) on the current device."""
        pairs = [self.embeddings[caption] for caption in captions]
        return _stack([pair[0] for pair in pairs]), _stack([pair[1] for pair in pairs])


def build_cache(
    items: Sequence[Item],
    encode_image: EncodeImage,
    encode_text: EncodeText,
    resolution: int,
    trigger_word: str | None = None,
    caption_dropout_rate: float = 0.0,
    extra_captions: Iterable[str] = (),
    batch_size: int = 8,
) -> TrainingCache:
    """Encode all items once, with a progress bar each for pictures and captions.

    resolution: side of the square pictures in pixels. Equal captions are encoded once; the empty caption is
    added where dropout needs it, extra_captions (say, preview prompts) are taken as they are. batch_size:
    pictures or captions in one call of an encoder. Raises ConfigError naming the picture or caption whose
    encoding is not finite.
    """
    captions = [final_caption(item.caption_raw, trigger_word) for item in items]
    blank = [""] if caption_dropout_rate > 0 else []
    latents = _encode_images(items, encode_image, resolution, batch_size)
    embeddings = _encode_captions(
        list(dict.fromkeys([*captions, *blank, *extra_captions])), encode_text, batch_size
    )
    return TrainingCache(latents, captions, embeddings, caption_dropout_rate)


@paddle.no_grad()
def _encode_images(
    items: Sequence[Item], encode_image: EncodeImage, resolution: int, batch_size: int
) -> list[paddle.Tensor]:
    latents = []
    with tqdm(total=len(items), desc="encoding pictures", unit="file") as bar:
        for some in _chunks(items, batch_size):
            pixels = np.stack([load_image(item.image_path, resolution, resolution) for item in some])
            encoded = encode_image(paddle.to_tensor(pixels))
            for item, latent in zip(some, encoded.cpu().unbind(0), strict=True):
                _check_finite(latent, f"the VAE's latent of {item.image_path}")
                latents.append(latent)
            bar.update(len(some))
    return latents


@paddle.no_grad()
def _encode_captions(
    captions: list[str], encode_text: EncodeText, batch_size: int
) -> dict[str, tuple[paddle.Tensor, paddle.Tensor]]:
    embeddings = {}
    with tqdm(total=len(captions), desc="encoding captions", unit="caption") as bar:
        for some in _chunks(captions, batch_size):
            prompt_embeds, pooled = encode_text(list(some))
            rows = zip(some, prompt_embeds.cpu().unbind(0), pooled.cpu().unbind(0), strict=True)
            for caption, embeds, vector in rows:
                _check_finite(embeds, f"the text embedding of {caption!r}")
                _check_finite(vector, f"the pooled text embedding of {caption!r}")
                embeddings[caption] = (embeds, vector)
            bar.update(len(some))
    return embeddings


def _chunks(entries: Sequence, size: int) -> Iterable[Sequence]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _check_finite(tensor: paddle.Tensor, what: str) -> None:
    # a half-precision VAE can overflow; training on NaN would show it thousands of steps later
    if not paddle.isfinite(tensor.astype("float32")).all().item():
        raise ConfigError(f"{what} is not finite; use model.dtype float32 or bfloat16, or remove the file")


def _stack(rows: list[paddle.Tensor]) -> paddle.Tensor:
    return paddle.stack(rows).to(paddle.get_device())
