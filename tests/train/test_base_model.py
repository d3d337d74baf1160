"""What the base does in a run: encoders leave, FP8 weights are kept for the next start, blocks travel."""

import logging

import numpy as np
import pytest

from ppcoat.config.load import load_config
from ppcoat.errors import ConfigError
from ppcoat.models.flux.pipeline import FluxPipeline
from ppcoat.nn.base_weight import FP8Weight
from ppcoat.plan.phases import MemoryModel
from ppcoat.plan.settings import plan
from ppcoat.train.base_model import drop_encoders
from ppcoat.train.flux import FluxSpec
from ppcoat.train.ranks import Ranks
from ppcoat.train.run import train_lora

pytestmark = pytest.mark.usefixtures("small_flux")


def loaded(config, **keywords):
    pipeline = FluxSpec().load_encoders(config, "float32")
    assert pipeline.transformer is None
    FluxSpec().load_base(pipeline, config, "float32", Ranks(), **keywords)
    return pipeline


@pytest.mark.parametrize("streamed", ["false", "true"])
def test_encoders_encode_as_in_a_whole_pipeline_and_leave(make_config, streamed):
    config = make_config(f"model.stream_encoders={streamed}")
    whole = FluxPipeline.from_pretrained(config.model.name_or_path, "float32")
    encoders = FluxSpec().load_encoders(config, "float32")
    for ours, theirs in zip(
        encoders.encode_prompt(["a red dress"]), whole.encode_prompt(["a red dress"]), strict=True
    ):
        assert (ours == theirs).all() and ours.dtype == theirs.dtype
    assert list(encoders.__dict__.get("_swappers", {})) == ["text_encoder_2"] * (streamed == "true")
    drop_encoders(encoders, ("text_encoder", "text_encoder_2"), keep_vae=True)
    assert encoders.text_encoder_2 is encoders.text_encoder is None and encoders.vae is not None
    assert "_offload" not in encoders.__dict__ and not encoders.__dict__.get("_swappers")
    pipeline = loaded(config)
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    assert pipeline.vae is None  # no previews in this run
    with_previews = make_config("sample.sample_every=2", "sample.prompts=['a dress']")
    assert loaded(with_previews).vae is not None


def test_fp8_base_is_kept_for_the_next_start(make_config, monkeypatch, caplog):
    config = make_config("model.quantize=true")
    pipeline = loaded(config)
    weights = [layer for layer in pipeline.transformer.sublayers() if isinstance(layer, FP8Weight)]
    assert len(weights) > 20
    written = list(config.cache_folder.glob("*-transformer-fp8/*.safetensors"))
    assert written
    monkeypatch.setattr(
        "ppcoat.models.quantized_base.quantised_tensors", lambda *_: pytest.fail("quantised a second time")
    )
    with caplog.at_level(logging.WARNING):
        again = loaded(config)
    assert not caplog.records
    for name, value in again.transformer.state_dict().items():
        assert (value.numpy() == pipeline.transformer.state_dict()[name].numpy()).all(), name


@pytest.mark.parametrize(
    "base", ["fp4", *(pytest.param(base, marks=pytest.mark.slow) for base in ("int8", "nf4"))]
)
def test_a_run_on_another_format_follows_the_float_run_resumes_and_keeps_a_copy_of_its_own(make_config, base):
    plain = train_lora(make_config("name=plain")).losses
    quantize = f"model.quantize={base}"
    config = make_config("name=whole", quantize)
    whole = train_lora(config).losses
    assert whole != plain and whole == pytest.approx(plain, rel=0.1)
    assert list(config.cache_folder.glob(f"*-transformer-{base}/*.safetensors"))
    stopped = ("name=stopped", quantize)
    losses = train_lora(make_config(*stopped, "train.steps=2", "model.blocks_to_swap=2")).losses
    assert losses + train_lora(make_config(*stopped)).losses == whole


def test_without_a_copy_nothing_is_written(make_config):
    config = make_config("model.quantize=true")
    loaded(config, keep_copy=False)
    assert not config.cache_folder.exists()


def test_a_run_on_swapped_blocks_is_bit_equal_and_on_fp8_weights_it_is_not(make_config):
    plain = train_lora(make_config("name=plain")).losses
    swapped = train_lora(make_config("name=swapped", "model.blocks_to_swap=2")).losses
    quantised = train_lora(make_config("name=fp8", "model.quantize=true")).losses
    assert swapped == plain
    assert quantised != plain and quantised == pytest.approx(plain, rel=0.05)


def test_more_blocks_than_there_are_stop_the_run_before_anything_is_loaded(make_config, monkeypatch):
    monkeypatch.setattr(FluxSpec, "load_encoders", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="blocks_to_swap: came 3, but this model has 2 blocks"):
        train_lora(make_config("model.blocks_to_swap=3"))


def test_memory_auto_trains_with_what_the_plan_chooses(make_config):
    config = make_config("memory=auto", "vram_gb=4")
    settings = plan(config, MemoryModel, 4).settings
    assert np.isfinite(train_lora(config).losses).all()
    used = load_config(config.run_dir / "config.yaml")
    assert (used.coat.activation.policy, used.train.batch_size) == (settings.policy, settings.batch_size)
    with pytest.raises(ConfigError, match="smallest"):
        train_lora(make_config("name=none", "memory=auto", "vram_gb=0.01"))
