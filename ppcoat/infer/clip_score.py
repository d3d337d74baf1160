"""CLIP from a local folder: embeddings of pictures and of prompts, whose cosine is the CLIP score.

The folder is that of a CLIP in the transformers layout, e.g. openai/clip-vit-base-patch16: config.json,
model.safetensors, vocab.json, merges.txt. Nothing is downloaded. Source: CLIP, arXiv 2103.00020.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.loading import load_clip_tokenizer, load_weights, read_json, weights_in

# Mean and deviation of CLIP's training pictures, red, green, blue, in 0..1 (openai/CLIP, clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class CLIP:
    """`embed_pictures` and `embed_prompts`: float32 [N, projection_dim], not normalised. Computed in float32.

    Raises ConfigError for a folder that is missing, not complete, or not of a CLIP.
    """

    def __init__(self, folder: str | Path):
        from ppdiffusers.transformers import CLIPConfig, CLIPModel

        folder = Path(folder)
        config = read_json(folder / "config.json", "give the local folder of a CLIP with --clip")
        if config.get("model_type") != "clip":
            raise ConfigError(f"{folder}/config.json is of a {config.get('model_type')}, wanted a clip")
        self.tokenizer = load_clip_tokenizer(folder)
        with weights_in("float32"):
            self.model = CLIPModel(CLIPConfig.from_dict(config))
        load_weights(self.model, folder)
        self.size = self.model.config.vision_config.image_size
        self.tokens = self.model.config.text_config.max_position_embeddings

    @paddle.no_grad()
    def embed_pictures(self, pictures: list[Image.Image]) -> np.ndarray:
        """PIL pictures -> [N, projection_dim]."""
        pixels = np.stack([centre_square(picture, self.size) for picture in pictures])
        pixels = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return self.model.get_image_features(paddle.to_tensor(pixels)).numpy()

    @paddle.no_grad()
    def embed_prompts(self, prompts: list[str]) -> np.ndarray:
        """Texts -> [N, projection_dim]; what goes beyond the text encoder's length (77 tokens) is cut."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pd"
        )["input_ids"]
        return self.model.get_text_features(ids).numpy()


def centre_square(picture: Image.Image, size: int) -> np.ndarray:
    """The shorter side scaled to `size` (bicubic), the longer cut -> float32 [size, size, 3] in 0..1."""
    width, height = picture.size
    short = min(width, height)
    scaled = picture.convert("RGB").resize(
        (int(size * width / short), int(size * height / short)), Image.BICUBIC
    )
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255
