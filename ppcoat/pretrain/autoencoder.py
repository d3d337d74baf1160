"""Train the small AutoencoderKL of the built-in tiny FLUX on drawings.

It is ppdiffusers' AutoencoderKL in the layout of FLUX.1's (no quant convs). It has 4 latent channels and
downsamples by 4, where FLUX.1 has 16 channels and downsamples by 8: a 64 x 64 picture then has 64 tokens,
which a small transformer can learn. With 16 tokens of four times the content, samples stayed blurred. Half of
the training pictures have random small shapes on them, so that the autoencoder can also reproduce motifs that
it has never seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paddle
from paddle.io import DataLoader, IterableDataset
from ppdiffusers import AutoencoderKL

from ppcoat.data import garments
from ppcoat.infer.scores import psnr
from ppcoat.models.loading import load_vae
from ppcoat.models.writing import save_diffusers_model
from ppcoat.pretrain import AutoencoderTraining
from ppcoat.progress import Progress

HELD_OUT_SEED = 10_000_000  # drawings from this seed on are never trained on


def build_autoencoder(size: int = 64) -> AutoencoderKL:
    """An untrained autoencoder of 0.19 M parameters: [B, 3, 64, 64] -> latents [B, 4, 16, 16]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=4,
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


def _batches(training: AutoencoderTraining, size: int, seed: int) -> Iterator[paddle.Tensor]:
    """Endless [size, 3, H, W] in -1..1."""
    drawings = Drawings(training.size, training.shapes_fraction, seed)
    for pixels in DataLoader(drawings, batch_size=size, num_workers=1):
        yield pixels[0] if isinstance(pixels, list | tuple) else pixels


def to_pixels(picture) -> np.ndarray:
    """PIL picture -> float32 [3, H, W] in -1..1."""
    return np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1


def held_out_pictures(count: int, size: int = 64, motif: str | None = None) -> paddle.Tensor:
    """float32 [count, 3, size, size] in -1..1: drawings from seeds and captions that no training uses."""
    _, captions = garments.split_garments()
    rng = np.random.default_rng(0)
    pictures = [
        garments.draw(garments.choose(captions, rng), HELD_OUT_SEED + i, size, motif) for i in range(count)
    ]
    return paddle.to_tensor(np.stack([to_pixels(p) for p in pictures]))


def train_autoencoder(folder: str | Path, training: AutoencoderTraining) -> AutoencoderKL:
    """Train an autoencoder and save it to `folder`. Prints the PSNR on held-out drawings, and sets
    scaling_factor and shift_factor so that latents have mean 0 and deviation 1.

    An autoencoder that is already in the folder is trained further.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paddle.seed(training.seed)
    vae = build_autoencoder(training.size)
    if (folder / "config.json").exists():
        vae = load_vae(folder).train()
        vae.source_config = None  # the scale of the latents is measured again
        print(f"training the autoencoder in {folder} further")
    schedule = paddle.optimizer.lr.LinearWarmup(
        paddle.optimizer.lr.CosineAnnealingDecay(training.learning_rate, training.steps - training.warmup),
        training.warmup, 0.0, training.learning_rate)  # fmt: skip
    optimizer = paddle.optimizer.AdamW(
        schedule, parameters=vae.parameters(), weight_decay=0.0, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    batches = _batches(training, training.batch_size, training.seed)
    test = held_out_pictures(64, training.size)
    bar = Progress(zip(range(1, training.steps + 1), batches, strict=False),  # the drawings never end
               total=training.steps, desc="autoencoder")  # fmt: skip
    for step, pixels in bar:
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
            Progress.write(f"step {step}: held-out PSNR {reconstruction_psnr(vae, test):.2f} dB")
            _normalise_latents(vae, test)
            save_diffusers_model(vae, folder)
    return vae


def sharpen_decoder(folder: str | Path, training: AutoencoderTraining) -> AutoencoderKL:
    """Train the decoder in `folder` further, on the absolute error of pictures and their edges; the encoder
    does not change.

    train_autoencoder uses a squared error, which is smallest for blurred edges. The latents get a little
    noise, like those that a transformer makes.
    """
    paddle.seed(training.seed)
    vae = load_vae(folder).train()
    vae.encoder.eval()
    weights = vae.decoder.parameters()
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(
        training.decoder_learning_rate, training.decoder_steps
    )
    optimizer = paddle.optimizer.AdamW(
        schedule, parameters=weights, weight_decay=0.0, grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0)
    )
    batches = _batches(training, training.decoder_batch_size, training.seed + 1)
    bar = Progress(zip(range(1, training.decoder_steps + 1), batches, strict=False),
               total=training.decoder_steps, desc="decoder")  # fmt: skip
    for step, pixels in bar:
        with paddle.no_grad():
            latents = vae.encode(pixels).latent_dist.mode()
            latents += paddle.rand([1]) * training.decoder_noise * latents.std() * paddle.randn(latents.shape)
        loss = sharp_loss(vae.decode(latents).sample - pixels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss):.4f}", lr=f"{optimizer.get_lr():.1e}")
    save_diffusers_model(vae, folder)
    psnr_now = reconstruction_psnr(vae, held_out_pictures(64, training.size))
    print(f"decoder: held-out PSNR {psnr_now:.2f} dB")
    return vae


def sharp_loss(difference: paddle.Tensor) -> paddle.Tensor:
    """Mean absolute value of `difference`, float [B, C, H, W], plus the mean absolute value of its
    differences over 1, 2 and 4 pixels in both directions -> scalar."""
    edges = [
        steps.abs().mean()
        for far in (1, 2, 4)
        for steps in (
            difference[:, :, far:] - difference[:, :, :-far],
            difference[..., far:] - difference[..., :-far],
        )
    ]
    return difference.abs().mean() + sum(edges) / len(edges)


@paddle.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: paddle.Tensor, batch_size: int = 16) -> float:
    """Mean PSNR in dB of decode(mean of encode(pictures)); pictures float32 [N, 3, H, W] in -1..1."""
    values = [
        psnr(vae.decode(vae.encode(batch).latent_dist.mode()).sample.clip(-1, 1), batch)
        for batch in paddle.split(pictures, math.ceil(len(pictures) / batch_size))
    ]
    return float(np.concatenate(values).mean())


@paddle.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: paddle.Tensor) -> None:
    """Set shift and scale so that (latent - shift) * scale has mean 0 and deviation 1."""
    latents = vae.encode(pictures).latent_dist.mode()
    shift, deviation = float(latents.mean()), float(latents.std())
    vae.register_to_config(scaling_factor=round(1 / deviation, 4), shift_factor=round(shift, 4))
