"""The VAE in tiles and picture by picture, against the VAE as ppdiffusers has it."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import AutoencoderKL

import ppcoat
from ppcoat.data import garments
from ppcoat.models import vae_tiling
from ppcoat.models.loading import load_vae

LEVEL = 2 / 255  # of a picture, in pixels of -1..1
TINY = Path(ppcoat.__path__[0]) / "assets" / "tiny_flux" / "vae"


@pytest.fixture(scope="module")
def trained():
    """That of the built-in tiny FLUX: three stages, tiles of 64 pixels."""
    return load_vae(TINY, "float32")


@pytest.fixture(scope="module")
def random_vae():
    """FLUX's four stages, with a post_quant_conv and a quant_conv; tiles of 64 pixels."""
    paddle.seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(8, 8, 16, 16),
                        latent_channels=4, norm_num_groups=4, sample_size=64)  # fmt: skip
    return vae.eval()


@pytest.fixture
def rounds(monkeypatch):
    return lambda count: monkeypatch.setattr(vae_tiling, "ROUNDS", count)


@pytest.fixture
def seen(trained):
    """Heights and widths of what the last convolution of the trained VAE's decoder saw."""
    sizes = []
    hook = trained.decoder.conv_out.register_forward_pre_hook(
        lambda _, x: sizes.append(tuple(x[0].shape[2:]))
    )
    yield sizes
    hook.remove()


@pytest.fixture(scope="module")
def garments_latents(trained, tmp_path_factory):
    """Four pictures of the kind that the tiny FLUX knows, side by side, encoded: [1, 4, 32, 32]."""
    folder = tmp_path_factory.mktemp("garments")
    garments.write_folder(folder, 4, seed=1)
    one = [
        np.asarray(Image.open(file).convert("RGB").resize((64, 64))) for file in sorted(folder.glob("*.png"))
    ]
    four = np.concatenate([np.concatenate(one[:2], 1), np.concatenate(one[2:], 1)])
    four = np.roll(four, (24, 24), (0, 1))  # the edges of pictures are not those of tiles
    pixels = paddle.to_tensor((four / 127.5 - 1).transpose(2, 0, 1)[None].astype("float32"))
    with paddle.no_grad():
        return trained.encode(pixels).latent_dist.mode()


def smooth(seed, channels, height, width):
    """Waves, and one half unlike the other: float32 [1, channels, height, width]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(height, width)
    phases, ways = rng.uniform(0, 6.3, (channels, 1, 1)), rng.uniform(-12, 12, (2, channels, 1, 1))
    waves = np.sin(ways[0] * x + ways[1] * y + phases)
    waves[:, :, width // 2 :] *= 0.3
    return paddle.to_tensor(waves[None].astype("float32"))


@paddle.no_grad()
def both(vae, x, work):
    """What the VAE gives in tiles and whole, float32 [...]."""
    found = []
    for tiling in (True, False):
        vae.enable_tiling(tiling)
        found.append(work(vae, x).numpy())
    return found


def decoded(vae, latents):
    return vae_tiling.through_decoder(vae, latents)


def encoded(vae, pixels):
    return vae_tiling.through_encoder(vae, pixels).mode()


@pytest.mark.parametrize(("work", "channels", "per_side"), [(decoded, 4, 8), (encoded, 3, 1)])
def test_with_the_statistics_of_the_whole_picture_only_rounding_is_left(
    random_vae, rounds, monkeypatch, work, channels, per_side
):
    """As many rounds as there are norms in the tiles; and attention in parts."""
    rounds(14 if work is decoded else 8)
    monkeypatch.setattr(vae_tiling, "SCORES", 300)
    tiled, whole = both(random_vae, smooth(0, channels, 72 // per_side, 104 // per_side), work)
    assert tiled.shape == whole.shape
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=2e-5 * np.abs(whole).max())


def test_a_picture_differs_by_less_than_a_level_and_has_no_seam(trained, garments_latents, rounds):
    """With each tile's own statistics it is many levels off. Where tiles meet, the difference from the whole
    picture jumps no more than elsewhere."""
    tiled, whole = both(trained, garments_latents, decoded)
    error = tiled - whole
    assert np.abs(error).max() < LEVEL and np.sqrt(np.square(error).mean()) < 0.3 * LEVEL
    for axis in (2, 3):
        jumps = np.abs(np.diff(error, axis=axis)).mean(axis=(0, 1, 5 - axis))
        assert jumps[63] <= np.quantile(jumps, 0.9)
    rounds(0)
    assert np.abs(both(trained, garments_latents, decoded)[0] - whole).max() > 5 * LEVEL


def test_the_tiles_are_small_and_alone_they_are_the_whole(trained, rounds, seen):
    rounds(1)
    both(trained, smooth(3, 4, 16, 48), decoded)
    tiles, whole = seen[:-1], seen[-1]
    assert whole == (64, 192) and len(tiles) == 2 * 3
    assert max(max(tile) for tile in tiles) == vae_tiling.decoded_at_once(trained)
    seen.clear()
    tiled, whole = both(trained, smooth(3, 4, 16, 16), decoded)
    assert seen == [(64, 64)] * 2
    np.testing.assert_array_equal(tiled, whole)


@paddle.no_grad()
def test_slices_are_equal_bit_for_bit_and_tiles_take_one_picture_at_a_time(trained, rounds):
    rounds(1)
    latents = paddle.concat([smooth(seed, 4, 8, 24) for seed in range(2)])
    alone = [vae_tiling.through_decoder(trained, each).numpy() for each in latents.split(2)]
    trained.enable_slicing()
    sliced = vae_tiling.through_decoder(trained, latents).numpy()
    trained.disable_slicing()
    np.testing.assert_array_equal(sliced, np.concatenate(alone))
    trained.enable_tiling()
    together, one = (vae_tiling.through_decoder(trained, each).numpy() for each in (latents, latents[1:]))
    trained.disable_tiling()
    np.testing.assert_array_equal(together[1:], one)
