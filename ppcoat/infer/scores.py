"""Scores of pictures: PSNR, Frechet distance and CLIP score as pure functions of arrays, and the two
networks, loaded from local files, that compute the features for them.

CLIP: embeddings of pictures and of prompts, whose cosine is the CLIP score. The folder is that of a CLIP in
the transformers layout, e.g. openai/clip-vit-base-patch16: config.json, model.safetensors, vocab.json,
merges.txt. Nothing is downloaded. Source: CLIP, arXiv 2103.00020.

Inception v3 (arXiv 1512.00567): its 2048 pooled features, for Frechet distances. The network is
paddle.vision's; its weights come from a local safetensors file with Paddle's names. Like those of the
original FID they were trained on ImageNet, but they are other weights: compare distances with each other, not
with those of other programs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.models.loading import fill, load_clip_tokenizer, load_weights, read_tensors, weights_in
from ppcoat.models.tensor_files import TensorInfo, read_header
from ppcoat.reading import read_json

# Mean and deviation of CLIP's training pictures, red, green, blue, in 0..1 (openai/CLIP, clip.py).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
INCEPTION_SIZE = 299
# Mean and deviation of ImageNet's pictures, red, green, blue, in 0..1, as paddle.vision trains with.
INCEPTION_MEAN = (0.485, 0.456, 0.406)
INCEPTION_DEVIATION = (0.229, 0.224, 0.225)
CONVERT = (
    "fetch https://paddle-hapi.bj.bcebos.com/models/inception_v3.pdparams and write it as safetensors once: "
    'python -c "import paddle; from safetensors.paddle import save_file; '
    "save_file(paddle.load('inception_v3.pdparams'), 'inception_v3.safetensors')\""
)


def psnr(pictures: paddle.Tensor, references: paddle.Tensor) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB -> float32 [N]. Both inputs float32 [N, C, H, W] in
    -1..1, so the peak is 2."""
    error = ((pictures - references) ** 2).mean(axis=[1, 2, 3]).numpy()
    return 10 * np.log10(4 / np.maximum(error, 1e-12))


def frechet_distance(features: np.ndarray, references: np.ndarray) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features, [N, D] and [M, D].

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as in FID (arXiv 1706.08500). The trace of the root is
    that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric, so its eigenvalues are real. All in float64.
    """
    (mean1, cov1), (mean2, cov2) = (
        (x.mean(axis=0), np.cov(x, rowvar=False))
        for x in (features.astype(np.float64), references.astype(np.float64))
    )
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    found = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross
    return float(np.maximum(found, 0))  # equal sets can come out below by rounding


def clip_score(pictures: np.ndarray, prompts: np.ndarray) -> float:
    """Mean cosine of the CLIP embeddings of pictures and of their prompts, both [N, D], in float64.

    In -1..1, as in FLUX-Lightning's table (about 0.33), without the factors 2.5 or 100 of other programs
    (CLIPScore, arXiv 2104.08718). Raises ValueError for arrays of different shapes.
    """
    if pictures.shape != prompts.shape:
        raise ValueError(f"pictures {pictures.shape} and prompts {prompts.shape}: wanted one row for each")
    a, b = pictures.astype(np.float64), prompts.astype(np.float64)
    cosines = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(cosines.mean())


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
        """N pictures -> float32 [N, projection_dim]."""
        pixels = np.stack([centre_square(picture, self.size) for picture in pictures])
        pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_DEVIATION)
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return self.model.get_image_features(paddle.to_tensor(pixels)).numpy()

    @paddle.no_grad()
    def embed_prompts(self, prompts: list[str]) -> np.ndarray:
        """N texts -> float32 [N, projection_dim]; texts longer than the text encoder takes (77 tokens) are
        cut."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pd"
        )["input_ids"]
        return self.model.get_text_features(ids).numpy()


def centre_square(picture: Image.Image, size: int) -> np.ndarray:
    """Scale the shorter side to `size` (bicubic) and crop the longer one -> float32 [size, size, 3] in
    0..1."""
    width, height = picture.size
    short = min(width, height)
    scaled = picture.convert("RGB").resize(
        (int(size * width / short), int(size * height / short)), Image.BICUBIC
    )
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32) / 255


class Inception:
    """PIL pictures -> float32 [N, 2048]. Pictures are scaled to 299 x 299 (bicubic).

    Raises ConfigError for a file that is missing, a pickle, damaged, or not of this network.
    """

    def __init__(self, file: str | Path):
        infos = _header(Path(file))
        self.model = paddle.vision.models.InceptionV3(num_classes=0)
        wanted = self.model.state_dict()
        for name, parameter in wanted.items():
            found = infos[name].shape if name in infos else "nothing"
            if found != parameter.shape:
                raise ConfigError(
                    f"{file} has {found} for {name}, wanted {list(parameter.shape)}: it is not of "
                    f"paddle.vision's Inception v3; {CONVERT}"
                )
        fill(self.model, read_tensors({name: infos[name] for name in wanted}, linears=set()))

    @paddle.no_grad()
    def __call__(self, pictures: list[Image.Image]) -> np.ndarray:
        arrays = [
            np.asarray(p.convert("RGB").resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.BICUBIC))
            for p in pictures
        ]
        pixels = (np.stack(arrays).astype("float32") / 255 - np.float32(INCEPTION_MEAN)) / np.float32(
            INCEPTION_DEVIATION
        )
        pixels = paddle.to_tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        return self.model(pixels).flatten(1).numpy()


def _header(file: Path) -> dict[str, TensorInfo]:
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file} is no .safetensors, and reading a pickle can run code; {CONVERT}")
    if not file.is_file():
        raise ConfigError(f"no Inception weights at {file}; {CONVERT}")
    return read_header(file)
