"""What is encoded: everything or windows, only what the run sees; and room for the encoders meanwhile."""

import numpy as np
import paddle
import pytest

import ppcoat.distill.encoding as encoding
from ppcoat.config.lightning import lightning_config
from ppcoat.data import garments
from ppcoat.data.batches import ResumableBatches
from ppcoat.data.cache import Encoders, TrainingCache, WindowedCache, build_cache
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.distill.encoding import OneByOne, blocks_to_leave, encode_pictures
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks


class Pipeline:
    """The parts of a pipeline that are looked at."""

    vae = text_encoder = text_encoder_2 = paddle.nn.Linear(2, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoding")
    garments.write_folder(folder, 12, seed=1)
    return folder


@pytest.fixture
def encode(data, monkeypatch, tmp_path):
    """encode(ranks, flag=value, ...) -> what encode_pictures gives for 12 pictures, and for how many it
    asked at once. A picture takes 4 * (3 + 2) bytes encoded."""
    asked = []

    def encode_dataset(spec, run, examples, *_):
        asked.append(len(examples))
        text = lambda captions: (paddle.ones([len(captions), 1]), paddle.ones([len(captions), 1]))  # noqa: E731
        return build_cache(examples, Encoders(lambda x: x.mean([2, 3], keepdim=True), text), ["preview"])

    monkeypatch.setattr(encoding, "encode_dataset", encode_dataset)
    monkeypatch.setattr(encoding, "encode_for_all", encode_dataset)

    def make(ranks=None, **flags):
        ranks = ranks or Ranks()
        config = lightning_config(
            {"data_path": str(data), "output_dir": str(tmp_path), "resolution": 64} | flags
        )
        run = config.run_config(data)
        examples = all_examples(scan_datasets(run))
        batches = ResumableBatches(examples, config.train_batch_size * ranks.size, config.seed)
        asked.clear()
        return encode_pictures(OneByOne(), config, run, examples, batches, Pipeline(), ranks), list(asked)

    return make


def test_few_pictures_are_encoded_at_once(encode, capsys):
    cache, asked = encode()
    assert isinstance(cache, TrainingCache) and asked == [12]
    assert "encoding the 12 pictures of this run at once\n" in capsys.readouterr().out


def test_pictures_that_the_run_does_not_see_are_not_encoded(encode):
    cache, asked = encode(max_train_steps=2, train_batch_size=2, gradient_accumulation_steps=2)
    there = [i for i, latent in enumerate(cache.latents) if latent is not None]
    assert asked == [8] == [len(there)] and len(cache.latents) == len(cache.examples) == 12
    batches = ResumableBatches(cache.examples, 2, lightning_config({"data_path": "x"}).seed)
    assert sorted(i for _ in range(4) for i in next(batches)) == there
    everything = encode()[0].latents
    for i in there:
        np.testing.assert_array_equal(cache.latents[i].numpy(), everything[i].numpy())


@pytest.mark.parametrize("ranks", [Ranks(), Ranks(0, 2)], ids=["one rank", "two"])
def test_many_pictures_come_in_windows_unless_host_memory_holds_them_all(encode, monkeypatch, capsys, ranks):
    of_all = 12 * 4 * (3 + 2) * ranks.size
    monkeypatch.setattr(encoding, "WINDOW", 5)
    monkeypatch.setattr(encoding, "AT_ONCE_BYTES", of_all)
    monkeypatch.setattr(encoding, "_at_once", lambda *_: "all")
    assert encode(ranks, train_batch_size=2)[0] == "all"
    monkeypatch.setattr(encoding, "AT_ONCE_BYTES", of_all - 1)
    cache, asked = encode(ranks, train_batch_size=2)
    assert isinstance(cache, WindowedCache) and asked == [1]
    assert (cache.length, cache.last) == (2, 28652)
    assert "encoding 5 pictures ahead on each rank" in capsys.readouterr().out


def test_a_given_number_wins_over_what_fits(encode):
    cache, asked = encode(encode_ahead=11, train_batch_size=2, gradient_accumulation_steps=2)
    assert (cache.length, cache.last, asked) == (4, 2 * 28652, [1])
    assert isinstance(encode(encode_ahead=12)[0], TrainingCache)


def test_encodings_do_not_depend_on_what_else_is_encoded(monkeypatch):
    """Stand-ins that give the size of their call."""

    def image(pixels):
        return pixels[:, :, ::8, ::8] + len(pixels)

    def text(captions):
        values = paddle.to_tensor([[float(len(caption) + len(captions))] for caption in captions])
        return values.unsqueeze(-1), -values

    monkeypatch.setattr(FluxSpec, "encoders", lambda *_: Encoders(image, text, "vae", "te"))
    encoders = OneByOne().encoders(None, None)
    pixels = paddle.rand([3, 3, 16, 16])
    np.testing.assert_array_equal(encoders.image(pixels).numpy(), (pixels[:, :, ::8, ::8] + 1).numpy())
    embeds, pooled = encoders.text(["a", "bb", ""])
    np.testing.assert_array_equal(embeds.numpy(), [[[2]], [[3]], [[1]]])
    np.testing.assert_array_equal(pooled.numpy(), [[-2], [-3], [-1]])
    assert (encoders.image_identity, encoders.text_identity) == ("vae", "te")


@pytest.mark.parametrize(
    ("swapped", "weight", "chosen"), [(0, 0, []), (0, 1, [4]), (2, 1, [2]), (0, 10**9, range(5))]
)
def test_the_last_blocks_that_are_not_swapped_make_room(student, swapped, weight, chosen):
    blocks = list(student.named_blocks().values())
    assert [blocks.index(block) for block in blocks_to_leave(student, swapped, weight)] == list(chosen)
    last = sum(p.size * 4 for p in blocks[-1].parameters())
    assert len(blocks_to_leave(student, 0, last)) == 1 and len(blocks_to_leave(student, 0, last + 1)) == 2


def test_blocks_leave_before_encoders_come_and_return_after_they_left(student, monkeypatch, tmp_path):
    """Also where encoding fails."""
    happened = []

    class Swapper:
        def __init__(self, blocks):
            happened.append(f"{len(blocks)} leave")

        def remove(self):
            happened.append("return")

    config = lightning_config({"data_path": "none", "output_dir": str(tmp_path), "device": "cpu"})
    pipeline = Pipeline()
    pipeline.transformer = student
    monkeypatch.setattr(encoding, "swap_blocks", Swapper)
    monkeypatch.setattr(FluxSpec, "load_encoders", lambda *_: happened.append("load"))
    monkeypatch.setattr(encoding, "drop_encoders", lambda *_, **__: happened.append("drop"))
    monkeypatch.setattr(FluxSpec, "encoders", lambda *_: Encoders(None, None))
    with pytest.raises(KeyError), encoding._encoders(OneByOne(), config.run_config("none"), pipeline, 1):
        raise KeyError
    assert happened == ["1 leave", "load", "drop", "return"]
