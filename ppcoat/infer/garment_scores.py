"""Scores of a tiny FLUX, and of a student distilled from it, by an independent garment classifier.

The scores answer: does the autoencoder preserve a picture, do samples show what the caption says, and how
near are they to drawings, at few and at many steps? All captions and seeds are ones that no training used.

The classifier is a small convolutional network that recognises kind, colour, pattern and gold star (or none)
in a 64 x 64 picture. It judges the tiny FLUX and the quickstart LoRA, and shares nothing with the models that
draw: it is trained on drawings alone, from seeds that no other training uses (ppcoat/pretrain/classifier.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from PIL import Image
from safetensors.paddle import load_file

from ppcoat.data import garments
from ppcoat.data.garments import COLOURS, KINDS, MOTIFS, PATTERNS
from ppcoat.infer.drawing import GUIDANCE, GuidanceScales
from ppcoat.infer.scores import frechet_distance, psnr
from ppcoat.models.flux.pipeline import FluxPipeline

DRAWINGS_SEED = 20_000_000  # far from every training seed
FEW_AND_MANY_STEPS = (4, 28)
FACTS = ("kind", "colour", "pattern")
LABELS = {"kind": KINDS, "colour": tuple(COLOURS), "pattern": PATTERNS, "motif": ("none", *MOTIFS)}
WEIGHTS = Path(__file__).parent.parent / "assets" / "garment_classifier.safetensors"
PICTURE_SIDE = 64


def evaluate(
    model: str, count: int, batch_size: int, guidance: GuidanceScales = GUIDANCE
) -> tuple[dict[str, float], list[Image.Image]]:
    """Score the FLUX folder `model` on `count` held-out captions -> ({score: value}, its 28-step samples).
    Frechet distances are between features of the garment classifier."""
    pipeline = FluxPipeline.from_pretrained(model)
    classifier = GarmentClassifier.load()
    wanted = held_out_garments(count)
    drawings = [garments.draw(garment, DRAWINGS_SEED + i) for i, garment in enumerate(wanted)]
    found = classify(classifier, drawings)
    scores = {"autoencoder PSNR, dB": _reconstruction_psnr(pipeline, drawings[: min(count, 256)])}
    scores |= {f"{name}, drawings": _share(found[name], wanted, name) for name in FACTS}
    for steps in FEW_AND_MANY_STEPS:
        samples = draw_samples(pipeline, wanted, steps, guidance, batch_size)
        seen = classify(classifier, samples)
        scores |= {f"{name}, {steps} steps": _share(seen[name], wanted, name) for name in FACTS}
        scores[f"Frechet distance, {steps} steps"] = frechet_distance(seen["features"], found["features"])
    scores["Frechet 4 steps / 28 steps"] = (
        scores["Frechet distance, 4 steps"] / scores["Frechet distance, 28 steps"]
    )
    return scores, samples


@dataclass(frozen=True)
class SampleScores:
    """Scores of one set of samples: shares in which the classifier recognises the caption, and the Frechet
    distance to the teacher's 28-step samples (0 for those samples)."""

    who: str
    steps: int
    kind: float
    colour: float
    pattern: float
    frechet: float


def compare_students(
    model: str,
    lora_files: Mapping[str, str | Path],
    count: int,
    batch_size: int,
    guidance: GuidanceScales = GUIDANCE,
) -> tuple[list[SampleScores], list[list[Image.Image]]]:
    """Compare a teacher with its students: the same model with one distilled LoRA each, lora_files by name.

    -> (scores, pictures): of the teacher at 28 and at 4 steps, then of each student at 4, on `count` held-out
    captions. All start from the same noise.
    """
    pipeline = FluxPipeline.from_pretrained(model)
    classifier, wanted = GarmentClassifier.load(), held_out_garments(count)
    few, many = FEW_AND_MANY_STEPS
    scores, pictures, goal = [], [], None
    for who, steps in (("teacher", many), ("teacher", few), *((name, few) for name in lora_files)):
        if who in lora_files:
            pipeline.load_lora_weights(lora_files[who])
        pictures.append(draw_samples(pipeline, wanted, steps, guidance, batch_size))
        if who in lora_files:
            pipeline.unload_lora_weights()
        seen = classify(classifier, pictures[-1])
        goal = seen["features"] if goal is None else goal
        shares = {name: _share(seen[name], wanted, name) for name in FACTS}
        distance = 0.0 if seen["features"] is goal else frechet_distance(seen["features"], goal)
        scores.append(SampleScores(who, steps, **shares, frechet=distance))
    return scores, pictures


