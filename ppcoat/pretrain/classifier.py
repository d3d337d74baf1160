"""Train the garment classifier on drawings from seeds that no other training uses.

Drawings are seen several times: mirrored, moved by a few pixels, some batches blurred and noisy, some decoded
by the autoencoder. A third of the pictures without a gold star have other small shapes on them, so that the
classifier does not take any shape for a star. Without decoded pictures in its training it misjudged the kind
of one decoded drawing in ten, because of the autoencoder's soft edges.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.io import DataLoader, Dataset
from PIL import Image
from ppdiffusers import AutoencoderKL
from safetensors.paddle import save

from ppcoat.atomic import whole_file
from ppcoat.data import garments
from ppcoat.infer.garment_scores import LABELS, GarmentClassifier, classify
from ppcoat.pretrain import ClassifierTraining
from ppcoat.pretrain.autoencoder import HELD_OUT_SEED, to_pixels
from ppcoat.progress import Progress

TRAIN_SEED, TEST_SEED = HELD_OUT_SEED + 1_000_000, HELD_OUT_SEED + 5_000_000


class LabelledDrawings(Dataset):
    """Item i: (float32 [3, 64, 64] in -1..1, int64 [4] label numbers in the order of LABELS)."""

    def __init__(self, count: int, first_seed: int):
        super().__init__()
        self.count, self.first_seed = count, first_seed
        self.garments = garments.all_garments()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int):
        seed = self.first_seed + i
        rng = np.random.default_rng([seed, 2])
        garment = garments.choose(self.garments, rng)
        motif = garments.MOTIFS[0] if rng.uniform() < 0.5 else None
        picture = garments.draw(garment, seed, motif=motif)
        if motif is None and rng.uniform() < 1 / 3:
            picture = garments.add_random_shapes(picture, rng, count=2)
        named = {
            "kind": garment.kind,
            "colour": garment.colour,
            "pattern": garment.pattern,
            "motif": motif or "none",
        }
        return to_pixels(picture), np.array([LABELS[k].index(v) for k, v in named.items()], np.int64)


def train_classifier(
    file: str | Path, training: ClassifierTraining, autoencoder: AutoencoderKL
) -> GarmentClassifier:
    """Train a classifier, print its accuracy on new drawings, write it to `file` as float16 safetensors.

    A classifier that is already in the file is trained further.
    """
    paddle.seed(training.seed)
    rng = np.random.default_rng(training.seed)
    model = GarmentClassifier.load(file).train() if Path(file).exists() else GarmentClassifier()
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(training.learning_rate, training.steps)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=0.05)
    pixels, labels = _drawn(training.pictures, training.first_picture)
    soft = reconstructed(autoencoder, pixels)
    for _ in Progress(range(training.steps), desc="classifier"):
        rows = rng.integers(len(pixels), size=training.batch_size)
        seen = (soft if rng.uniform() < training.reconstructed else pixels)[rows]
        scores, truth = model(_varied(seen, rng)), paddle.to_tensor(labels[rows])
        loss = sum(F.cross_entropy(scores[name], truth[:, i]) for i, name in enumerate(LABELS))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
    model.eval()
    print("classifier on fresh drawings:", accuracy(model, training.tested))
    with whole_file(file) as draft:
        tensors = {k: v.astype("float16") for k, v in model.state_dict().items()}
        draft.write_bytes(save(tensors, {"format": "pd"}))
    return model


@paddle.no_grad()
def reconstructed(
    autoencoder: AutoencoderKL, pixels: np.ndarray, noise: float = 0.3, batch_size: int = 50
) -> np.ndarray:
    """Encode and decode pictures, uint8 [N, 3, 64, 64] -> the same shape and dtype. Latents get normal noise
    whose deviation is a random share, up to `noise`, of their own; the share differs between batches."""
    again = np.empty_like(pixels)
    for start in Progress(range(0, len(pixels), batch_size), desc="reconstructions"):
        batch = paddle.to_tensor(pixels[start : start + batch_size].astype(np.float32) / 127.5 - 1)
        latents = autoencoder.encode(batch).latent_dist.mode()
        latents += float(paddle.rand([1])) * noise * latents.std() * paddle.randn(latents.shape)
        decoded = autoencoder.decode(latents).sample.clip(-1, 1)
        again[start : start + batch_size] = ((decoded + 1) * 127.5 + 0.5).numpy().astype(np.uint8)
    return again


def _drawn(count: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """-> uint8 pixels [count, 3, 64, 64] and int64 labels [count, 4]."""
    drawings = DataLoader(LabelledDrawings(count, TRAIN_SEED + first), batch_size=100, num_workers=2)
    parts = [
        ((pixels.numpy() + 1) * 127.5 + 0.5, labels.numpy())
        for pixels, labels in Progress(drawings, desc="drawings")
    ]
    return np.concatenate([p.astype(np.uint8) for p, _ in parts]), np.concatenate([x for _, x in parts])


def _varied(pixels: np.ndarray, rng: np.random.Generator) -> paddle.Tensor:
    """uint8 [B, 3, 64, 64] -> float32 [B, 3, 64, 64] in -1..1, mirrored at random and moved. Half of the
    calls also shrink, enlarge and add noise, which resembles what a small autoencoder does to edges.
    """
    flipped = np.where(rng.uniform(size=(len(pixels), 1, 1, 1)) < 0.5, pixels, pixels[..., ::-1])
    padded = np.pad(flipped, ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
    y, x = rng.integers(0, 7, 2)
    batch = paddle.to_tensor(padded[:, :, y : y + 64, x : x + 64].astype(np.float32) / 127.5 - 1)
    if rng.uniform() < 0.5:
        return batch
    small = F.interpolate(batch, size=[int(rng.integers(24, 54))] * 2, mode="area")
    soft = F.interpolate(small, size=[64, 64], mode="bilinear")
    return soft + float(rng.uniform(0, 0.08)) * paddle.randn(soft.shape)


def accuracy(model: GarmentClassifier, count: int) -> dict[str, float]:
    """Share of right answers for each label group on `count` drawings that the model was not trained on."""
    test = LabelledDrawings(count, TEST_SEED)
    pixels, labels = zip(*(test[i] for i in range(count)), strict=True)
    found = classify(
        model, [Image.fromarray(((p.transpose(1, 2, 0) + 1) * 127.5 + 0.5).astype(np.uint8)) for p in pixels]
    )
    truth = np.stack(labels)
    return {
        name: float(np.mean(found[name] == np.array(names)[truth[:, i]]))
        for i, (name, names) in enumerate(LABELS.items())
    }
