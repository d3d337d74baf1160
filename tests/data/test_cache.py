"""The cache: each thing encoded once, batches right, dropout seeded."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from ppcoat.data.cache import build_cache
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError


class Encoders:
    """Stand-ins that record their calls: a latent is the mean colour, an embedding the caption's length."""

    def __init__(self, dtype="float32"):
        self.pictures, self.captions, self.dtype = 0, [], dtype

    def image(self, pixels):
        self.pictures += pixels.shape[0]
        assert pixels.dtype == paddle.float32 and pixels.shape[1:] == [3, 16, 16]
        return pixels.mean([2, 3], keepdim=True).astype(self.dtype)

    def text(self, captions):
        self.captions += captions
        lengths = paddle.to_tensor([len(caption) for caption in captions], dtype="float32")
        embeds = paddle.ones([len(captions), 5, 2]) * lengths.reshape([-1, 1, 1])
        return embeds.astype(self.dtype), (-lengths.reshape([-1, 1])).astype(self.dtype)


@pytest.fixture
def items(tmp_path):
    found = []
    for number, caption in enumerate(["a [trigger]", "bb", "a [trigger]", "dddd"]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 16), (50 * number, 0, 255)).save(path)
        found.append(Item(path, caption, 16, 16))
    return found


def build(items, encoders, **options):
    return build_cache(items, encoders.image, encoders.text, resolution=16, trigger_word="sks", **options)


def test_everything_is_encoded_once(items):
    encoders = Encoders()
    cache = build(items, encoders, extra_captions=["preview", "a sks"], batch_size=3)
    assert encoders.pictures == 4
    assert encoders.captions == ["a sks", "sks bb", "sks dddd", "preview"]
    assert cache.captions == ["a sks", "sks bb", "a sks", "sks dddd"]
    with_dropout = Encoders()
    build(items, with_dropout, caption_dropout_rate=0.1)
    assert with_dropout.captions == ["a sks", "sks bb", "sks dddd", ""]


def test_batches_hold_the_right_rows(items):
    cache = build(items, Encoders())
    batch = cache.batch([3, 0, 3], np.random.default_rng(0))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "latents": (3, 3, 1, 1),
        "prompt_embeds": (3, 5, 2),
        "pooled": (3, 1),
    }
    expected = np.array([150, 0, 150]) / 127.5 - 1
    np.testing.assert_allclose(batch["latents"][:, 0, 0, 0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(
        batch["prompt_embeds"][:, 4, 1].numpy(), [8, 5, 8]
    )  # len("sks dddd"), "a sks"
    np.testing.assert_array_equal(batch["pooled"][:, 0].numpy(), [-8, -5, -8])
    np.testing.assert_array_equal(cache.text(["sks bb"])[1].numpy(), [[-6]])


def test_dropout_is_seeded_and_leaves_latents_alone(items):
    cache = build(items, Encoders(), caption_dropout_rate=0.5)
    first, second = (cache.batch([0, 1, 2, 3] * 8, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first["pooled"].numpy(), second["pooled"].numpy())
    dropped = first["pooled"].numpy()[:, 0] == 0
    # PCG64 is stable across numpy releases, so the mask is drawn here again
    np.testing.assert_array_equal(dropped, np.random.default_rng(7).random(32) < 0.5)
    full = build(items, Encoders()).batch([0, 1, 2, 3] * 8, np.random.default_rng(7))
    np.testing.assert_array_equal(first["latents"].numpy(), full["latents"].numpy())


def test_bfloat16_encodings_keep_their_dtype_and_carry_no_gradient(items):
    cache = build(items, Encoders("bfloat16"))
    batch = cache.batch([0, 1], np.random.default_rng(0))
    assert {value.dtype for value in batch.values()} == {paddle.bfloat16}
    assert all(value.stop_gradient for value in batch.values())


def test_what_is_not_finite_is_named(items):
    encoders = Encoders()
    with pytest.raises(ConfigError, match=r"latent of .*0\.png"):
        build_cache(items, lambda pixels: encoders.image(pixels) * float("nan"), encoders.text, 16)
    with pytest.raises(ConfigError, match="pooled text embedding of 'bb'"):
        build_cache(
            items[1:2],
            encoders.image,
            lambda texts: (encoders.text(texts)[0], paddle.to_tensor([[np.inf]])),
            16,
        )


def test_a_picture_that_vanished_is_named(items):
    Path(items[2].image_path).unlink()
    with pytest.raises(ConfigError, match=r"2\.png"):
        build(items, Encoders())
