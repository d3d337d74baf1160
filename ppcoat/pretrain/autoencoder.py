"""Train the small AutoencoderKL of the built-in tiny FLUX on drawings.

It is ppdiffusers' own AutoencoderKL with the layout of FLUX.1's (16 latent channels, 8 x down, no quant
convs). Half of the pictures carry random small shapes, so that motifs it has never seen survive it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle.io import DataLoader, IterableDataset
from ppdiffusers import AutoencoderKL
from tqdm import tqdm

from ppcoat.data import garments
from ppcoat.infer.metrics import psnr
from ppcoat.models.loading import load_vae
from ppcoat.models.saving import save_diffusers_model

HELD_OUT_SEED = 10_000_000  # drawings from this seed on are never trained on


@dataclass(frozen=True)
class AutoencoderTraining:
    """Batch, steps and loss weights. `kl_weight` multiplies the mean KL per latent element.

    It is far above what pictures need: latents then say little that cannot be seen, and the decoder forgives
    small errors, so that a small transformer can learn to draw them.
    """

    steps: int = 4000
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 100
    kl_weight: float = 2e-2
    shapes_fraction: float = 0.5
    size: int = 64
    seed: int = 0


def build_autoencoder(size: int = 64) -> AutoencoderKL:
    """0.72 M parameters; [B, 3, 64, 64] -> latents [B, 16, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=size,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class Drawings(IterableDataset):
    """Endless [3, size, size] float32 pictures in -1..1."""

    def __init__(self, size: int, shapes_fraction: float, seed: int):
        super().__init__()
        self.size, self.shapes_fraction, self.seed = size, shapes_fraction, seed

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        everything = garments.all_garments()
        while True:
            seed = int(rng.integers(HELD_OUT_SEED))
            if rng.uniform() < self.shapes_fraction:
                yield to_pixels(garments.draw_random_shapes(seed, self.size))
            else:
                yield to_pixels(garments.draw(garments.choose(everything, rng), seed, self.size))


def to_pixels(picture) -> np.ndarray:
    """PIL picture -> float32 [3, H, W] in -1..1."""
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1


def held_out_pictures(count: int, size: int = 64, motif: str | None = None) -> paddle.Tensor:
    """[count, 3, size, size] drawings from seeds and captions that no training uses."""
    _, captions = garments.split_garments()
    rng = np.random.default_rng(0)
    pictures = [
        garments.draw(garments.choose(captions, rng), HELD_OUT_SEED + i, size, motif) for i in range(count)
    ]
    return paddle.to_tensor(np.stack([to_pixels(p) for p in pictures]))


def train_autoencoder(folder: str | Path, training: AutoencoderTraining) -> AutoencoderKL:
    """Train, log PSNR on held-out drawings, set scaling_factor/shift_factor to unit latents, save to
    `folder`.

    A folder that already holds an autoencoder is trained further.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paddle.seed(training.seed)
    vae = build_autoencoder(training.size)
    if (folder / "config.json").exists():
        vae = load_vae(folder).train()
        vae.source_config = None  # the latents' scale is measured anew
        print(f"training the autoencoder in {folder} further")
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(training.learning_rate, training.steps - training.warmup),
        training.warmup, 0.0, training.learning_rate)  # fmt: skip
    optimizer = paddle.optimizer.AdamW(
        schedule, parameters=vae.parameters(), weight_decay=0.0, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    batches = DataLoader(
        Drawings(training.size, training.shapes_fraction, training.seed),
        batch_size=training.batch_size,
        num_workers=1,
    )
    test = held_out_pictures(64, training.size)
    bar = tqdm(zip(range(1, training.steps + 1), batches, strict=False),  # the drawings never end
               total=training.steps, desc="autoencoder", mininterval=5)  # fmt: skip
    for step, pixels in bar:
        pixels = pixels[0] if isinstance(pixels, list | tuple) else pixels
        posterior = vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        latents = mean + (0.5 * logvar).exp() * paddle.randn(mean.shape)
        reconstruction = vae.decode(latents).sample
        mse = ((reconstruction - pixels) ** 2).mean()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        (mse + training.kl_weight * kl).backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(mse=f"{float(mse):.4f}", kl=f"{float(kl):.2f}", lr=f"{optimizer.get_lr():.1e}")
        if step % 500 == 0 or step == training.steps:
            tqdm.write(f"step {step}: held-out PSNR {reconstruction_psnr(vae, test):.2f} dB")
            _normalise_latents(vae, test)
            save_diffusers_model(vae, folder)
    return vae


@paddle.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: paddle.Tensor, batch_size: int = 16) -> float:
    """Mean PSNR in dB of decode(encode mean) over `pictures` [N, 3, H, W] in -1..1."""
    values = [
        psnr(vae.decode(vae.encode(batch).latent_dist.mode()).sample.clip(-1, 1), batch)
        for batch in paddle.split(pictures, math.ceil(len(pictures) / batch_size))
    ]
    return float(np.concatenate(values).mean())


@paddle.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: paddle.Tensor) -> None:
    """Choose the two numbers that give (latent - shift) * scale zero mean and unit deviation."""
    latents = vae.encode(pictures).latent_dist.mode()
    shift, deviation = float(latents.mean()), float(latents.std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 4), shift_factor=round(shift, 4))
