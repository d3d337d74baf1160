"""Scores of folders of pictures: Frechet distance to a reference folder, CLIP score with their prompts.

The table has the form of FLUX-Lightning's: Method, FID-FLUX (references drawn by FLUX itself), CLIP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.errors import ConfigError
from ppcoat.infer.clip_score import CLIP
from ppcoat.infer.garment_classifier import GarmentClassifier, pictures_to_tensor
from ppcoat.infer.inception import Inception
from ppcoat.infer.metrics import clip_score, frechet_distance

FEATURES = ("garments", "inception", "clip")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Features = Callable[[list[Image.Image]], np.ndarray]  # N pictures -> [N, D]


@dataclass(frozen=True)
class FolderScores:
    """Scores of one folder; None is what was not asked for."""

    method: str
    frechet: float | None
    clip: float | None


def score_folders(
    folders: dict[str, Path],
    references: Path | None,
    features: Features | None,
    clip: CLIP | None,
    prompts: Path | None = None,
    batch_size: int = 32,
) -> list[FolderScores]:
    """{method: folder of its pictures} -> scores, in that order.

    references and features give the Frechet distance, clip the mean cosine of pictures and prompts: lines of
    the file `prompts` in the order of file names, or of each picture its own (`own_prompt`). Raises
    ConfigError, naming the file, for pictures or prompts that are missing or cannot be read.
    """
    files = {method: picture_files(folder) for method, folder in folders.items()}
    texts = {method: prompts_of(found, prompts) if clip else [] for method, found in files.items()}
    goal = None
    if references is not None and features is not None:
        goal = _embedded(picture_files(references), features, batch_size)
        _warn_if_few(len(goal), goal.shape[1], references)
    scores = []
    for method, found in files.items():
        frechet = score = None
        if goal is not None:
            vectors = _embedded(found, features, batch_size)
            _warn_if_few(len(vectors), vectors.shape[1], folders[method])
            frechet = frechet_distance(vectors, goal)
        if clip is not None:
            seen = _embedded(found, clip.embed_pictures, batch_size)
            said = _in_batches(texts[method], clip.embed_prompts, batch_size)
            score = clip_score(seen, said)
        scores.append(FolderScores(method, frechet, score))
    return scores


def features_named(name: str, inception: str | None, clip: CLIP | None) -> Features:
    """The features of `FEATURES`. Raises ConfigError if their weights were not given."""
    if name == "garments":
        classifier = GarmentClassifier.load()
        return lambda pictures: classifier.features(pictures_to_tensor(pictures)).numpy()
    if name == "inception":
        if inception is None:
            raise ConfigError("--features inception needs its weights: give --inception <file.safetensors>")
        return Inception(inception)
    if clip is None:
        raise ConfigError("--features clip needs its weights: give --clip <folder of a CLIP>")
    return clip.embed_pictures


def table(scores: list[FolderScores], features: str) -> str:
    """Markdown, with the heads of FLUX-Lightning's table if the features are Inception's."""
    distance = "FID-FLUX ↓" if features == "inception" else f"Frechet ({features}) ↓"
    rows = [("Method", distance, "CLIP ↑")]
    rows += [(score.method, _number(score.frechet), _number(score.clip)) for score in scores]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder (not below it), by name. Raises ConfigError for fewer than two."""
    if not folder.is_dir():
        raise ConfigError(f"no folder of pictures at {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise ConfigError(
            f"{folder} has {len(files)} pictures ({', '.join(SUFFIXES)}), wanted at least 2 to score"
        )
    return files


def prompts_of(files: list[Path], prompts: Path | None) -> list[str]:
    """One prompt for each picture: lines of `prompts`, or each picture's own."""
    if prompts is None:
        return [own_prompt(file) for file in files]
    if not prompts.is_file():
        raise ConfigError(f"no file of prompts at {prompts}")
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != len(files):
        raise ConfigError(
            f"{prompts} has {len(lines)} prompts for {len(files)} pictures in {files[0].parent}: one a line, "
            "in the order of the pictures' names"
        )
    return lines


def own_prompt(file: Path) -> str:
    """The text file beside a picture, else the "prompt" inside the PNG, where `generate` writes it."""
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return beside.read_text(encoding="utf-8").strip()
    prompt = open_picture(file).info.get("prompt", "")
    if not prompt:
        raise ConfigError(f"{file} has no prompt: give --prompts <file>, or put {beside.name} beside it")
    return prompt


def open_picture(file: Path) -> Image.Image:
    """A picture, decoded whole. Raises ConfigError naming the file if it cannot be."""
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file} cannot be read as a picture: {error}") from error


def _embedded(files: list[Path], features: Features, batch_size: int) -> np.ndarray:
    return _in_batches(files, lambda some: features([open_picture(file) for file in some]), batch_size)


def _in_batches(items: list, embed: Callable[[list], np.ndarray], batch_size: int) -> np.ndarray:
    starts = range(0, len(items), batch_size)
    return np.concatenate([embed(items[start : start + batch_size]) for start in starts])


def _warn_if_few(count: int, width: int, folder: Path) -> None:
    if count <= width:
        print(
            f"note: {folder} has {count} pictures for {width} features; with so few the Frechet distance is "
            "too large, so compare it only between folders of one size"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
