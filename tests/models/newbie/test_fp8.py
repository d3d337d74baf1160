"""The FP8 base of NewBie-image: what is quantised, found again by the next start, and its peak memory."""

import gc
import json
import logging
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from ppcoat.errors import ConfigError
from ppcoat.models.loading import linear_weights
from ppcoat.models.newbie.files import load_nextdit, load_quantized_nextdit
from ppcoat.models.newbie.nextdit import NextDiT_CLIP
from ppcoat.models.quantized_base import QuantizedCopy, quantized_model_bytes
from ppcoat.nn.swap import last_blocks

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie" / "transformer"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tmp_path):
    return QuantizedCopy(tmp_path / "copy", "weights 1")


def test_every_linear_is_rounded_once_and_all_else_is_as_it_was(assert_rounded_once):
    exact, model = load_nextdit(FOLDER), load_quantized_nextdit(FOLDER)
    fp8 = assert_rounded_once(model, exact)
    assert fp8.keys() == linear_weights(exact)


def test_the_second_start_reads_the_copy_and_no_weight_of_the_model(assert_same, copy, caplog, monkeypatch):
    plain = load_quantized_nextdit(FOLDER)
    assert_same(load_quantized_nextdit(FOLDER, copy=copy), plain)
    monkeypatch.setattr("ppcoat.models.quantized_base.quantised_tensors", None)
    with caplog.at_level(logging.WARNING):
        again = load_quantized_nextdit(FOLDER, copy=copy, blocks_to_swap=2)
    assert_same(again, plain)
    assert not [record for record in caplog.records if record.name.startswith("ppcoat")]


def test_a_damaged_copy_is_made_anew_with_one_message(assert_same, copy, caplog):
    plain = load_quantized_nextdit(FOLDER, copy=copy)
    file = next(copy.folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    assert_same(load_quantized_nextdit(FOLDER, copy=copy), plain)
    assert caplog.text.count("made anew") == 1


def write_folder(folder, **config):
    """A transformer of these sizes with small random weights, float32; returns (bytes of all tensors, of the
    largest)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with paddle.LazyGuard():
        model = NextDiT_CLIP(**config)
    linears, rng = linear_weights(model), np.random.default_rng(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape[::-1] if name in linears else parameter.shape
        tensors[name] = rng.standard_normal(shape, dtype=np.float32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values()), max(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("start", ["without a copy", "first", "second"])
def test_the_whole_model_is_never_held_unquantised(copy, tmp_path, start):
    """By Paddle's own account of allocated bytes: the FP8 model, one tensor and what quantises it."""
    folder, core = tmp_path / "model", paddle.base.core
    sizes = {"dim": 256, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "axes_dims": [16, 24, 24]}
    source, biggest = write_folder(folder, **sizes, cap_feat_dim=256, clip_text_dim=256)
    if start == "second":
        load_quantized_nextdit(folder, copy=copy)
    gc.collect()  # what earlier tests left must not go meanwhile
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    model = load_quantized_nextdit(folder, copy=None if start == "without a copy" else copy)
    grown = core.host_memory_stat_peak_value("Allocated", 0) - before
    fp8 = quantized_model_bytes(model)
    print(f"{start}: source {source / 1e6:.1f} MB, FP8 {fp8 / 1e6:.1f} MB, peak {grown / 1e6:.1f} MB")
    assert fp8 < 0.26 * source and source > 30 * biggest
    assert fp8 < grown < fp8 + 6 * biggest < 0.5 * source


def test_more_layers_than_there_are_and_unknown_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="came 3, but this model has 2 blocks"):
        load_quantized_nextdit(FOLDER, blocks_to_swap=3)
    assert list(last_blocks(load_nextdit(FOLDER), 1)) == ["layers.1"]
    config = json.loads((FOLDER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
    (tmp_path / WEIGHTS).write_bytes((FOLDER / WEIGHTS).read_bytes())
    with pytest.raises(ConfigError, match="n_layers wants 3 layers, but the weights are of 2"):
        load_quantized_nextdit(tmp_path)
