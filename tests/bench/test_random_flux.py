"""A folder of random weights: the layout of the model, written once, known again, made anew if not whole."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from ppcoat.bench.full_size import CHUNK, _layout_of, _values, ensure_random_transformer
from ppcoat.errors import ConfigError
from ppcoat.lora.layer import linear_paths
from ppcoat.models import writing
from ppcoat.models.loading import load_transformer
from ppcoat.models.tensor_files import tensor_infos
from ppcoat.models.writing import layout_bytes

SETTINGS = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 40,
    "axes_dims_rope": [16, 24, 24],
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "made" / "transformer"


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("ppcoat")]


def test_flux_dev_is_23_8_gb_in_three_shards():
    config, linears, layout = _layout_of({"guidance_embeds": True})
    assert len(layout) == 1160 and len(linears) == 504
    assert layout_bytes(layout) == 2 * 11_901_408_320
    shards = writing.cut_into_shards({n: 2 * int(np.prod(s)) for n, (_, s) in layout.items()})
    assert len(shards) == 3
    assert layout["single_transformer_blocks.0.proj_out.weight"] == ("BF16", [3072, 15360])  # [out, in]
    wanted = {"num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096, "in_channels": 64}
    assert config["_class_name"] == "FluxTransformer2DModel" and wanted.items() <= config.items()


def test_it_is_loaded_as_any_other_and_values_have_the_right_size(folder, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 400_000)
    assert ensure_random_transformer(folder, SETTINGS)
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = load_transformer(folder)
    parameters = dict(model.named_parameters())
    for path in linear_paths(model):
        weight = parameters[f"{path}.weight"].numpy()
        assert weight.std() == pytest.approx(weight.shape[0] ** -0.5, rel=0.05), path
        assert abs(weight.mean()) < 0.02 and np.abs(weight).max() < 4.4 * weight.shape[0] ** -0.5
        assert not parameters[f"{path}.bias"].numpy().any()
    assert (parameters["transformer_blocks.0.attn.norm_q.weight"].numpy() == 1).all()


def test_values_are_bfloat16_of_the_normal_distribution_and_differ_by_name_and_seed():
    a, b, c = (_values(name, [256, 1024], True, seed) for name, seed in (("a", 0), ("b", 0), ("a", 1)))
    assert a.dtype == np.uint16 and (a == _values("a", [256, 1024], True, 0)).all()
    numbers = [(x.astype("uint32") << 16).view("float32") * 32 for x in (a, b, c)]
    for x in numbers:
        np.testing.assert_allclose(np.quantile(x, [0.0228, 0.5, 0.8413]), [-2, 0, 1], atol=0.03)
    assert abs(np.corrcoef([x.ravel() for x in numbers]) - np.eye(3)).max() < 0.01
    assert a.size < CHUNK


def test_the_second_call_writes_nothing_and_other_settings_do(folder, caplog):
    assert ensure_random_transformer(folder, SETTINGS)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert not ensure_random_transformer(folder, SETTINGS)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before and not said(caplog)
    assert ensure_random_transformer(folder, SETTINGS | {"num_single_layers": 1})
    assert ensure_random_transformer(folder, SETTINGS | {"num_single_layers": 1}, seed=1)
    assert len(said(caplog)) == 2 and all("another model or seed" in each for each in said(caplog))
    assert json.loads((folder / "config.json").read_text())["num_single_layers"] == 1


def cut(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])


def without_config(folder):
    (folder / "config.json").unlink()


def without_index(folder):
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()


@pytest.mark.parametrize("damage", [cut, without_config, without_index])
def test_a_folder_that_is_not_whole_is_made_anew(folder, caplog, damage):
    ensure_random_transformer(folder, SETTINGS)
    damage(folder)
    assert ensure_random_transformer(folder, SETTINGS)
    assert len(said(caplog)) == 1 and "made anew" in said(caplog)[0]
    assert not ensure_random_transformer(folder, SETTINGS)


def test_what_a_killed_process_left_is_removed(folder, caplog):
    draft = folder.with_name("transformer.tmp-4194305")  # beyond the largest process number
    draft.mkdir(parents=True)
    (draft / "half").write_bytes(b"x" * 100)
    ensure_random_transformer(folder, SETTINGS)
    assert [path.name for path in folder.parent.iterdir()] == ["transformer"]
    assert len(said(caplog)) == 1 and "left unfinished" in said(caplog)[0]


@pytest.mark.parametrize("damage", [None, cut, without_config, without_index])
def test_nobodys_model_is_overwritten_not_even_a_broken_one(folder, bf16_folder, damage):
    shutil.copytree(bf16_folder / "transformer", folder)
    if damage:
        damage(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ConfigError, match="not of random weights: name another folder"):
        ensure_random_transformer(folder, SETTINGS)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "weights.safetensors"])
def test_a_foreign_file_is_refused(folder, name):
    ensure_random_transformer(folder, SETTINGS)
    (folder / name).write_bytes(b"{" * 20)
    with pytest.raises(ConfigError, match="not of random weights: name another folder"):
        ensure_random_transformer(folder, SETTINGS)


def test_a_disk_without_room_is_told_with_both_numbers(folder, monkeypatch):
    free = shutil._ntuple_diskusage(10**12, 10**12, 30_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    with pytest.raises(ConfigError, match=r"take 35\.71 GB, and .* has 30\.00 GB free: make room there"):
        ensure_random_transformer(folder, {"guidance_embeds": True}, beside=11_910_000_000)
    assert not folder.exists() and not any(folder.parent.iterdir())


def test_shards_say_what_they_are(folder):
    ensure_random_transformer(folder, SETTINGS, seed=3)
    for file in {info.file for info in tensor_infos(folder).values()}:
        with safe_open(str(file), framework="np") as opened:
            assert opened.metadata()["source"].startswith("random weights, seed 3, ")
