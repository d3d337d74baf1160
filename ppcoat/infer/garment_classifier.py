"""A small convolutional network that says what a 64 x 64 picture shows: kind, colour, pattern, gold star or
none.

It judges the tiny FLUX and the quickstart LoRA. It has nothing in common with the models that draw: it is
trained on drawings alone, from seeds that no other training uses (ppcoat/pretrain/classifier.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from PIL import Image
from safetensors.paddle import load_file

from ppcoat.data.garments import COLOURS, KINDS, MOTIFS, PATTERNS

LABELS = {"kind": KINDS, "colour": tuple(COLOURS), "pattern": PATTERNS, "motif": ("none", *MOTIFS)}
WEIGHTS = Path(__file__).parent.parent / "assets" / "garment_classifier.safetensors"
SIZE = 64


class GarmentClassifier(nn.Layer):
    """[N, 3, 64, 64] in -1..1 -> one row of scores per label group. `features` gives the [N, 128] layer
    below."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        self.convolutions = nn.LayerList(
            [nn.Conv2D(a, b, 4, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.norms = nn.LayerList([nn.GroupNorm(8, w) for w in widths[1:]])
        self.hidden = nn.Linear(widths[-1] * 16, 128)
        self.heads = nn.LayerDict({name: nn.Linear(128, len(labels)) for name, labels in LABELS.items()})

    def features(self, pixels: paddle.Tensor) -> paddle.Tensor:
        x = pixels
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, pixels: paddle.Tensor) -> dict[str, paddle.Tensor]:
        features = self.features(pixels)
        return {name: self.heads[name](features) for name in LABELS}

    @classmethod
    def load(cls, file: str | Path = WEIGHTS) -> GarmentClassifier:
        """The classifier that ships with the package."""
        model = cls()
        model.set_state_dict(
            {name: tensor.astype("float32") for name, tensor in load_file(str(file)).items()}
        )
        model.eval()
        return model


@paddle.no_grad()
def classify(
    model: GarmentClassifier, pictures: list[Image.Image], batch_size: int = 100
) -> dict[str, np.ndarray]:
    """-> per label group an array of N label names, and "features" [N, 128]. Other sizes are resized to 64
    x 64."""
    names: dict[str, list] = {name: [] for name in LABELS}
    features = []
    for start in range(0, len(pictures), batch_size):
        pixels = pictures_to_tensor(pictures[start : start + batch_size])
        hidden = model.features(pixels)
        features.append(hidden.numpy())
        for name, labels in LABELS.items():
            best = model.heads[name](hidden).argmax(axis=1).numpy()
            names[name] += [labels[i] for i in best]
    return {name: np.array(values) for name, values in names.items()} | {"features": np.concatenate(features)}


def pictures_to_tensor(pictures: list[Image.Image]) -> paddle.Tensor:
    """PIL pictures -> float32 [N, 3, 64, 64] in -1..1."""
    arrays = [np.asarray(p.convert("RGB").resize((SIZE, SIZE), Image.BOX), np.float32) for p in pictures]
    return paddle.to_tensor(np.stack(arrays).transpose(0, 3, 1, 2) / 127.5 - 1)
