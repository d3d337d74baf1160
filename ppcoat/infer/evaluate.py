"""The command that scores pictures: those in folders (folders.py), or those that a tiny FLUX and a student
of it draw on captions that no training used (garment_scores.py)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ppcoat.errors import ConfigError
from ppcoat.host import tune_host
from ppcoat.infer.clip_score import CLIP
from ppcoat.infer.folders import FEATURES, features_named, picture_files, score_folders, table
from ppcoat.infer.garment_scores import (
    GUIDANCE,
    Guidance,
    compare_students,
    comparison_table,
    evaluate,
    sheet,
)
from ppcoat.lora import read_lora_file
from ppcoat.models.loading import check_folder

OF_MODEL = ("student", "samples", "guidance_scale", "true_cfg_scale", "sheet")
OF_PICTURES = ("references", "features", "inception", "clip", "prompts")
SAMPLES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a tiny FLUX to draw and score with")
    what.add_argument(
        "--pictures", nargs="+", metavar="[NAME=]FOLDER", help="folders of pictures to score, a row for each"
    )
    add = parser.add_argument
    add(
        "--student",
        metavar="LORA",
        help="with --model: a distilled LoRA, to compare at 4 steps with its teacher",
    )
    add("--references", type=Path, help="with --pictures: folder to take the Frechet distance to")
    add("--features", choices=FEATURES, help=f"with --pictures: of the distance (default: {FEATURES[0]})")
    add("--inception", metavar="FILE", help="weights of paddle.vision's Inception v3, .safetensors")
    add("--clip", metavar="FOLDER", help="with --pictures: folder of a CLIP, for the CLIP score")
    add("--prompts", type=Path, help="one a line, by picture name (default: beside or in each picture)")
    add("--samples", type=int, help=f"with --model: pictures per score (default: {SAMPLES})")
    parser.add_argument(
        "--batch_size", type=int, default=100, help="pictures drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help=f"with --model: distilled guidance of the samples (default: {GUIDANCE.distilled})",
    )
    parser.add_argument(
        "--true_cfg_scale",
        type=float,
        help=f"their classifier-free guidance, twice the time above 1 (default: {GUIDANCE.true_cfg})",
    )
    parser.add_argument("--output", default=None, help="write the scores to this JSON file too")
    parser.add_argument(
        "--sheet", default=None, help="write a contact sheet of 28-step samples to this PNG file"
    )


def run_command(arguments: argparse.Namespace) -> None:
    _check(arguments)
    tune_host()
    if arguments.pictures:
        _score_folders(arguments)
    elif arguments.student:
        _score_student(arguments)
    else:
        _score_model(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for flags of the other use and for counts, and fill in what was not given."""
    chosen, others = ("--pictures", OF_MODEL) if arguments.pictures else ("--model", OF_PICTURES)
    for name in others:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} has no effect with {chosen}; leave it out")
    defaults = {"features": FEATURES[0], "samples": SAMPLES}
    defaults |= {"guidance_scale": GUIDANCE.distilled, "true_cfg_scale": GUIDANCE.true_cfg}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("samples", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name}: came {getattr(arguments, name)}, wanted at least 1")
    if arguments.model:
        check_folder(arguments.model, "--model")
    if arguments.student:
        read_lora_file(arguments.student)


def _score_model(arguments: argparse.Namespace) -> None:
    """The scores of --model."""
    guidance = Guidance(arguments.guidance_scale, arguments.true_cfg_scale)
    scores, samples = evaluate(arguments.model, arguments.samples, arguments.batch_size, guidance)
    for name, value in scores.items():
        print(f"{name:28s} {value:.4g}")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if arguments.sheet:
        sheet(samples[:64]).save(arguments.sheet)


def _score_student(arguments: argparse.Namespace) -> None:
    """The table of --student; the sheet has a row of each kind of samples."""
    scores, pictures = compare_students(
        arguments.model,
        {"student": arguments.student},
        arguments.samples,
        arguments.batch_size,
        Guidance(arguments.guidance_scale, arguments.true_cfg_scale),
    )
    print(comparison_table(scores))
    if arguments.output:
        rows = [asdict(score) for score in scores]
        Path(arguments.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if arguments.sheet:
        sheet([picture for row in pictures for picture in row[:16]]).save(arguments.sheet)


def _score_folders(arguments: argparse.Namespace) -> None:
    """The table of --pictures."""
    if arguments.references is None and arguments.clip is None:
        raise ConfigError("nothing to score --pictures by: give --references <folder> or --clip <folder>")
    folders = {}
    for given in arguments.pictures:
        name, equals, folder = given.partition("=")
        path = Path(folder if equals else given)
        folders[name if equals else path.name] = path
    if len(folders) < len(arguments.pictures):
        raise ConfigError("two --pictures have one name: tell them apart with NAME=FOLDER")
    for folder in [*folders.values(), *([arguments.references] if arguments.references else [])]:
        picture_files(folder)
    clip = CLIP(arguments.clip) if arguments.clip else None
    wanted = arguments.references is not None
    features = features_named(arguments.features, arguments.inception, clip) if wanted else None
    scores = score_folders(
        folders, arguments.references, features, clip, arguments.prompts, arguments.batch_size
    )
    print(table(scores, arguments.features))
    if arguments.output:
        rows = [asdict(score) for score in scores]
        Path(arguments.output).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
