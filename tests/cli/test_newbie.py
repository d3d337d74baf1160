"""merge_lora.py and convert_newbie_to_diffusers.py: numbers of the original tools, and refusals."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.paddle import load_file as load_paddle
from safetensors.paddle import save_file as save_paddle

import ppcoat.cli.newbie as newbie_commands
import ppcoat.models.newbie.convert as newbie_convert
from ppcoat.cli.main import run
from ppcoat.models.newbie.files import check_newbie_folder, load_nextdit

FOLDER = Path(__file__).parent.parent / "fixtures" / "tiny_newbie"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PARTS = ("transformer", "text_encoder", "clip_model", "vae")


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr(newbie_commands, "tune_host", lambda: None)


@pytest.fixture(scope="module")
def refs():
    with np.load(FOLDER / "refs.npz") as refs, np.load(FOLDER / "adapter_refs.npz") as adapters:
        return dict(refs) | dict(adapters)


def merge(base, lora, output, *flags):
    paths = ["--base_model_path", base, "--lora_path", lora, "--output_path", output]
    return run("merge-newbie", [*map(str, paths), *flags])


def convert(output, *flags, checkpoint=FOLDER / "raw/consolidated.00-of-01.pth", vae=FOLDER):
    config = FOLDER / "transformer/config.json"
    parts = ["--checkpoint", checkpoint, "--gemma3", FOLDER / "text_encoder", "--jina", FOLDER / "clip_model",
             "--vae", vae, "--output", output, "--transformer_config", config]  # fmt: skip
    return run("convert-newbie", [*map(str, parts), *flags])


def outputs(folder, refs):
    names = ("dit_x", "dit_t", "gemma_hidden", "gemma_mask", "jina_pooled")
    model = load_nextdit(folder / "transformer", "float32")
    with paddle.no_grad():
        return model(*[paddle.to_tensor(refs[name][:2]) for name in names]).numpy()


def test_merged_weights_are_those_of_the_original_tool(refs, tmp_path, capsys):
    assert merge(FOLDER, FOLDER / "lora", tmp_path / "merged") == 0
    assert "20 modules, float32" in capsys.readouterr().out
    merged = load_file(tmp_path / "merged" / WEIGHTS)
    assert sorted(merged) == sorted(refs["merged_names"])
    for name in (
        "layers.0.attention.qkv.weight",
        "layers.1.attention.out.weight",
        "time_text_embed.1.weight",
    ):
        np.testing.assert_allclose(merged[name], refs[f"merged/{name}"], rtol=0, atol=1e-6)
    for name, total, size in zip(
        refs["merged_names"], refs["merged_sum"], refs["merged_abs_sum"], strict=True
    ):
        tensor = merged[name].astype(np.float64)
        assert tensor.sum() == pytest.approx(total, abs=1e-6 * size)
        assert np.abs(tensor).sum() == pytest.approx(size, rel=1e-6)
    for part in (
        "text_encoder/config.json",
        "clip_model/tokenizer.json",
        "model_index.json",
        "transformer/config.json",
    ):
        assert json.loads((tmp_path / "merged" / part).read_text()) == json.loads((FOLDER / part).read_text())


@pytest.mark.parametrize("kind", ["lora", "lokr_full", "lokr_lowrank"])
def test_a_merged_model_draws_as_the_adapter_does(refs, tmp_path, kind):
    assert merge(FOLDER, FOLDER / kind, tmp_path / "merged") == 0
    np.testing.assert_allclose(outputs(tmp_path / "merged", refs), refs[f"{kind}_b2_out"], rtol=0, atol=2e-5)


def test_merging_says_what_it_left_out(tmp_path, capsys):
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    more = {"strange": paddle.ones([3]), "idle": paddle.zeros([3])}
    save_paddle(load_paddle(str(file)) | more, str(file))
    assert merge(FOLDER, folder, tmp_path / "out", "--ignore_unknown") == 0
    said = capsys.readouterr().out
    assert (
        ": LoRA on 20 layers at scale 1, 1 keys left out, e.g. strange\nnote: 1 tensors that name nothing"
        in said
    )


def test_merging_keeps_the_dtype_of_the_base(tmp_path):
    base = shutil.copytree(FOLDER, tmp_path / "base")
    tensors = {name: value.astype("bfloat16") for name, value in load_paddle(base / WEIGHTS).items()}
    save_paddle(tensors, str(base / WEIGHTS), metadata={"format": "pt"})
    assert merge(base, FOLDER / "lora", tmp_path / "merged") == 0
    with safe_open(str(tmp_path / "merged" / WEIGHTS), framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    exact, rounded = load_paddle(base / WEIGHTS), load_paddle(tmp_path / "merged" / WEIGHTS)
    name = "layers.0.attention.qkv.weight"
    lora = load_file(FOLDER / "lora/adapter_model.safetensors")
    a, b = (lora[f"base_model.model.layers.0.attention.qkv.lora_{side}.weight"] for side in "AB")
    want = exact[name].astype("float32").numpy() + 2 * b @ a
    np.testing.assert_allclose(rounded[name].astype("float32").numpy(), want, rtol=2**-8, atol=1e-6)


def test_a_converted_pth_is_the_folder_of_the_original_converter(tmp_path):
    output = tmp_path / "out"
    assert convert(output, "--dtype", "fp32") == 0
    check_newbie_folder(output)
    for name in ("model_index.json", *(f"{part}/config.json" for part in PARTS)):
        assert json.loads((output / name).read_text()) == json.loads((FOLDER / name).read_text()), name
    for part in PARTS:
        (ours,), (theirs,) = ((folder / part).glob("*.safetensors") for folder in (output, FOLDER))
        assert ours.name == theirs.name
        first, second = load_file(ours), load_file(theirs)
        assert first.keys() == second.keys()
        assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def test_converting_to_bf16_rounds_all_floats_and_nothing_else(tmp_path):
    """From .safetensors, too."""
    assert convert(tmp_path / "out", checkpoint=FOLDER / WEIGHTS) == 0
    for part in PARTS:
        (ours,), (theirs,) = ((folder / part).glob("*.safetensors") for folder in (tmp_path / "out", FOLDER))
        first, second = load_paddle(ours), load_paddle(theirs)
        assert {str(tensor.dtype) for tensor in first.values()} <= {"paddle.bfloat16", "paddle.int64"}
        for name, tensor in first.items():
            want = second[name].astype(tensor.dtype)
            assert (tensor.astype("float32") == want.astype("float32")).all()
    check_newbie_folder(tmp_path / "out")


def test_converting_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """In NumPy, and in Paddle (which rounds) by its own account of allocated bytes."""
    made, core, values = [], paddle.base.core, newbie_convert._values

    def watched(infos, dtype):
        stream = values(infos, dtype)
        while (item := next(stream, None)) is not None:
            assert all(earlier() is None for earlier in made)
            made.append(weakref.ref(item[1]))
            yield item
            del item

    monkeypatch.setattr(newbie_convert, "_values", watched)
    gc.collect()  # what earlier tests left must not go meanwhile
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    assert convert(tmp_path / "out") == 0
    assert len(made) == sum(len(load_file(next((FOLDER / part).glob("*.safetensors")))) for part in PARTS)
    largest = 145_920  # Gemma3's embeddings, float32; rounded, they take half of it
    assert core.host_memory_stat_peak_value("Allocated", 0) - before <= 1.5 * largest + 4096


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    written = sum(file.stat().st_size for part in PARTS for file in (FOLDER / part).glob("*.safetensors"))
    for free, result in ((written // 2 - 200_000, 2), (written // 2, 0)):  # bf16 takes half
        usage = shutil._ntuple_diskusage(10**12, 10**12, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
        assert convert(tmp_path / "out") == result
        assert result == 0 or not list(tmp_path.iterdir())
    assert "out takes 0.00 GB, and" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["exists", "hub", "checkpoint", "vae", "config"])
def test_wrong_inputs_of_the_converter_are_named_and_leave_nothing(tmp_path, capsys, given):
    output = tmp_path / "out"
    if given == "exists":
        output.mkdir()
        assert convert(output) == 2
        assert "exists: remove it" in capsys.readouterr().err
        return
    if given == "hub":
        flags = ["--gemma3", "google/gemma-3-4b-it"]
        assert convert(output, *flags) == 2
        assert "download the model first" in capsys.readouterr().err
    if given == "checkpoint":
        assert convert(output, checkpoint=tmp_path / "x.ckpt") == 2
        assert "no checkpoint at" in capsys.readouterr().err
    if given == "vae":
        vae = Path(shutil.copytree(FOLDER / "vae", tmp_path / "vae"))
        config = json.loads((vae / "config.json").read_text())
        (vae / "config.json").write_text(json.dumps(config | {"latent_channels": 4}))
        assert convert(output, vae=vae) == 2
        assert "has 4 latent channels, wanted 16" in capsys.readouterr().err
    if given == "config":  # the 3B sizes
        parts = ["--checkpoint", FOLDER / WEIGHTS, "--gemma3", FOLDER / "text_encoder", "--jina",
                 FOLDER / "clip_model", "--vae", FOLDER / "vae", "--output", output]  # fmt: skip
        assert run("convert-newbie", [str(part) for part in parts]) == 2
        config = output / "transformer" / "config.json"
        assert f"error: {config}: n_layers wants 36 layers" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] in ([], ["vae"])


def test_wrong_inputs_of_the_merge_are_named_and_leave_nothing(tmp_path, capsys):
    assert merge(FOLDER, FOLDER / "nothing", tmp_path / "out") == 2
    assert "no LoRA file at" in capsys.readouterr().err
    assert merge(tmp_path, FOLDER / "lora", tmp_path.parent / "out") == 2
    assert "model_index.json is missing" in capsys.readouterr().err
    base = shutil.copytree(FOLDER, tmp_path / "base")
    assert merge(base, FOLDER / "lora", base / "out") == 2
    assert "inside the model" in capsys.readouterr().err
    assert merge(base, FOLDER / "lora", base.parent / "base") == 2
    assert "--output_path" in capsys.readouterr().err
    assert merge(base, FOLDER / "lora", tmp_path / "out", "--scale", "nan") == 2
    assert "--scale must be a finite number, got nan" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
