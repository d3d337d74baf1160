"""What several ranks encode: the first rank all, the others nothing. What `memory: auto` plans with."""

import errno
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from ppcoat.atomic import write_text
from ppcoat.config.resume import settings_that_matter
from ppcoat.data.cache import Encoders
from ppcoat.data.embedding_store import EmbeddingStore
from ppcoat.data.examples import all_examples, scan_datasets
from ppcoat.errors import ConfigError
from ppcoat.fp8.formats import FP8Support
from ppcoat.plan.settings import as_given, with_settings
from ppcoat.train import run
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import encode_for_all, with_fitting_settings

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


@pytest.fixture
def planned(make_config, monkeypatch):
    """planned(free of each rank) -> the config of rank 0, and the bytes that all so far were planned with."""
    asked, chosen = [], {8: "coat", 5: "coat+recompute"}

    def planning(config, memory_model, free=None):
        asked.append(free)
        wanted = as_given(config, 0)
        return with_settings(config, replace(wanted, policy=chosen[free // 10**9], blocks_to_swap=1))

    def run_with(*free):
        meter = SimpleNamespace(free_memory=lambda: free[0], total_memory=lambda: 12 * 10**9)
        monkeypatch.setattr(run, "HostMeter", lambda: meter)
        others = [[count] for count in free[1:]]
        ranks = SimpleNamespace(
            is_first=True,
            gather=lambda values: np.array([values, *others]),
            from_first=lambda content: content,
        )
        config = make_config("memory=auto", "coat.enabled=true", "vram_gb=null")
        return with_fitting_settings(SimpleNamespace(memory_model=None), config, ranks), asked

    monkeypatch.setattr(run, "with_memory_plan", planning)
    return run_with


def test_auto_takes_the_memory_that_is_free_on_the_fullest_rank(planned, capsys):
    for free in ((8, 5), (5, 8)):
        config, asked = planned(*(gigabytes * 10**9 for gigabytes in free))
        assert asked.pop() == 5 * 10**9 and config.coat.activation.policy == "coat+recompute"
        assert capsys.readouterr().out.startswith("memory: auto takes the 5.0 GB that are free of 12.0: ")


def test_a_run_that_goes_on_keeps_its_settings_whatever_is_free_now(planned, capsys):
    config, asked = planned(8 * 10**9)
    write_text(config.run_dir / "config.yaml", run.dump_config(config))
    assert planned(5 * 10**9)[0] != config  # nothing to go on from
    (config.run_dir / "checkpoints").mkdir()
    (config.run_dir / "checkpoints" / "latest").write_text("x")
    again, _ = planned(5 * 10**9)
    assert again == config and len(asked) == 2
    again, _ = planned(8 * 10**9, 5 * 10**9)  # the first rank's folder counts
    assert again == config and len(asked) == 2
    assert "the settings with which this run began" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes", [["train.batch_size=3"], ["datasets.0.resolution=128"], ["network.linear=9"]]
)
def test_other_work_is_planned_anew(planned, make_config, changes):
    config, _ = planned(8 * 10**9)
    write_text(config.run_dir / "config.yaml", run.dump_config(config))
    (config.run_dir / "checkpoints").mkdir()
    (config.run_dir / "checkpoints" / "latest").write_text("x")
    auto = ["memory=auto", "coat.enabled=true", "vram_gb=null"]
    assert run._planned_before(make_config(*auto)) is not None
    assert run._planned_before(make_config(*auto, *changes)) is None
    (config.run_dir / "config.yaml").write_text("of: a later version\n")
    assert run._planned_before(make_config(*auto)) is None


def test_fp8_products_want_a_card_that_has_them(make_config, monkeypatch):
    """Before sm_89 the run ends with one line, before encoders are read."""
    old = FP8Support(True, False, "gpu:0 (sm_86): FP8 is stored; FP8 matmul needs sm_89 or later")
    monkeypatch.setattr(run, "fp8_support", lambda: old)
    monkeypatch.setattr(run, "on_gpu", lambda: True)
    config = make_config("model.quantize=fp8", "model.quantize_matmul=true")
    with pytest.raises(ConfigError, match=r"model.quantize_matmul: gpu:0 \(sm_86\): .* leave it out"):
        run.check_inputs(run.MODEL_SPECS["flux"], config)


def test_deterministic_kernels_may_come_and_go(make_config):
    first, second = (run.compatible(make_config(f"train.deterministic={on}"), []) for on in ("true", "false"))
    assert first == second  # settings_that_matter tells of it
    assert "train.deterministic" in settings_that_matter(make_config())
