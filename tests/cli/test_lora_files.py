"""convert, inspect and merge from the command line, with numbers from float64 numpy."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file

from ppcoat.cli import merge as merge_command
from ppcoat.cli.main import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
K = "transformer_blocks.1.attn.to_k"
OUT = "single_transformer_blocks.0.proj_out"
RANK, ALPHA = 4, 2.0


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def raw(folder):
    """name -> (dtype, float32 array) of a component folder, without Paddle."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, info in deserialize(file.read_bytes()):
            bits = np.frombuffer(info["data"], {"F32": "<f4", "BF16": "<u2"}[info["dtype"]])
            if info["dtype"] == "BF16":
                bits = (bits.astype(np.uint32) << 16).view(np.float32)
            found[name] = (info["dtype"], bits.reshape(info["shape"]))
    return found


def lora_of(rng, folder, size=0.5):
    """A LoRA in diffusers' keys with .alpha tensors -> tensors, and {path: delta-W [out, in]} in float64."""
    weights, tensors, deltas = raw(folder / "transformer"), {}, {}
    for path in (K, OUT):
        rows, columns = weights[f"{path}.weight"][1].shape
        a, b = (np.float32(size * rng.standard_normal(shape)) for shape in ([RANK, columns], [rows, RANK]))
        tensors |= {f"transformer.{path}.lora_A.weight": a, f"transformer.{path}.lora_B.weight": b}
        tensors[f"transformer.{path}.alpha"] = np.array(ALPHA, "float32")
        deltas[path] = ALPHA / RANK * np.float64(b) @ np.float64(a)
    return tensors, deltas


def header_of(file):
    with safe_open(file, framework="np") as content:
        return content.metadata()


def one_line(capsys):
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and shown.out == ""
    return shown.err


def test_convert_there_and_back_keeps_delta_and_the_story_of_the_training(rng, tmp_path, capsys):
    tensors, want = lora_of(rng, FIXTURES / "tiny_flux_fp32")
    story = {"trigger_word": "sks", "training_info": json.dumps({"step": 9}), "ss_output_name": "hat"}
    first, kohya, last = (tmp_path / f"{name}.safetensors" for name in ("first", "kohya", "last"))
    save_file(tensors, first, metadata={**story, "format": "pt", "sshs_model_hash": "0"})
    assert main(["convert", str(first), str(kohya), "--format", "kohya"]) == 0
    said = capsys.readouterr().out
    assert "(diffusers)" in said and "(kohya, float32)" in said and "2 modules, 0 of them zero" in said
    keys = set(load_file(kohya))
    assert keys == {
        f"lora_unet_{name}.{role}"
        for name in ("double_blocks_1_img_attn_qkv", "single_blocks_0_linear2")
        for role in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert main(["convert", str(kohya), str(last), "--format", "diffusers"]) == 0
    back = load_file(last)
    assert len(back) == 4
    for path, delta in want.items():
        a, b = (np.float64(back[f"transformer.{path}.lora_{role}.weight"]) for role in "AB")
        assert np.linalg.norm(b @ a - delta) < 1e-6 * np.linalg.norm(delta)
    header = header_of(last)
    assert {key: header[key] for key in story} == story
    assert header["original_alpha"] == "2" and header["alpha"] == header["rank"] == str(RANK)
    assert "sshs_model_hash" not in header and "ss_network_dim" not in header
    assert header_of(kohya)["ss_network_dim"] == str(RANK)


def test_convert_keeps_the_dtype_and_warns_where_it_cannot_hold_the_numbers(rng, tmp_path, capsys):
    tensors, _ = lora_of(rng, FIXTURES / "tiny_flux_fp32", size=2e-6)
    small = tmp_path / "small.safetensors"
    save_file({k: v if k.endswith("alpha") else v.astype("float16") for k, v in tensors.items()}, small)
    assert main(["convert", str(small), str(tmp_path / "out.safetensors"), "--format", "paddle"]) == 0
    shown = capsys.readouterr()
    assert "(paddle, float16)" in shown.out and "float16 keeps delta-W within" in shown.err
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {np.dtype("float16")}
    flags = ["--format", "paddle", "--dtype", "float32"]
    assert main(["convert", str(small), str(tmp_path / "exact.safetensors"), *flags]) == 0
    assert capsys.readouterr().err == ""


def test_unknown_keys_are_listed_in_one_line_and_can_be_left_out(rng, tmp_path, capsys):
    tensors, _ = lora_of(rng, FIXTURES / "tiny_flux_fp32")
    extra = {f"lora_te1_layers_{i}.alpha": np.ones([1], "float32") for i in range(12)} | {
        "evil\n\x1b[2J": np.ones([1], "float32")
    }
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors | extra, file)
    for command in (
        ["convert", str(file), str(out), "--format", "kohya"],
        ["merge", "--model", str(FIXTURES / "tiny_flux_fp32"), "--lora", str(file), "--output_dir", str(out)],
    ):
        assert main(command) == 2
        message = one_line(capsys)
        assert "13 keys" in message and "lora_te1_layers_1.alpha" in message and "8 more" in message
        assert "\x1b" not in message and not out.exists()
    assert main(["convert", str(file), str(out), "--format", "kohya", "--ignore_unknown"]) == 0
    assert len(load_file(out)) == 6


