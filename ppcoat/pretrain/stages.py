"""The stages that make a tiny FLUX. Each writes its result to the work folder, and a second call continues
with the first missing one.

text encoders -> autoencoder -> encoded drawings -> transformer -> pipeline folder; and the garment classifier
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

from ppcoat.atomic import whole_folder, write_text
from ppcoat.config.flags import from_flags
from ppcoat.device import tune_host
from ppcoat.errors import ConfigError
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.models.flux.scheduler import FlowMatchEulerDiscreteScheduler
from ppcoat.models.loading import (
    load_clip,
    load_clip_tokenizer,
    load_t5,
    load_t5_tokenizer,
    load_transformer,
    load_vae,
)
from ppcoat.pretrain import AutoencoderTraining, ClassifierTraining, DenoiserTraining, PretrainFlags
from ppcoat.pretrain.autoencoder import sharpen_decoder, train_autoencoder
from ppcoat.pretrain.classifier import train_classifier
from ppcoat.pretrain.denoiser import build_transformer, encode_drawings, train_transformer
from ppcoat.pretrain.text import write_text_parts
from ppcoat.train.checkpoint import only_run_in
from ppcoat.train.ranks import Ranks


def run_command(arguments: argparse.Namespace) -> None:
    flags = from_flags(PretrainFlags, arguments)
    for name, value in vars(arguments).items():
        least = 0 if name == "guided_after" else 1
        if isinstance(value, int) and value < least:
            raise ConfigError(f"--{name}: came {value}, wanted at least {least}")
    tune_host()
    pretrain(
        flags.work_dir,
        flags.output_dir,
        from_flags(AutoencoderTraining, arguments),
        from_flags(DenoiserTraining, arguments),
        from_flags(ClassifierTraining, arguments),
    )


def pretrain(
    work_dir: Path,
    output_dir: Path,
    autoencoder: AutoencoderTraining,
    denoiser: DenoiserTraining,
    classifier: ClassifierTraining,
) -> FluxPipeline:
    """Run every stage whose result is not in `work_dir`, and write the pipeline (float16) to `output_dir`.

    All ranks train the transformer, further if it is in `work_dir`; rank 0 alone runs the other stages.
    """
    ranks = Ranks.current()
    with only_run_in(work_dir, ranks):
        with ranks.first_ahead():
            _write_parts(work_dir, autoencoder, classifier)
            pipeline = assemble(work_dir)
            data = encode_drawings(pipeline, denoiser, work_dir / "drawings.npz")
        losses = train_transformer(pipeline.transformer, data, denoiser, work_dir / "transformer", ranks)
        if ranks.is_first:
            pipeline.save_pretrained(output_dir, dtype="float16")
            settings = {
                "autoencoder": dataclasses.asdict(autoencoder),
                "transformer": dataclasses.asdict(denoiser),
                "ranks": ranks.size,
                "final_loss": sum(losses[-200:]) / len(losses[-200:]),
            }
            write_text(work_dir / "training.json", json.dumps(settings, indent=2) + "\n")
    ranks.close()
    return pipeline


def _write_parts(work_dir: Path, autoencoder: AutoencoderTraining, classifier: ClassifierTraining) -> None:
    """Make the text encoders, autoencoder and classifier that are missing in `work_dir`."""
    work_dir.mkdir(parents=True, exist_ok=True)
    if not (work_dir / "text_encoder_2").exists():
        write_text_parts(work_dir)
    if not (work_dir / "vae").exists():
        unfinished = work_dir / "vae_unfinished"
        train_autoencoder(unfinished, autoencoder)
        sharpen_decoder(unfinished, autoencoder)
        with whole_folder(work_dir / "vae") as draft:
            shutil.copytree(unfinished, draft, dirs_exist_ok=True)
        shutil.rmtree(unfinished)
    if not (work_dir / "garment_classifier.safetensors").exists():
        train_classifier(work_dir / "garment_classifier.safetensors", classifier, load_vae(work_dir / "vae"))


def assemble(work_dir: Path) -> FluxPipeline:
    """The pipeline of the parts in `work_dir` with FLUX.1-dev's scheduler; a new transformer if there is
    none."""
    trained = (work_dir / "transformer").exists()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=load_vae(work_dir / "vae"),
        text_encoder=load_clip(work_dir / "text_encoder"),
        tokenizer=load_clip_tokenizer(work_dir / "tokenizer"),
        text_encoder_2=load_t5(work_dir / "text_encoder_2"),
        tokenizer_2=load_t5_tokenizer(work_dir / "tokenizer_2"),
        transformer=load_transformer(work_dir / "transformer") if trained else build_transformer(),
    )
