"""The FP8 copy on disk: equal to what was quantised, known by its source, whole or absent."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from ppcoat.errors import ConfigError
from ppcoat.models import writing
from ppcoat.models.quantized_base import QuantizedCopy, load_quantized_transformer

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def source(bf16_folder):
    return bf16_folder / "transformer"


@pytest.fixture
def copy(tmp_path):
    return QuantizedCopy(tmp_path / "deep/copy", "weights 1")


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("ppcoat")]


def test_the_second_start_reads_the_copy_and_no_weight_of_the_model(
    assert_same, source, copy, tmp_path, caplog, monkeypatch
):
    plain = load_quantized_transformer(source)
    assert_same(load_quantized_transformer(source, copy=copy), plain)
    monkeypatch.setattr("ppcoat.models.quantized_base.quantised_tensors", None)
    assert_same(load_quantized_transformer(source, copy=copy), plain)
    assert not said(caplog)
    assert [path.name for path in copy.folder.parent.iterdir()] == ["copy"]  # nothing temporary is left


def test_it_is_a_folder_of_shards_that_safetensors_reads(assert_same, source, copy, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 200_000)
    plain = {name: tensor.numpy() for name, tensor in load_quantized_transformer(source).state_dict().items()}
    assert_same(load_quantized_transformer(source, copy=copy), load_quantized_transformer(source))
    names = json.loads((copy.folder / INDEX).read_text())["weight_map"]
    shards = sorted(copy.folder.glob("*.safetensors"))
    assert len(shards) == len(set(names.values())) > 2
    found = {}
    for shard in shards:
        with safe_open(str(shard), framework="np") as file:
            assert "weights 1" in file.metadata()["source"]
            found |= {name: file.get_tensor(name) for name in file.keys() if "scale" in name}  # noqa: SIM118
    for name, scale in found.items():
        np.testing.assert_array_equal(scale, plain[name])
    assert (copy.folder / "config.json").read_text() and len(names) == len(plain)


def test_a_copy_of_other_weights_is_made_anew_with_one_message(
    assert_same, source, fp32_folder, copy, caplog
):
    load_quantized_transformer(fp32_folder / "transformer", copy=QuantizedCopy(copy.folder, "weights 0"))
    assert_same(load_quantized_transformer(source, copy=copy), load_quantized_transformer(source))
    assert len(said(caplog)) == 1 and "of other weights: it is made anew" in said(caplog)[0]
    load_quantized_transformer(source, copy=copy)
    assert len(said(caplog)) == 1


def cut(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


def flip(folder):
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def without_index(folder):
    (folder / INDEX).unlink()


def without_sums(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["metadata"]["crc32"]
    (folder / INDEX).write_text(json.dumps(index))


def garbage(folder):
    next(folder.glob("*.safetensors")).write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [cut, flip, without_index, without_sums, garbage, shutil.rmtree])
def test_a_damaged_copy_is_made_anew_with_one_message(assert_same, small_flux, copy, caplog, damage):
    source = small_flux / "transformer"
    plain = load_quantized_transformer(source, copy=copy)
    damage(copy.folder)
    if damage is shutil.rmtree:
        copy.folder.mkdir()
    assert_same(load_quantized_transformer(source, copy=copy), plain)
    assert len(said(caplog)) == 1 and "made anew" in said(caplog)[0]
    load_quantized_transformer(source, copy=copy)
    assert len(said(caplog)) == 1


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(source, copy, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 12_345_678_9)
    )
    load_quantized_transformer(source, copy=copy)
    shutil.rmtree(copy.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 100_000))
    with pytest.raises(ConfigError, match=r"takes 0\.00 GB, and .* has 0\.00 GB free"):
        load_quantized_transformer(source, copy=copy)
    assert not list(copy.folder.parent.iterdir())


def test_a_failure_while_writing_leaves_nothing(source, copy, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        load_quantized_transformer(source, copy=copy)
    assert not list(copy.folder.parent.iterdir())


def test_it_lies_beside_the_model_only_if_asked_and_possible(tmp_path, caplog):
    model, cache = tmp_path / "FLUX.1-dev", tmp_path / "cache"
    model.mkdir()
    inside = QuantizedCopy.beside_or_in(model, cache, "s")
    assert inside.folder == cache / "FLUX.1-dev-transformer-fp8"
    assert (
        QuantizedCopy.beside_or_in(model, cache, "s", beside_model=True).folder == model / "transformer-fp8"
    )
    assert not said(caplog)
    missing = QuantizedCopy.beside_or_in(tmp_path / "FLUX.1-dev/none", cache, "s", beside_model=True)
    assert missing.folder == cache / "none-transformer-fp8"
    assert len(said(caplog)) == 1 and "cannot be written" in said(caplog)[0]