@pytest.mark.parametrize(
    ("given", "target", "said"),
    [
        ("none.safetensors", "out.safetensors", "no LoRA file"),
        ("lora.bin", "out.safetensors", "pickle"),
        ("lora.safetensors", "lora.safetensors", "exists"),
        ("lora.safetensors", "out.bin", "saved as .safetensors"),
        ("strange.safetensors", "out.safetensors", "fits no layer of the model: its keys are like x"),
    ],
)
def test_convert_answers_mistakes_in_one_line(rng, tmp_path, capsys, given, target, said):
    save_file(lora_of(rng, FIXTURES / "tiny_flux_fp32")[0], tmp_path / "lora.safetensors")
    save_file({"x": np.ones([1])}, tmp_path / "strange.safetensors")
    assert main(["convert", str(tmp_path / given), str(tmp_path / target), "--format", "kohya"]) == 2
    assert said in one_line(capsys)


def test_inspect_shows_what_a_file_holds(rng, tmp_path, capsys):
    tensors, deltas = lora_of(rng, FIXTURES / "tiny_flux_fp32")
    tensors["transformer.x_embedder.lora_A.weight"] = np.ones([2, 64], "float32")
    tensors["transformer.x_embedder.lora_B.weight"] = np.zeros([16, 2], "float32")
    tensors["strange"] = np.ones([1], "float32")
    story = {"trigger_word": "sks\x1b[2J", "long": "x" * 900, "format": "pt"}
    save_file(tensors, tmp_path / "lora.safetensors", metadata=story)
    assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
    shown = capsys.readouterr().out
    rows = {
        line.split("  ")[0]: line.split("  ")[-1].strip() for line in shown.splitlines() if line[0] != " "
    }
    assert rows["format"] == "diffusers" and rows["dtype"] == "float32" and rows["modules"] == "3"
    assert rows["rank"] == "4 (x 2), 2 (x 1)" and rows["scale"] == "0.5 (x 2), 1 (x 1)"
    assert rows["alpha"] == "2"
    norm = np.sqrt(sum(np.sum(delta**2) for delta in deltas.values()))
    assert rows["delta-W"].startswith(f"norm {norm:.6g}; largest ") and OUT in rows["delta-W"]
    assert rows["zero"] == "1 modules: x_embedder"
    assert rows["unknown"] == "1 keys: strange"
    assert "trigger_word" in shown and "sks" in shown and "\x1b" not in shown and "(900 characters)" in shown


def test_inspect_reads_a_lora_of_newbie_with_its_folder(capsys):
    newbie = FIXTURES / "tiny_newbie"
    assert main(["inspect", str(newbie / "lora")]) == 0
    shown = capsys.readouterr().out
    assert "LoRA of Z-Image, Lumina or NewBie" in shown and "--model, with NewBie's folder" in shown
    assert "and 30 more" in shown and "delta-W" not in shown
    assert main(["inspect", str(newbie / "lora"), "--model", str(newbie)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"modules +20\n", shown) and re.search(r"unknown +0 keys", shown)


def test_a_half_under_an_unknown_key_is_shown_by_inspect_and_named_where_it_stops(rng, tmp_path, capsys):
    tensors, _ = lora_of(rng, FIXTURES / "tiny_flux_fp32")
    lost = f"transformer.{K}.lora_A.weight"
    tensors[f"foo\x1b.{lost}"] = tensors.pop(lost)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in shown.splitlines()}
    assert (rows["modules"], rows["dtype"]) == ("1", "float32")
    assert rows["unknown"] == f"1 keys: foo\\u001b.{lost}"
    assert rows["incomplete"] == f"1 modules, wanted A and B: {K} has B, alpha"
    assert main(["convert", str(file), str(tmp_path / "out.safetensors"), "--format", "kohya"]) == 2
    message = one_line(capsys)
    assert f"LoRA of {K} is incomplete" in message and f"1 unknown keys: 'foo\\x1b.{lost}'" in message
    assert "\x1b" not in message


