"""Window after window gives what everything at once gives, and holds no more than it says."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import paddle
import pytest
from PIL import Image

from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, WindowedCache, build_cache
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError

LAST = 30  # batches in a run


class Loader:
    """Stand-ins for encoders that come and go. A latent is the mean colour, an embedding one number for the
    caption; `watch` is called when they are there."""

    def __init__(self):
        self.loads, self.there, self.pictures, self.captions = 0, False, [], []
        self.watch = lambda: None

    @contextmanager
    def __call__(self):
        assert not self.there
        self.loads, self.there = self.loads + 1, True
        paddle.rand([3])  # as a new layer's initial weights do
        self.watch()
        try:
            yield self.encoders()
        finally:
            self.there = False

    def encoders(self):
        return Encoders(self.image, self.text, "vae", "te")

    def image(self, pixels):
        self.pictures += pixels.mean([1, 2, 3]).numpy().round(4).tolist()
        return pixels.mean([2, 3], keepdim=True)

    def text(self, captions):
        self.captions += captions
        values = paddle.to_tensor([[sum(map(ord, caption))] for caption in captions], dtype="float32")
        return values.reshape([-1, 1, 1]) * paddle.ones([1, 3, 2]), -values


@pytest.fixture
def examples(tmp_path):
    """23 pictures of two sizes, one with variants, all with dropout."""
    found = []
    for number in range(23):
        path, size = tmp_path / f"{number:02d}.png", (16, 16) if number % 3 else (32, 16)
        Image.new("RGB", size, (10 * number, 0, 255)).save(path)
        captions = (f"shirt {number}",) if number != 5 else ("dress", "red dress")
        item = Item(path, captions[0], *size)
        found.append(Example(item, size, captions, caption_dropout_rate=0.3))
    return found


@pytest.fixture
def make(examples):
    """make(loader, length=3, ...) -> cache of one rank, 4 pictures in a batch."""

    def cache(loader, length=3, some=examples, **settings):
        kept = build_cache(some[:1], loader.encoders(), ["preview"], reg_weight=0.5)
        loader.pictures, loader.captions = [], []
        return WindowedCache(some, ResumableBatches(some, 4, 7), loader, length, LAST, kept, **settings)

    return cache


def run(cache, batches, count, start=0):
    """The tensors of `count` batches as numpy, and the number that rng gives after each; batch n gets the
    generator of step n, as in training."""
    for number in range(start, start + count):
        rng = np.random.default_rng([1, number])
        batch = cache.batch(next(batches), rng)
        tensors = {name: batch[name].numpy() for name in ("latents", "prompt_embeds", "pooled")}
        yield tensors | {"facts": (batch["loss_weight"], rng.random())}


def assert_same(ours, theirs, share=list):
    assert ours.keys() == theirs.keys() and ours["facts"] == theirs["facts"]
    for name in ("latents", "prompt_embeds", "pooled"):
        assert ours[name].shape == theirs[name].shape
        np.testing.assert_array_equal(share(ours[name]), share(theirs[name]))


def of_rank(rank):
    return lambda batch: batch[2 * rank : 2 * rank + 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_gets_its_rows_of_everything_at_once(examples, make, rank):
    loader, share = Loader(), of_rank(rank)
    cache = make(loader, share=share)
    whole = build_cache(examples, Loader().encoders(), reg_weight=0.5)
    expected = run(whole, ResumableBatches(examples, 4, 7), LAST)
    for ours, theirs in zip(run(cache, cache.batches, LAST), expected, strict=True):
        assert ours["latents"].shape[0] == 4
        assert_same(ours, theirs, share)
    assert loader.loads == LAST / 3


def test_no_more_is_held_than_a_window_and_the_old_one_leaves_first(make):
    loader = Loader()
    cache, held = make(loader, length=2, share=of_rank(0)), []
    loader.watch = lambda: held.append(cache.pictures)
    for number, _ in enumerate(run(cache, cache.batches, LAST), 1):
        assert 2 <= cache.pictures <= 4 and not loader.there
        assert loader.loads == -(-number // 2)
    assert held == [0] * (LAST // 2)


def test_windows_are_counted_in_batches_so_that_ranks_stay_together(make, examples):
    """Four pictures are all there are; another rank may not have had all of them."""
    loader = Loader()
    cache = make(loader, some=[example for example in examples if example.size == (16, 16)][:4])
    list(run(cache, cache.batches, 6))
    assert loader.loads == 2


def test_a_run_that_goes_on_elsewhere_gets_the_same(make):
    whole = make(Loader())
    expected = list(run(whole, whole.batches, 12))
    again = make(Loader())
    again.batches.batches = 7  # in the midst of a window of the first run
    for ours, theirs in zip(run(again, again.batches, 5, start=7), expected[7:], strict=True):
        assert_same(ours, theirs, np.asarray)


def test_nothing_is_encoded_beyond_the_run_nor_twice_in_a_window(examples, make):
    loader = Loader()
    cache = replace(make(loader, length=100), last=4)
    seen = {i for batch in cache.batches.ahead(4) for i in batch}
    list(run(cache, cache.batches, 4))
    assert len(loader.pictures) == len(seen) < len(examples)
    wanted = {caption for i in seen for caption in examples[i].captions}
    assert sorted(loader.captions) == sorted(wanted)  # neither "" nor the preview's again


def test_previews_are_there_before_and_between_windows(make):
    loader = Loader()
    cache = make(loader)
    before = cache.text(["preview", ""])
    list(run(cache, cache.batches, 1))
    assert loader.loads == 1
    for ours, theirs in zip(cache.text(["preview", ""]), before, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_loading_encoders_leaves_the_generator_of_training_alone(make):
    cache = make(Loader())
    paddle.seed(3)
    expected = paddle.rand([4]).numpy()
    paddle.seed(3)
    list(run(cache, cache.batches, 1))
    np.testing.assert_array_equal(paddle.rand([4]).numpy(), expected)


def test_a_picture_that_went_bad_is_named_in_its_window(examples, make):
    loader = Loader()
    cache = make(loader)
    bad = next(i for batch in list(cache.batches.ahead(6))[3:] for i in batch)
    cache.examples[bad].item.image_path.write_bytes(b"no picture")
    batches = run(cache, cache.batches, 6)
    for _ in range(3):
        next(batches)
    with pytest.raises(ConfigError, match=rf"{bad:02d}\.png.*next \d+ pictures; checkpoints are unharmed"):
        next(batches)
    assert not loader.there and cache.pictures == 0


def test_a_store_is_read_before_anything_is_encoded(make, tmp_path):
    first, second = Loader(), Loader()
    for loader in (first, second):
        cache = make(loader, store=EmbeddingStore(tmp_path / "store"))
        list(run(cache, cache.batches, 3))
    assert first.pictures and not second.pictures and not second.captions
