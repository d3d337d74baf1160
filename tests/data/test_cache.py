"""The cache: each thing encoded once, batches right, dropout and variants seeded, nothing encoded twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from ppcoat.data.cache import Encoders, build_cache
from ppcoat.data.captions import CaptionRules, caption_variants, final_caption
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import Example
from ppcoat.data.pairs import CutPicture
from ppcoat.data.sources import Item
from ppcoat.errors import ConfigError


class Recorder:
    """Stand-ins that record their calls: a latent is the mean colour, an embedding the caption's length."""

    def __init__(self, dtype="float32"):
        self.pictures, self.captions, self.dtype = 0, [], dtype

    def image(self, pixels):
        self.pictures += pixels.shape[0]
        assert pixels.dtype == paddle.float32 and pixels.shape[1] == 3
        return pixels.mean([2, 3], keepdim=True).astype(self.dtype)

    def text(self, captions):
        self.captions += captions
        lengths = paddle.to_tensor([len(caption) for caption in captions], dtype="float32")
        embeds = paddle.ones([len(captions), 5, 2]) * lengths.reshape([-1, 1, 1])
        return embeds.astype(self.dtype), (-lengths.reshape([-1, 1])).astype(self.dtype)


@pytest.fixture
def examples(tmp_path):
    found = []
    for number, caption in enumerate(["a [trigger]", "bb", "a [trigger]", "dddd"]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (16, 16), (50 * number, 0, 255)).save(path)
        found.append(Example(Item(path, caption, 16, 16), (16, 16), (final_caption(caption, "sks"),)))
    return found


def build(examples, recorder, identities=("vae", "te"), **options):
    return build_cache(examples, Encoders(recorder.image, recorder.text, *identities), **options)


def with_dropout(examples, rate):
    return [replace(example, caption_dropout_rate=rate) for example in examples]


def test_everything_is_encoded_once(examples):
    recorder = Recorder()
    build(examples, recorder, extra_captions=["preview", "a sks"], batch_size=3)
    assert recorder.pictures == 4
    assert recorder.captions == ["a sks", "sks bb", "sks dddd", "preview"]
    recorder = Recorder()
    build([*examples[:3], *with_dropout(examples[3:], 0.1)], recorder)
    assert recorder.captions == ["a sks", "sks bb", "sks dddd", ""]


def test_captions_of_previews_are_in_calls_of_their_own(examples):
    """The bits of a caption may depend on how many others are in its call: not on those of previews."""
    calls = []
    recorder = Recorder()
    encoders = Encoders(recorder.image, lambda some: calls.append(some) or recorder.text(some), "vae", "te")
    build_cache(examples, encoders, ["preview", "a sks"], batch_size=8)
    assert calls == [["a sks", "sks bb", "sks dddd"], ["preview"]]


@pytest.mark.parametrize(
    ("side", "batch_size", "calls"),
    [(1024, 8, [1, 1, 1]), (1040, 8, [1, 1, 1]), (512, 8, [4, 4, 1]), (768, 8, [1, 1, 1]),
     (256, 8, [8, 1]), (256, 3, [3, 3, 3])],
)  # fmt: skip
def test_pictures_in_a_call_have_a_million_pixels_at_most(examples, monkeypatch, side, batch_size, calls):
    """Or one picture that has more; and never more than batch_size."""
    monkeypatch.setattr(CutPicture, "pixels", lambda picture: np.zeros((3, 4, 4), np.float32))
    same = [replace(examples[0], size=(side, side))] * sum(calls)
    sizes = []

    def image(pixels):
        sizes.append(len(pixels))
        return pixels

    build_cache(same, Encoders(image, Recorder().text), batch_size=batch_size)
    assert sizes == calls


def test_batches_hold_the_right_rows(examples):
    cache = build(examples, Recorder())
    batch = cache.batch([3, 0, 3], np.random.default_rng(0))
    assert batch.pop("loss_weight") == 1.0
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