def test_inspect_names_kinds_parts_and_rules(capsys):
    adapters = FIXTURES / "adapters"
    assert main(["inspect", str(adapters / "dora.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "DoRA by the rule of PEFT on 4 layers" in shown and "note" in shown and "delta-W  " not in shown
    assert main(["inspect", str(adapters / "split_peft")]) == 0
    assert "0.5" in capsys.readouterr().out  # alpha 2 of rank 4, from adapter_config.json
    assert main(["inspect", str(adapters / "dense_kohya.safetensors")]) == 0
    assert "CLIP: LoRA on 18 layers, T5: LoRA on 21, LoRA on 20" in capsys.readouterr().out


def test_merge_adds_several_loras_and_parts_of_the_text_encoders(tmp_path, capsys):
    """Against W + 0.5 x one + 1 x the other, in float64; the other components are copied."""
    folder, out = FIXTURES / "tiny_flux_fp32", tmp_path / "out"
    files = [
        str(FIXTURES / "adapters" / f"{name}.safetensors")
        for name in ("dense_kohya", "clip_diffusers", "dora")
    ]
    flags = ["--lora", *files, "--scale", "0.5", "1", "1", "--output_dir", str(out)]
    assert main(["merge", "--model", str(folder), *flags]) == 0
    said = capsys.readouterr().out
    assert "T5: LoRA on 21, LoRA on 20 at scale 0.5\n" in said and "note: DoRA by the rule of PEFT" in said
    key = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    before, after = (raw(each / "text_encoder")[key][1].astype("float64") for each in (folder, out))
    with np.load(FIXTURES / "adapters" / "truth.npz") as truth:
        want = 1.5 * truth[f"dense/text_encoder.{key}"]  # both files hold it
        np.testing.assert_allclose((after - before)[::2], want, atol=1e-6)
        q = "transformer_blocks.0.attn.to_q.weight"
        before, after = (raw(each / "transformer")[q][1].astype("float64") for each in (folder, out))
        want = truth[f"dora/1.0/{q}"] + 0.5 * truth.get(f"dense/{q}", 0.0)
        np.testing.assert_allclose((after - before)[::2], want, atol=1e-6)
    names = ("text_encoder", "text_encoder_2", "transformer", "vae")
    changed = [raw(out / each).keys() == raw(folder / each).keys() for each in names]
    assert all(changed) and (out / "tokenizer" / "vocab.json").is_file()
    assert (
        main(["merge", "--model", str(folder), "--lora", *files, "--scale", "1", "2", "--output_dir", "x"])
        == 2
    )
    assert "came 2 strengths for 3 LoRAs, wanted one each" in one_line(capsys)


def test_inspect_answers_for_a_file_without_a_module(tmp_path, capsys):
    save_file({"x": np.ones([1])}, tmp_path / "lora.safetensors")
    assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
    assert "none that is known" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "dtype", "unit"), [("fp32", "F32", 2.0**-24), ("bf16_sharded", "BF16", 2.0**-8)]
)
@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_merge_adds_delta_and_keeps_everything_else(rng, tmp_path, base, dtype, unit, file_format):
    folder, lora = FIXTURES / f"tiny_flux_{base}", tmp_path / "lora.safetensors"
    tensors, deltas = lora_of(rng, folder)
    save_file(tensors, lora)
    if file_format == "kohya":
        lora = tmp_path / "kohya.safetensors"
        assert main(["convert", str(tmp_path / "lora.safetensors"), str(lora), "--format", "kohya"]) == 0
    out = tmp_path / "merged"
    flags = ["--model", str(folder), "--lora", str(lora), "--output_dir", str(out), "--scale", "0.7"]
    assert main(["merge", *flags]) == 0
    before, after = raw(folder / "transformer"), raw(out / "transformer")
    assert before.keys() == after.keys()
    for name, (kind, weight) in before.items():
        assert after[name][0] == kind == dtype
        delta = deltas.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if delta is None:
            np.testing.assert_array_equal(after[name][1], weight)
        else:
            want = np.float64(weight) + 0.7 * delta
            assert np.all(np.abs(after[name][1] - want) <= 1.01 * unit * np.abs(want) + 1e-6)
    assert (out / "transformer" / "config.json").read_text() == (
        folder / "transformer" / "config.json"
    ).read_text()
    for part in ("model_index.json", "tokenizer_2/spiece.model", "scheduler/scheduler_config.json"):
        assert (out / part).read_bytes() == (folder / part).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("output", ["model", "model/merged", "model/a/../b", "there"])
def test_merge_refuses_an_output_inside_the_model_or_that_is_there(rng, tmp_path, capsys, output):
    model = tmp_path / "model"
    shutil.copytree(FIXTURES / "tiny_flux_fp32", model)
    (tmp_path / "there").mkdir()
    save_file(lora_of(rng, model)[0], tmp_path / "lora.safetensors")
    before = sorted(tmp_path.rglob("*"))
    flags = ["--lora", str(tmp_path / "lora.safetensors"), "--output_dir", str(tmp_path / output)]
    assert main(["merge", "--model", str(model), *flags]) == 2
    said = "exists" if output == "there" else "inside the model"
    assert said in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_merge_refuses_what_the_model_lacks_before_it_is_loaded(rng, tmp_path, capsys, monkeypatch):
    folder = FIXTURES / "tiny_flux_fp32"
    monkeypatch.setattr(merge_command, "load_component", None)
    tensors, _ = lora_of(rng, folder)
    there = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in tensors.items()}
    narrow = {k: v[:, :-1].copy() if "lora_A" in k else v for k, v in tensors.items()}
    for tensors, said in (
        (there, "has LoRA on 1 layer, e.g. transformer_blocks.7.attn.to_k.weight"),
        (narrow, "[out, in]"),
    ):
        save_file(tensors, tmp_path / "lora.safetensors")
        flags = ["--lora", str(tmp_path / "lora.safetensors"), "--output_dir", str(tmp_path / "out")]
        assert main(["merge", "--model", str(folder), *flags]) == 2
        assert said in one_line(capsys)


