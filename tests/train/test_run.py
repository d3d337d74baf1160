"""What several ranks encode: the first rank all, the others nothing."""

import errno

import numpy as np
import paddle
import pytest

from ppcoat.data.cache import Encoders
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.errors import ConfigError
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import encode_for_all

PICTURES = 6
ON_DISK = "datasets.0.cache_to_disk=true"
PREVIEW = ("sample.sample_every=1", "sample.prompts=[a hat]")


class FakeSpec:
    """A ModelSpec as far as encoding goes: a latent is the mean colour, an embedding the caption's length.

    Its encoders do not say who they are, as those of a run without a cache on disk.
    """

    preview_negatives = ("",)

    def __init__(self):
        self.pictures, self.captions = 0, []

    def encoders(self, config, pipeline):
        assert pipeline == "pipeline"
        return Encoders(self.image, self.text)

    def image(self, pixels):
        self.pictures += len(pixels)
        return pixels.mean([2, 3], keepdim=True)

    def text(self, captions):
        self.captions += captions
        lengths = paddle.to_tensor([[float(len(caption))] for caption in captions])
        return lengths.astype("bfloat16"), -lengths


def encode(config, ranks):
    """What a rank has encoded itself, and what its cache holds."""
    spec, examples = FakeSpec(), all_examples(scan_datasets(config))
    cache = encode_for_all(spec, config, examples, "pipeline", ranks)
    held = [latent.numpy() for latent in cache.latents]
    held += [row.astype("float32").numpy() for text in cache.embeddings.values() for row in text]
    return (spec.pictures, len(spec.captions)), (list(cache.embeddings), held)


def encode_and_tell(ranks, tell, configs):
    tell(encode(configs[ranks.rank], ranks))
    ranks.close()


def on_two_ranks(start, *configs):
    processes, receivers = start(lambda ranks, tell: encode_and_tell(ranks, tell, configs))
    told = [receiver.recv() for receiver in receivers if receiver.poll(20)]
    for process in processes:
        process.join(timeout=20)
    return told


@pytest.mark.parametrize("overrides", [(), (ON_DISK,)], ids=["in memory", "on disk"])
def test_the_first_rank_encodes_once_and_the_other_reads(start, make_config, overrides):
    config = make_config(*PREVIEW, *overrides)
    (first, of_first), (second, of_second) = on_two_ranks(start, config, config)
    captions, held = of_first
    assert {"a hat", ""} < set(captions)
    assert first == (PICTURES, len(captions)) and second == (0, 0)
    assert captions == of_second[0]
    for mine, other in zip(held, of_second[1], strict=True):
        np.testing.assert_array_equal(mine, other)
    wanted = {config.cache_folder} if overrides else set()
    assert set(config.run_dir.iterdir()) == wanted


def test_a_rank_without_the_disk_of_the_first_encodes_for_itself(start, make_config, tmp_path):
    configs = [make_config(f"output_dir={tmp_path / machine}") for machine in ("a", "b")]
    (first, of_first), (second, of_second) = on_two_ranks(start, *configs)
    assert first == second == (PICTURES, len(of_first[0]))
    assert [list(config.run_dir.iterdir()) for config in configs] == [[], []]


def test_one_rank_writes_nothing(make_config):
    config = make_config()
    (pictures, captions), (known, _) = encode(config, Ranks())
    assert (pictures, captions) == (PICTURES, len(known))
    assert not config.run_dir.exists()


def test_a_full_disk_is_the_users_to_solve_and_a_device_error_is_not(make_config, monkeypatch):
    config = make_config(ON_DISK)

    def fail(error):
        monkeypatch.setattr(EmbeddingStore, "put", lambda *_: (_ for _ in ()).throw(error))
        encode(config, Ranks())

    with pytest.raises(ConfigError, match=r"could not be written \(No space left.*make room"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="External"):
        fail(OSError("(External) CUDA error(2)"))
