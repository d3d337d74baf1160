"""Train the garment classifier on drawings from seeds of its own; half of them are blurred and noisy.

A third of the pictures without a gold star carry other small shapes, so that "some shape" is not taken for
the star.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.io import DataLoader, Dataset
from PIL import Image
from safetensors.paddle import save_file
from tqdm import tqdm

from ppcoat.data import garments
from ppcoat.infer.garment_classifier import LABELS, GarmentClassifier, classify
from ppcoat.pretrain.autoencoder import HELD_OUT_SEED, to_pixels

TRAIN_SEED, TEST_SEED = HELD_OUT_SEED + 1_000_000, HELD_OUT_SEED + 5_000_000


@dataclass(frozen=True)
class ClassifierTraining:
    """`steps` batches of fresh drawings; the learning rate falls to zero along a cosine."""

    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


class LabelledDrawings(Dataset):
    """Item i: (float32 [3, 64, 64] in -1..1, int64 [4] label numbers in the order of LABELS)."""

    def __init__(self, count: int, first_seed: int, degrade: bool):
        super().__init__()
        self.count, self.first_seed, self.degrade = count, first_seed, degrade
        self.garments = garments.all_garments()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        seed = self.first_seed + i
        rng = np.random.default_rng([seed, 2])
        garment = self.garments[rng.integers(len(self.garments))]
        motif = garments.MOTIFS[0] if rng.uniform() < 0.5 else None
        picture = garments.draw(garment, seed, motif=motif)
        if motif is None and rng.uniform() < 1 / 3:
            picture = garments.add_random_shapes(picture, rng, count=2)
        if self.degrade and rng.uniform() < 0.5:
            picture = _degraded(picture, rng)
        named = {
            "kind": garment.kind,
            "colour": garment.colour,
            "pattern": garment.pattern,
            "motif": motif or "none",
        }
        return to_pixels(picture), np.array([LABELS[k].index(v) for k, v in named.items()], np.int64)


def train_classifier(file: str | Path, training: ClassifierTraining) -> GarmentClassifier:
    """Train, print accuracy on 1,000 fresh drawings, save as float16 safetensors."""
    paddle.seed(training.seed)
    model = GarmentClassifier()
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(training.learning_rate, training.steps)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=0.02)
    drawings = LabelledDrawings(training.steps * training.batch_size, TRAIN_SEED, degrade=True)
    for pixels, labels in tqdm(DataLoader(drawings, batch_size=training.batch_size, num_workers=1),
                               desc="classifier", mininterval=5):  # fmt: skip
        scores = model(pixels)
        loss = sum(F.cross_entropy(scores[name], labels[:, i]) for i, name in enumerate(LABELS))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    model.eval()
    print("classifier on fresh drawings:", accuracy(model, 1000))
    save_file(
        {k: v.astype("float16") for k, v in model.state_dict().items()}, str(file), metadata={"format": "pd"}
    )
    return model


def accuracy(model: GarmentClassifier, count: int) -> dict[str, float]:
    """Share of right answers per label group on clean drawings that it was not trained on."""
    test = LabelledDrawings(count, TEST_SEED, degrade=False)
    pixels, labels = zip(*(test[i] for i in range(count)), strict=True)
    found = classify(
        model, [Image.fromarray(((p.transpose(1, 2, 0) + 1) * 127.5 + 0.5).astype(np.uint8)) for p in pixels]
    )
    truth = np.stack(labels)
    return {
        name: float(np.mean(found[name] == np.array(names)[truth[:, i]]))
        for i, (name, names) in enumerate(LABELS.items())
    }


def _degraded(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Smaller and large again, then noise: what a small autoencoder does to edges."""
    small = int(picture.width / rng.uniform(1.2, 2.2))
    soft = picture.resize((small, small), Image.BOX).resize(picture.size, Image.BICUBIC)
    noisy = np.asarray(soft, np.float32) + rng.normal(0, rng.uniform(0, 10), (*soft.size, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