def test_merge_says_what_it_left_out(rng, tmp_path, capsys):
    folder, lora = FIXTURES / "tiny_flux_fp32", tmp_path / "lora.safetensors"
    tensors, _ = lora_of(rng, folder)
    save_file(tensors | {"strange": np.ones(3), "idle": np.zeros(3)}, lora)
    flags = ["--lora", str(lora), "--output_dir", str(tmp_path / "out"), "--ignore_unknown"]
    assert main(["merge", "--model", str(folder), *flags]) == 0
    said = capsys.readouterr().out
    assert (
        ": LoRA on 2 layers at scale 1, 1 keys left out, e.g. strange\nnote: 1 tensors that name nothing"
        in said
    )


def test_merge_reads_back_what_it_wrote(rng, tmp_path, monkeypatch):
    """A saver that loses a little of one weight is caught, and nothing is left."""
    folder, real = FIXTURES / "tiny_flux_fp32", merge_command.save_component
    save_file(lora_of(rng, folder)[0], tmp_path / "lora.safetensors")

    def faulty(model, target):
        weight = dict(model.named_parameters())[f"{K}.weight"]
        weight.set_value(weight * (1 + 1e-4))
        real(model, target)

    monkeypatch.setattr(merge_command, "save_component", faulty)
    flags = ["--lora", str(tmp_path / "lora.safetensors"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(OSError, match="to_k"):
        main(["merge", "--model", str(folder), *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(("size", "warned"), [(0.5, False), (0.005, True)])
def test_merge_says_how_much_of_the_lora_the_folders_dtype_loses(rng, tmp_path, capsys, size, warned):
    """Weights near 0.25 in steps of 1/1024 do not hold a delta-W of a few 1e-5."""
    folder, lora, out = FIXTURES / "tiny_flux_bf16_sharded", tmp_path / "lora.safetensors", tmp_path / "out"
    tensors, deltas = lora_of(rng, folder, size)
    save_file(tensors, lora)
    assert main(["merge", "--model", str(folder), "--lora", str(lora), "--output_dir", str(out)]) == 0
    shown = capsys.readouterr()
    before, after = raw(folder / "transformer"), raw(out / "transformer")
    off = [
        after[f"{p}.weight"][1] - np.float64(before[f"{p}.weight"][1]) - delta for p, delta in deltas.items()
    ]
    lost = np.sqrt(sum(np.sum(o**2) for o in off) / sum(np.sum(delta**2) for delta in deltas.values()))
    said = re.search(r"2 modules; rounding to bfloat16 changed delta-W by ([\d.]+)% of its norm", shown.out)
    assert float(said[1]) == pytest.approx(100 * lost, rel=0.02, abs=0.006)
    assert (lost > 0.05) == warned == ("warning: bfloat16 does not hold all of this LoRA" in shown.err)
    assert not warned or "--path_to_lora" in shown.err
