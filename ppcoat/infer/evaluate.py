"""Score the tiny FLUX: does the autoencoder keep what it sees, do the samples show what the caption says,
how near are they to drawings, at few and at many steps. All on captions and seeds that no training used."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.data import garments
from ppcoat.host import tune_host
from ppcoat.infer.garment_classifier import SIZE, GarmentClassifier, classify, pictures_to_tensor
from ppcoat.infer.metrics import frechet_distance, psnr
from ppcoat.models.flux_pipeline import FluxPipeline

DRAWINGS_SEED = 20_000_000  # far from every training seed
STEPS = (4, 28)
GUIDANCE = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of the tiny FLUX")
    parser.add_argument("--samples", type=int, default=2000, help="pictures per score (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=100, help="pictures drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance_scale", type=float, default=GUIDANCE, help="of the samples (default: %(default)s)"
    )
    parser.add_argument("--output", default=None, help="write the scores to this JSON file too")
    parser.add_argument(
        "--sheet", default=None, help="write a contact sheet of 28-step samples to this PNG file"
    )


def run_command(arguments: argparse.Namespace) -> None:
    tune_host()
    scores, samples = evaluate(
        arguments.model, arguments.samples, arguments.batch_size, arguments.guidance_scale
    )
    for name, value in scores.items():
        print(f"{name:28s} {value:.4g}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if arguments.sheet:
        sheet(samples[:64]).save(arguments.sheet)


def evaluate(
    model: str, count: int, batch_size: int, guidance_scale: float = GUIDANCE
) -> tuple[dict[str, float], list[Image.Image]]:
    """-> ({score: value}, the 28-step samples). Frechet distances are between features of the garment
    classifier."""
    pipeline = FluxPipeline.from_pretrained(model)
    classifier = GarmentClassifier.load()
    wanted = held_out_garments(count)
    drawings = [garments.draw(garment, DRAWINGS_SEED + i) for i, garment in enumerate(wanted)]
    found = classify(classifier, drawings)
    scores = {"autoencoder PSNR, dB": _reconstruction_psnr(pipeline, drawings[: min(count, 256)])}
    scores |= {
        f"{name}, drawings": _share(found[name], wanted, name) for name in ("kind", "colour", "pattern")
    }
    for steps in STEPS:
        pipeline.set_progress_bar_config(desc=f"{steps} steps")
        samples = []
        for start in range(0, count, batch_size):
            captions = [garment.caption for garment in wanted[start : start + batch_size]]
            samples += pipeline(
                captions,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                seed=start,
                height=SIZE,
                width=SIZE,
            ).images
        seen = classify(classifier, samples)
        for name in ("kind", "colour", "pattern"):
            scores[f"{name}, {steps} steps"] = _share(seen[name], wanted, name)
        scores[f"Frechet distance, {steps} steps"] = frechet_distance(seen["features"], found["features"])
    scores["Frechet 4 steps / 28 steps"] = (
        scores["Frechet distance, 4 steps"] / scores["Frechet distance, 28 steps"]
    )
    return scores, samples


def held_out_garments(count: int) -> list[garments.Garment]:
    """`count` garments whose captions no training used, every pattern as often as the others."""
    _, held_out = garments.split_garments()
    rng = np.random.default_rng(DRAWINGS_SEED)
    return [garments.choose(held_out, rng) for _ in range(count)]


def sheet(pictures: list[Image.Image], columns: int = 16) -> Image.Image:
    """Pictures side by side in rows."""
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
