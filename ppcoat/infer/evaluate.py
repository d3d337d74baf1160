"""The command `evaluate`: scores the pictures of folders, or those that a tiny FLUX and a student of it draw
for captions that no training used (garment_scores.py).

A folder gets a Frechet distance to a folder of references, and a CLIP score with its prompts. The columns are
those of FLUX-Lightning's table: Method, FID-FLUX (references drawn by FLUX itself), CLIP.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ppcoat.atomic import whole_file, write_text
from ppcoat.config.flags import from_flags
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.infer.drawing import FEATURES, GUIDANCE, SAMPLES, EvaluateFlags, GuidanceScales
from ppcoat.infer.editing import as_it_is, opened_picture
from ppcoat.infer.garment_scores import (
    GarmentClassifier,
    compare_students,
    comparison_table,
    evaluate,
    pictures_to_tensor,
    sheet,
)
from ppcoat.infer.prompts import RESERVED, prompt_text
from ppcoat.infer.scores import CLIP, Inception, clip_score, frechet_distance
from ppcoat.lora import read_lora_file
from ppcoat.models.loading import check_folder

OF_MODEL = ("student", "samples", "guidance_scale", "true_cfg_scale", "sheet")
OF_PICTURES = ("references", "features", "inception", "clip", "prompts")
MOST_SAMPLES = 1_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Features = Callable[[list[Image.Image]], np.ndarray]  # N pictures -> [N, D]


def run_command(arguments: argparse.Namespace) -> None:
    flags = _checked(from_flags(EvaluateFlags, arguments))
    tune_host()
    if flags.pictures:
        _score_folders(flags)
    elif flags.student:
        _score_student(flags)
    else:
        _score_model(flags)


def _checked(given: EvaluateFlags) -> EvaluateFlags:
    """The flags with the defaults of those that are not given. Raises ConfigError for flags without effect
    and for wrong counts."""
    chosen, others = ("--pictures", OF_MODEL) if given.pictures else ("--model", OF_PICTURES)
    for name in others:
        if getattr(given, name) is not None:
            raise ConfigError(f"--{name} has no effect with {chosen}; leave it out")
    defaults = {"features": FEATURES[0], "samples": SAMPLES}
    defaults |= {"guidance_scale": GUIDANCE.distilled, "true_cfg_scale": GUIDANCE.true_cfg}
    flags = replace(
        given, **{name: value for name, value in defaults.items() if getattr(given, name) is None}
    )
    for name, least in (("samples", 2), ("batch_size", 1)):  # one sample has no covariance
        if not least <= getattr(flags, name) <= MOST_SAMPLES:
            raise ConfigError(f"{name}: came {getattr(flags, name)}, wanted {least} to {MOST_SAMPLES}")
    if flags.model:
        if Path(flags.model).is_file():
            raise ConfigError(f"--model {flags.model} is a file, wanted a FLUX folder: `merge` writes one")
        check_folder(flags.model, "--model")
    if flags.student:
        read_lora_file(flags.student)
    return flags


def _score_model(flags: EvaluateFlags) -> None:
    """Print and write the scores of --model."""
    guidance = GuidanceScales(flags.guidance_scale, flags.true_cfg_scale)
    scores, samples = evaluate(flags.model, flags.samples, flags.batch_size, guidance)
    for name, value in scores.items():
        print(f"{name:28s} {value:.4g}")
    if flags.output:
        write_text(flags.output, json.dumps(scores, indent=2) + "\n")
    if flags.sheet:
        with whole_file(flags.sheet) as draft:
            sheet(samples[:64]).save(draft)


def _score_student(flags: EvaluateFlags) -> None:
    """Print and write the table of --student; the sheet has one row for each set of samples."""
    scores, pictures = compare_students(
        flags.model,
        {"student": flags.student},
        flags.samples,
        flags.batch_size,
        GuidanceScales(flags.guidance_scale, flags.true_cfg_scale),
    )
    print(comparison_table(scores))
    if flags.output:
        rows = [asdict(score) for score in scores]
        write_text(flags.output, json.dumps(rows, indent=2) + "\n")
    if flags.sheet:
        with whole_file(flags.sheet) as draft:
            sheet([picture for row in pictures for picture in row[:16]]).save(draft)


def _score_folders(flags: EvaluateFlags) -> None:
    """Print and write the table of --pictures."""
    if flags.references is None and flags.clip is None:
        raise ConfigError("nothing to score --pictures by: give --references <folder> or --clip <folder>")
    folders = {}
    for given in flags.pictures:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given)
        folders[name if equals else path.name] = path
    if len(folders) < len(flags.pictures):
        raise ConfigError("two --pictures have one name: tell them apart with NAME=FOLDER")
    for folder in [*folders.values(), *([flags.references] if flags.references else [])]:
        _picture_files(folder)
    clip = CLIP(flags.clip) if flags.clip else None
    wanted = flags.references is not None
    features = features_named(flags.features, flags.inception, clip) if wanted else None
    scores = score_folders(folders, flags.references, features, clip, flags.prompts, flags.batch_size)
    print(folder_table(scores, flags.features))
    if flags.output:
        rows = [asdict(score) for score in scores]
        write_text(flags.output, json.dumps(rows, indent=2) + "\n")


@dataclass(frozen=True)
class FolderScores:
    """Scores of one folder; None for a score that was not requested."""

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
    """{method: folder of its pictures} -> scores in the same order.

    references and features: for the Frechet distance. clip: for the mean cosine of pictures and prompts.
    prompts: a file with one prompt a line, in the order of the pictures' names; None: each picture has its
    own (`own_prompt`). Raises ConfigError, naming the file, for pictures or prompts that are missing or
    unreadable.
    """
    files = {method: _picture_files(folder) for method, folder in folders.items()}
    texts = {method: prompts_of(found, prompts) if clip else [] for method, found in files.items()}
    goal = None
    if references is not None and features is not None:
        goal = _embedded(_picture_files(references), features, batch_size)
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
    """The function that computes the features of that name, one of FEATURES: N pictures -> [N, D]. Raises
    ConfigError if its weights were not given."""
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


def folder_table(scores: list[FolderScores], features: str) -> str:
    """A Markdown table; with Inception's features it has the heads of FLUX-Lightning's table."""
    distance = "FID-FLUX ↓" if features == "inception" else f"Frechet ({features}) ↓"
    rows = [("Method", distance, "CLIP ↑")]
    rows += [(score.method, _number(score.frechet), _number(score.clip)) for score in scores]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder (not below it), by name, without the contact sheets of a list that `generate`
    has drawn there. Raises ConfigError for fewer than two."""
    if not folder.is_dir():
        raise ConfigError(f"no folder of pictures at {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if (folder / "pictures.jsonl").exists():
        files = [file for file in files if not RESERVED.fullmatch(file.stem)]
    if len(files) < 2:
        raise ConfigError(
            f"{folder} has {len(files)} pictures ({', '.join(SUFFIXES)}), wanted at least 2 to score"
        )
    return files


def prompts_of(files: list[Path], prompts: Path | None) -> list[str]:
    """One prompt for each picture: the lines of the file `prompts`, or own_prompt. Raises ConfigError for a
    missing file and a wrong number of lines."""
    if prompts is None:
        return [own_prompt(file) for file in files]
    lines = [line for line in prompt_text(prompts).splitlines() if line.strip()]
    if len(lines) != len(files):
        raise ConfigError(
            f"{prompts} has {len(lines)} prompts for {len(files)} pictures in {files[0].parent}: one a line, "
            "in the order of the pictures' names"
        )
    return lines


def own_prompt(file: Path) -> str:
    """The text file beside a picture, else the "prompt" that `generate` writes into a PNG. Raises ConfigError
    if there is neither."""
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return prompt_text(beside).strip()
    prompt = opened_picture(file, as_it_is).info.get("prompt", "")
    if not prompt:
        raise ConfigError(f"{file} has no prompt: give --prompts <file>, or put {beside.name} beside it")
    return prompt


def _embedded(files: list[Path], features: Features, batch_size: int) -> np.ndarray:
    return _in_batches(
        files, lambda some: features([opened_picture(file, as_it_is) for file in some]), batch_size
    )


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