def test_sizes_may_differ_and_flipped_copies_are_encoded_flipped(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255  # white in the upper left quarter
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain = Example(Item(tmp_path / "a.png", "x", 32, 16), (32, 16), ("x",))
    examples = [plain, replace(plain, size=(16, 16)), replace(plain, flip_x=True),
                replace(plain, flip_x=True, flip_y=True)]  # fmt: skip
    cache = build_cache(examples, Encoders(lambda pixels: pixels, Recorder().text), batch_size=8)
    assert [latent.shape[1:] for latent in cache.latents] == [[16, 32], [16, 16], [16, 32], [16, 32]]
    corners = [tuple(latent[0, y, x].item() for y in (0, -1) for x in (0, -1)) for latent in cache.latents]
    assert corners[0] == (1, -1, -1, -1) and corners[2] == (-1, 1, -1, -1) and corners[3] == (-1, -1, -1, 1)


def test_regularisation_batches_carry_their_weight(examples):
    cache = build([examples[0], replace(examples[1], is_reg=True)], Recorder(), reg_weight=0.25)
    rng = np.random.default_rng(0)
    assert [cache.batch([i], rng)["loss_weight"] for i in (0, 1)] == [1.0, 0.25]


def test_dropout_is_seeded_and_leaves_latents_alone(examples):
    cache = build(with_dropout(examples, 0.5), Recorder())
    first, second = (cache.batch([0, 1, 2, 3] * 8, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first["pooled"].numpy(), second["pooled"].numpy())
    dropped = first["pooled"].numpy()[:, 0] == 0
    # PCG64 is stable across numpy releases, so the mask is drawn here again
    np.testing.assert_array_equal(dropped, np.random.default_rng(7).random(32) < 0.5)
    full = build(examples, Recorder()).batch([0, 1, 2, 3] * 8, np.random.default_rng(7))
    np.testing.assert_array_equal(first["latents"].numpy(), full["latents"].numpy())


def test_variants_are_all_encoded_and_drawn_evenly_from_the_step_s_numbers(examples):
    captions = caption_variants("a, bb, ccc, dddd", CaptionRules(token_dropout_rate=0.5), seed=0)
    lengths = sorted(-len(caption) for caption in captions)
    recorder = Recorder()
    cache = build([replace(examples[0], captions=captions)], recorder)
    assert set(recorder.captions) == set(captions) and len(recorder.captions) == len(set(captions))
    drawn = cache.batch([0] * 4000, np.random.default_rng(3))["pooled"].numpy()[:, 0]
    again = cache.batch([0] * 4000, np.random.default_rng(3))["pooled"].numpy()[:, 0]
    np.testing.assert_array_equal(drawn, again)
    for length in set(lengths):
        share = lengths.count(length) / len(lengths)
        assert abs((drawn == length).mean() - share) < 4 * np.sqrt(share * (1 - share) / 4000)


def test_random_numbers_used_depend_on_variants_alone(examples):
    def used(cache):
        rng = np.random.default_rng(0)
        cache.batch([0, 1], rng)
        return rng.bit_generator.state

    def after(count):
        rng = np.random.default_rng(0)
        rng.random(count)
        return rng.bit_generator.state

    assert (
        used(build(examples, Recorder())) == used(build(with_dropout(examples, 0.9), Recorder())) == after(2)
    )
    two = [*examples[:3], replace(examples[3], captions=("x", "y"))]
    assert used(build(two, Recorder())) == after(4)  # though the variants are not in this batch


def test_bfloat16_encodings_keep_their_dtype_and_carry_no_gradient(examples):
    batch = build(examples, Recorder("bfloat16")).batch([0, 1], np.random.default_rng(0))
    del batch["loss_weight"]
    assert {value.dtype for value in batch.values()} == {paddle.bfloat16}
    assert all(value.stop_gradient for value in batch.values())


def test_what_is_not_finite_is_named(examples, tmp_path):
    recorder, store = Recorder(), EmbeddingStore(tmp_path / "store")
    broken = Encoders(lambda pixels: recorder.image(pixels) * float("nan"), recorder.text)
    for _ in range(2):  # it did not get into the store
        with pytest.raises(ConfigError, match=r"latent of .*0\.png"):
            build_cache(examples, broken, store=store)
    broken = Encoders(recorder.image, lambda texts: (recorder.text(texts)[0], paddle.to_tensor([[np.inf]])))
    with pytest.raises(ConfigError, match="pooled text embedding of 'sks bb'"):
        build_cache(examples[1:2], broken)


def test_a_picture_that_vanished_is_named(examples):
    Path(examples[2].item.image_path).unlink()
    with pytest.raises(ConfigError, match=r"2\.png"):
        build(examples, Recorder())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_store_holds_is_not_encoded_again_and_is_bit_equal(examples, tmp_path, dtype):
    store = EmbeddingStore(tmp_path / "store")
    fresh = build(examples, Recorder(dtype), store=store, extra_captions=["preview"])
    second = Recorder(dtype)
    stored = build(examples, second, store=EmbeddingStore(tmp_path / "store"), extra_captions=["preview"])
    assert second.pictures == 0 and second.captions == []
    for ours, theirs in zip(fresh.latents, stored.latents, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.astype("float32").numpy(), theirs.astype("float32").numpy())
    assert fresh.embeddings.keys() == stored.embeddings.keys()
    a, b = (c.batch([3, 1], np.random.default_rng(0)) for c in (fresh, stored))
    for name in ("latents", "prompt_embeds", "pooled"):
        np.testing.assert_array_equal(a[name].astype("float32").numpy(), b[name].astype("float32").numpy())


def test_every_thing_that_changes_an_encoding_changes_its_key(examples, tmp_path):
    store = EmbeddingStore(tmp_path / "store")
    build(examples[:1], Recorder(), store=store)

    def encoded(example, identities=("vae", "te")):
        recorder = Recorder()
        build([example], recorder, identities, store=store)
        return recorder.pictures, len(recorder.captions)

    first = examples[0]
    assert encoded(first) == (0, 0)
    assert encoded(replace(first, size=(16, 32))) == encoded(replace(first, flip_x=True)) == (1, 0)
    assert encoded(replace(first, flip_y=True)) == (1, 0)
    assert encoded(replace(first, captions=("other",))) == (0, 1)
    assert encoded(first, ("another vae", "te")) == (1, 0)
    assert encoded(first, ("vae", "another te")) == (0, 1)
    copy = first.item.image_path.with_name("copy.png")
    copy.write_bytes(first.item.image_path.read_bytes())
    assert encoded(replace(first, item=replace(first.item, image_path=copy))) == (0, 0)  # content, not name
    Image.new("RGB", (16, 16), "green").save(first.item.image_path)  # same name and size, another picture
    assert encoded(first) == (1, 0)


def test_a_cut_off_entry_is_encoded_again(examples, tmp_path):
    """A caption in the company of the first time: the padding beside longer ones changes the last bits."""
    store, first = EmbeddingStore(tmp_path / "store"), Recorder()
    build(examples, first, store=store, batch_size=2)
    assert first.captions == ["a sks", "sks bb", "sks dddd"]
    found = []
    for file in sorted((tmp_path / "store").rglob("*.safetensors")):
        file.write_bytes(file.read_bytes()[:-3])
        recorder = Recorder()
        build(examples, recorder, store=store, batch_size=2)
        found.append((recorder.pictures, *recorder.captions))
    assert sorted(found) == [(0, "a sks", "sks bb")] * 2 + [(0, "sks dddd")] + [(1,)] * 4


def test_class_captions_follow_the_variant_that_was_drawn_and_dropout(examples):
    captions = {"captions": ("a sks", "b sks b"), "class_captions": ("a", "b c b")}
    several = [replace(example, **captions, caption_dropout_rate=0.3) for example in examples]
    recorder = Recorder()
    cache, lengths = build(several, recorder), set()
    assert set(recorder.captions) == {"a sks", "b sks b", "a", "b c b", ""}
    for seed in range(8):
        batch = cache.batch([0, 1, 2, 3], np.random.default_rng(seed))
        pairs = zip(batch["pooled"].tolist(), batch["class_pooled"].tolist(), strict=True)
        lengths |= {(-int(own[0]), -int(of_class[0])) for own, of_class in pairs}
        assert batch["class_prompt_embeds"].shape == batch["prompt_embeds"].shape
    assert lengths == {(5, 1), (7, 5), (0, 0)}
    assert "class_pooled" not in build(examples, Recorder()).batch([0], np.random.default_rng(0))
