"""A fingerprint finds every changed byte of a model, and nothing else changes it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat import reading
from ppcoat.models import fingerprint
from ppcoat.models.fingerprint import Fingerprints, folder_identity
from ppcoat.models.flux.files import FluxFiles
from ppcoat.models.tensor_files import map_tensor, tensor_infos

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, SINGLE = FIXTURES / "tiny_flux_fp32", FIXTURES / "single_file"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def of(component, file):
    return Fingerprints(file).of({"part": component})["part"]


@pytest.fixture
def known(tmp_path):
    """The file with what was found before: none."""
    return tmp_path / "run" / "weights.json"


@pytest.fixture
def model(tmp_path):
    """A transformer of one tensor of 4 MiB and a small one, whose files are not new."""
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    tensors = {"large": np.zeros([1024, 1024], np.float32), "small": np.ones([], np.float32)}
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"heads": 2, "_diffusers_version": "0.30"}))
    return folder


def test_one_byte_anywhere_is_found(model, known):
    first, pieces = of(model, known), folder_identity(model)
    file = model / WEIGHTS
    content = bytearray(file.read_bytes())
    for place in (len(content) - 1, len(content) - 2**22 + 5, len(content) // 3):
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        assert of(model, known) != first, place
    assert folder_identity(model) == pieces  # which reads three pieces
    assert folder_identity(model, times=True) != folder_identity(model)
    file.write_bytes(content)
    assert of(model, known) == first
    (model / "config.json").write_text(json.dumps({"heads": 4}))
    assert of(model, known) != first


def test_names_places_shards_and_the_writers_version_do_not_count(model, known, tmp_path):
    first, moved = of(model, known), tmp_path / "renamed"
    shutil.copytree(model, moved)
    tensors = load_file(moved / WEIGHTS)
    (moved / WEIGHTS).unlink()
    shards = {name: f"model-{name}.safetensors" for name in tensors}
    for name, shard in shards.items():
        save_file({name: tensors[name]}, moved / shard, {"format": "pt", "by": "another"})
    (moved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (moved / "config.json").write_text(
        json.dumps({"_class_name": "X", "torch_dtype": "bfloat16", "heads": 2})
    )
    (moved / "README.md").write_text("a model")
    assert of(moved, known) == first


def test_a_file_has_the_fingerprint_of_a_folder_with_its_weights(known, tmp_path):
    """Fused modules are several tensors there, and the halves of the last one the other way round."""
    part = FluxFiles.found(SINGLE / "flux_bfl_bf16.safetensors")["transformer"]
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(part.config))
    raw = {name: map_tensor(info) for name, info in tensor_infos(part).items()}
    header, data = {}, b""
    for name, values in raw.items():  # NumPy has no bfloat16
        end = len(data) + values.nbytes
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert of(part, known) == of(folder, known)
    others = [SINGLE / name for name in ("flux_bfl_fp8_e4m3.safetensors", "flux_Q8_0.gguf", "flux_Q4_0.gguf")]
    each = {of(FluxFiles.found(file)["transformer"], known) for file in others}
    assert len(each | {of(part, known)}) == 4


def test_progress_is_that_of_what_was_read(model, known, monkeypatch):
    shown, digest = [], fingerprint._digest

    def with_progress(infos, _):
        for name in sorted(infos):
            shown.append(name)
            yield name, infos[name]

    def watched(info):
        assert info.shape == [] or shown in ([], ["large"])  # none beyond it
        return digest(info)

    monkeypatch.setattr(fingerprint, "in_file_order", lambda infos: sorted(infos.items()))
    monkeypatch.setattr(fingerprint, "with_progress", with_progress)
    monkeypatch.setattr(fingerprint, "_digest", watched)
    of(model, known)
    assert shown == ["large", "small"]


def test_a_tokenizers_files_count(known, tmp_path):
    shutil.copytree(FOLDER / "tokenizer", tmp_path / "tokenizer")
    first = of(tmp_path / "tokenizer", known)
    assert first == of(FOLDER / "tokenizer", known)
    merges = tmp_path / "tokenizer" / "merges.txt"
    merges.write_text(merges.read_text() + "a b\n")
    assert of(tmp_path / "tokenizer", known) != first


def test_what_did_not_change_is_not_read_again(model, known, monkeypatch, caplog):
    for file in model.iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr(reading, "_YOUNG", 0)
    first = of(model, known)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_fingerprint", None)  # a call would be an error
        assert of(model, known) == first
        model.parent.rename(model.parent.with_name("renamed"))
        moved = model.parent.with_name("renamed") / "transformer"
        assert of(moved, known) == first
    for damage in ("", "[]", '{"part": 3}', known.read_text().replace("sha256", "sha")):
        known.write_text(damage)
        assert of(moved, known) == first
    content = bytearray((moved / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (moved / WEIGHTS).write_bytes(content)
    os.utime(moved / WEIGHTS, (1, 1))  # the same size and time: the system's own time is another
    assert of(moved, known) != first


def test_a_file_that_was_written_just_now_is_read_each_time(model, known):
    """It may change again without a change of its times."""
    of(model, known)
    assert not known.exists()


def test_where_nothing_can_be_kept_a_warning_says_so(model, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reading, "_YOUNG", 0)
    (tmp_path / "run").write_text("a file in the place of the folder")
    assert len(of(model, tmp_path / "run" / "weights.json")) == 64
    assert "the model is read again next time" in caplog.text


def test_the_identity_of_a_folder_is_its_content(tmp_path):
    def folder(name, content=b"weights", file="model.safetensors"):
        path = tmp_path / name / "vae"
        path.mkdir(parents=True)
        (path / file).write_bytes(content)
        return path

    first = folder_identity(folder("a"))
    assert first == folder_identity(folder("elsewhere"))
    large = bytes(3 * 2**20)
    changed = large[:-1] + b"x"
    others = [
        folder("b", b"weightz"),
        folder("c", b"weights", "other"),
        folder("d", large),
        folder("e", changed),
    ]
    assert len({first, *map(folder_identity, others)}) == 5