def comparison_table(scores: list[SampleScores]) -> str:
    """The rows of `compare_students` for one student, and the ratio of its distance to the teacher's at few
    steps."""
    lines = [f"{'':20s}{'kind':>8s}{'colour':>8s}{'pattern':>9s}{'Frechet distance to the first':>31s}"]
    for row in scores:
        shares = f"{row.kind:8.1%}{row.colour:8.1%}{row.pattern:9.1%}"
        lines.append(f"{f'{row.who}, {row.steps} steps':20s}{shares}{row.frechet:31.2f}")
    _, few, student = scores
    ratio = student.frechet / few.frechet
    lines.append(f"the student's distance is {ratio:.2f} of the teacher's at {few.steps} steps")
    return "\n".join(lines)


def draw_samples(
    pipeline: FluxPipeline,
    wanted: list[garments.Garment],
    steps: int,
    guidance: GuidanceScales,
    batch_size: int,
    seed: int = 0,
) -> list[Image.Image]:
    """One picture per garment, drawn from its caption; the seed of a batch is `seed` and the number of its
    first one."""
    pipeline.set_progress_bar_config(desc=f"{steps} steps")
    samples = []
    for start in range(0, len(wanted), batch_size):
        captions = [garment.caption for garment in wanted[start : start + batch_size]]
        samples += pipeline(
            captions,
            num_inference_steps=steps,
            guidance_scale=guidance.distilled,
            true_cfg_scale=guidance.true_cfg,
            seed=seed + start,
            height=PICTURE_SIDE,
            width=PICTURE_SIDE,
        ).images
    return samples


def held_out_garments(count: int) -> list[garments.Garment]:
    """`count` garments whose captions no training used, drawn with equal probability for each pattern."""
    _, held_out = garments.split_garments()
    rng = np.random.default_rng(DRAWINGS_SEED)
    return [garments.choose(held_out, rng) for _ in range(count)]


def sheet(pictures: list[Image.Image], columns: int = 16) -> Image.Image:
    """Pictures of one size in a grid with `columns` columns."""
    width, height = pictures[0].size
    image = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), "white")
    for i, picture in enumerate(pictures):
        image.paste(picture, (i % columns * width, i // columns * height))
    return image


def _share(found: np.ndarray, wanted: list[garments.Garment], name: str) -> float:
    return float(np.mean(found == np.array([getattr(garment, name) for garment in wanted])))


def _reconstruction_psnr(pipeline: FluxPipeline, pictures: list[Image.Image], batch_size: int = 16) -> float:
    """Mean PSNR in dB of pictures that went through the autoencoder."""
    values = []
    for start in range(0, len(pictures), batch_size):
        pixels = pictures_to_tensor(pictures[start : start + batch_size])
        again = pipeline.decode_latents(pipeline.encode_image(pixels)).clip(-1, 1)
        values.append(psnr(again.astype("float32"), pixels))
    return float(np.concatenate(values).mean())


class GarmentClassifier(nn.Layer):
    """float32 [N, 3, 64, 64] in -1..1 -> {label group: scores [N, labels]}. `features`: [N, 128], the layer
    before the scores."""

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
        """The classifier in `file` (float32, eval mode), by default the one in the package."""
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
    """N pictures -> {label group: N label names, "features": [N, 128]}. Pictures of other sizes are resized
    to 64 x 64."""
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
    arrays = [
        np.asarray(p.convert("RGB").resize([PICTURE_SIDE] * 2, Image.BOX), np.float32) for p in pictures
    ]
    return paddle.to_tensor(np.stack(arrays).transpose(0, 3, 1, 2) / 127.5 - 1)
