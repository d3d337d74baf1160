"""How the built-in tiny FLUX is made: text encoders -> autoencoder -> encoded drawings -> transformer ->
pipeline folder. Others use nothing of it but its command, whose flags are here: the stages take
seconds to import.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ppcoat.config.flags import add_flags, flag


@dataclass(frozen=True)
class AutoencoderTraining:
    """Batch, steps and loss weights. `kl_weight` multiplies the mean KL per latent element.

    `kl_weight` is larger than good reconstruction needs: latents then carry little that is invisible, and the
    decoder tolerates small errors, so that a small transformer can learn to draw them.
    """

    steps: int = flag("steps of the autoencoder", 2200, "autoencoder_steps")
    batch_size: int = 8
    learning_rate: float = 2.5e-3
    decoder_steps: int = flag("steps of its decoder alone", 1200)
    decoder_batch_size: int = 16
    decoder_learning_rate: float = 1.5e-3
    decoder_noise: float = 0.1  # most noise on the latents, in deviations
    warmup: int = 100
    kl_weight: float = 3e-3
    shapes_fraction: float = 0.5
    size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class DenoiserTraining:
    """Size of the data, batch and schedule. Learning rates rise over `warmup` steps, stay constant, and fall
    linearly to 0 over the share `decay` of all steps, at the end. Muon trains the matrices of the blocks,
    AdamW the rest."""

    pictures: int = flag("drawings to train on", 40_000)
    steps: int = flag("steps of the transformer", 20_000, "transformer_steps")
    batch_size: int = 32
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 1e-2
    warmup: int = 100
    decay: float = 0.5
    ema_decay: float = 0.999
    guided_after: int = flag("steps of the transformer before guidance is distilled", 17_000)
    caption_dropout: float = 0.1
    largest_guidance: float = 4.0
    guided_below: float = 0.8  # noise level above which guidance has no effect
    size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class ClassifierTraining:
    """Set size and schedule; the learning rate falls to zero along a cosine."""

    pictures: int = 40_000
    first_picture: int = 0
    reconstructed: float = 0.5  # share of batches that are decoded by the autoencoder
    steps: int = flag("steps of the classifier", 7000, "classifier_steps")
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    tested: int = 1000  # new drawings for the accuracy that is printed
    seed: int = 0


@dataclass(frozen=True)
class PretrainFlags:
    """The folders of the command."""

    output_dir: Path = flag("folder for the finished pipeline")
    work_dir: Path = flag("folder for the stages", Path("output/pretrain"))


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, PretrainFlags, "work_dir", "output_dir")
    add_flags(parser, AutoencoderTraining)
    add_flags(parser, DenoiserTraining, "steps", "guided_after")
    add_flags(parser, ClassifierTraining)
    add_flags(parser, DenoiserTraining, "pictures")
