"""lora resize, combine and extract from the command line: against the truths of other programs' files, and
numpy's SVD in float64."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ppcoat.cli.main import COMMANDS, main
from ppcoat.lora import LoRAModule, read_lora_file
from ppcoat.models.tensor_files import read_header

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS, FLUX, NEWBIE = FIXTURES / "adapters", FIXTURES / "tiny_flux_fp32", FIXTURES / "tiny_newbie"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def deltas(path, paths=None):
    """{weight, as truth.npz calls it: delta-W [out, in]} of a file of LoRAs, in float64."""
    found = {}
    for change in read_lora_file(path, paths).changes:
        prefix = "" if change.part == "transformer" else f"{change.part}."
        kind = change.kind
        found[f"{prefix}{change.paths[0]}.weight"] = kind.scale * kind.b.astype("float64") @ kind.a
    return found


def truth(group):
    """{weight: every second row of its delta-W}."""
    with np.load(ADAPTERS / "truth.npz") as arrays:
        return {key.removeprefix(f"{group}/"): arrays[key] for key in arrays if key.startswith(f"{group}/")}


def error_told(text):
    return float(re.search(r"relative delta-W error (\S+) overall", text)[1])


def header_of(file):
    with safe_open(file, framework="np") as content:
        return content.metadata()


def one_line(capsys):
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "paddle"])
def test_combine_is_the_weighted_sum_of_other_programs_files(out, capsys, file_format):
    """kohya's and PEFT's spelling, the text encoders' parts of the first, and strengths of both signs."""
    files = [str(ADAPTERS / "dense_kohya.safetensors"), str(ADAPTERS / "split_peft")]
    flags = ["--scale", "0.5", "-2", "--format", file_format]
    assert main(["lora", "combine", *files, *flags, str(out)]) == 0
    assert error_told(capsys.readouterr().out) < 1e-7
    first, second, found = truth("dense"), truth("split"), deltas(out)
    assert found.keys() == first.keys() | second.keys()
    assert any(name.startswith("text_encoder_2.") for name in found)
    for name, delta in found.items():
        want = 0.5 * first.get(name, 0.0) - 2 * second.get(name, 0.0)
        np.testing.assert_allclose(delta[::2], want, atol=1e-6, err_msg=name)
    said = json.loads(header_of(out)["combined_from"])
    assert said == [{"file": "dense_kohya.safetensors", "scale": 0.5}, {"file": "split_peft", "scale": -2.0}]


def test_combine_cuts_the_sum_as_well_as_can_be(out, capsys):
    files = [str(ADAPTERS / f"{name}.safetensors") for name in ("dense_kohya", "split_kohya")]
    assert main(["lora", "combine", *files, "--rank", "3", "--format", "diffusers", str(out)]) == 0
    told = error_told(capsys.readouterr().out)
    first, second = map(deltas, files)
    missed = total = 0.0
    for name, delta in deltas(out).items():
        u, s, v = np.linalg.svd(first.get(name, 0.0) + second.get(name, 0.0), full_matrices=False)
        np.testing.assert_allclose(delta, (u[:, :3] * s[:3]) @ v[:3], atol=2e-5 * s[0], err_msg=name)
        missed, total = missed + np.sum(s[3:] ** 2), total + np.sum(s**2)
    assert told == pytest.approx(np.sqrt(missed / total), rel=0.05) and told > 0.1


def test_kohyas_fused_modules_are_cut_as_one(out, tmp_path, capsys):
    """q, k and v share one LoRA of the rank that was asked for; cut alone they would need three times."""
    source = ADAPTERS / "dense_kohya.safetensors"
    assert main(["lora", "resize", str(source), str(out), "--rank", "1"]) == 0
    told = error_told(capsys.readouterr().out)
    before, after = load_file(source), load_file(out)
    assert before.keys() == after.keys()
    assert {len(value) for key, value in after.items() if "lora_down" in key} == {1}
    missed = total = 0.0
    for stem in {key.partition(".")[0] for key in before}:
        whole, got = (
            np.float64(each[f"{stem}.alpha"]) / len(each[f"{stem}.lora_down.weight"])
            * np.float64(each[f"{stem}.lora_up.weight"]) @ each[f"{stem}.lora_down.weight"]
            for each in (before, after)
        )  # fmt: skip
        s = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.norm(whole - got) == pytest.approx(np.linalg.norm(s[1:]), rel=1e-4)
        missed, total = missed + np.sum(s[1:] ** 2), total + np.sum(s**2)
    assert told == pytest.approx(np.sqrt(missed / total), rel=0.05)
    exact = tmp_path / "exact.safetensors"
    assert main(["lora", "resize", str(source), str(exact), "--rank", "2"]) == 0
    assert error_told(capsys.readouterr().out) < 1e-6
    for key, value in load_file(exact).items():
        if "lora_down" in key:
            np.testing.assert_array_equal(value, before[key])  # nothing was to be cut


@pytest.mark.parametrize("name", ["loha", "lokr_unbalanced", "lokr_w2_factored", "lokr_full"])
def test_resize_makes_loras_of_kinds_that_allow_it(out, capsys, name):
    want = truth(f"{name}/1.0")
    flags = ["--energy", "1", "--format", "diffusers"]
    assert main(["lora", "resize", str(ADAPTERS / f"{name}.safetensors"), str(out), *flags]) == 0
    shown = capsys.readouterr().out
    assert "become LoRAs" in shown and error_told(shown) < 1e-6
    found = deltas(out)
    assert found.keys() == want.keys()
    for path, delta in found.items():
        np.testing.assert_allclose(delta[::2], want[path], atol=1e-5, err_msg=path)


def test_energy_chooses_a_rank_for_each_layer(out, capsys):
    source = ADAPTERS / "dense_comfy_down_up.safetensors"
    assert main(["lora", "resize", str(source), str(out), "--energy", "0.9", "--rank", "2"]) == 0
    told = error_told(capsys.readouterr().out)
    whole, found = deltas(source), read_lora_file(out).modules
    for path, module in found.items():
        s = np.linalg.svd(whole[f"{path}.weight"], compute_uv=False) ** 2
        assert module.rank == (1 if s[0] >= 0.9 * s.sum() else 2)
    assert 0 < told <= np.sqrt(0.1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["resize", "dora.safetensors", "--rank", "4"], "has DoRA by the rule of PEFT on 4 layers"),
        (["resize", "oft.safetensors", "--rank", "4"], "has OFT on"),
        (["resize", "glora.safetensors", "--rank", "4"], "has GLoRA on"),
        (["resize", "ia3.safetensors", "--rank", "4"], "has IA3 on"),
        (["combine", "control_bfl.safetensors", "split_peft"], "whole biases and norms cannot be added up"),
        (["resize", "split_peft"], "give --rank, --energy, or both"),
        (["resize", "split_peft", "--rank", "0"], "--rank: came 0, wanted at least 1"),
        (["resize", "split_peft", "--energy", "95"], "--energy: came 95, wanted a share above 0 and up to 1"),
        (["resize", "none.safetensors", "--rank", "4"], "no LoRA file at"),
        (["combine", "split_peft", "loha.safetensors"], "LoHa on 4 layers: only LoRAs are added up"),
        (["combine", "split_peft", "--scale", "1", "2"], "came 2 strengths for 1 LoRAs, wanted one each"),
        (["combine", "split_peft", "--scale", "nan"], "must be a finite number"),
        (["combine", "bias_lora_only.safetensors", "split_peft"], "whole biases and norms cannot be added"),
        (["extract", "tiny", "tiny", "--rank", "4"], "model_index.json is missing: wanted the folder"),
    ],
)  # fmt: skip
def test_mistakes_and_what_has_no_factors_are_named_in_one_line(out, capsys, argv, said):
    command, *rest = argv
    rest = [
        str(ADAPTERS / each) if "safetensors" in each or each in ("split_peft", "tiny") else each
        for each in rest
    ]
    names = [each for each in rest if each.startswith("/")]
    assert main(["lora", command, *names, str(out), *(each for each in rest if each not in names)]) == 2
    message = one_line(capsys)
    assert said in message and not out.exists()
    out.touch()
    assert main(["lora", "resize", str(ADAPTERS / "split_peft"), str(out), "--rank", "4"]) == 2
    assert "exists: remove it" in one_line(capsys)


def test_a_bias_is_carried_and_added_up(out, tmp_path, capsys):
    source, twice = str(ADAPTERS / "lora_bias.safetensors"), tmp_path / "twice.safetensors"
    assert main(["lora", "resize", source, str(out), "--rank", "2"]) == 0
    assert main(["lora", "combine", source, source, "--scale", "1", "0.5", str(twice)]) == 0
    before, once, both = load_file(source), load_file(out), load_file(twice)
    biases = [key for key in once if key.endswith("lora_B.bias") and once[key].any()]
    scale = read_lora_file(source).changes[0].kind.scale
    assert biases
    for key in biases:
        source_key = next(name for name in before if name.endswith(key))
        np.testing.assert_allclose(once[key], scale * before[source_key], rtol=1e-6)
        np.testing.assert_allclose(both[key], 1.5 * scale * before[source_key], rtol=1e-6)


@pytest.mark.parametrize("name", ["control_bfl", "control_diffusers"])
def test_a_control_lora_is_resized_and_keeps_its_norms_and_biases(out, capsys, name):
    source = ADAPTERS / f"{name}.safetensors"
    assert main(["lora", "resize", str(source), str(out), "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "and as they were" in shown and "norm on" in shown and "bias on" in shown
    before, after = (read_lora_file(file).changes for file in (source, out))
    after = {(each.paths, each.parameter): each.kind for each in after}
    for change in (each for each in before if not isinstance(each.kind, LoRAModule)):
        got = np.concatenate([after[(path,), change.parameter].values for path in change.paths])
        want = np.concatenate(np.split(change.kind.values, 2)[::-1]) if change.swapped else change.kind.values
        np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=str(change.paths))
    embedder = after[("x_embedder",), "weight"]
    assert embedder.rank == 1 and embedder.shape == (64, 128)
    assert 0 < error_told(shown) < 1


def tuned(folder, base, part, change):
    """A copy of a model's folder in which change(name, array) stands for each tensor of a part."""
    shutil.copytree(base, folder)
    for file in (folder / part).glob("*.safetensors"):
        save_file(
            {name: change(name, values) for name, values in load_file(file).items()}, file, {"format": "pt"}
        )
    return folder


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_extract_finds_what_was_trained(tmp_path, out, capsys, file_format):
    """Two Linears of q, k and v, which kohya's format holds in one, changed by rank 3; and one norm."""
    rng = np.random.default_rng(1)
    changed = {f"transformer_blocks.0.attn.to_{name}.weight": 0.01 * rng.standard_normal([64, 3])
               @ rng.standard_normal([3, 64]) for name in "qv"}  # fmt: skip
    norm = "transformer_blocks.0.attn.norm_q.weight"
    one = {norm: np.full(32, 0.5)}
    folder = tuned(tmp_path / "tuned", FLUX, "transformer",
                   lambda name, values: np.float32(values + (changed | one).get(name, 0)))  # fmt: skip
    rank = "6" if file_format == "kohya" else "3"
    command = ["lora", "extract", str(FLUX), str(folder), str(out), "--format", file_format]
    assert main([*command, "--rank", rank]) == 0
    shown = capsys.readouterr().out
    assert error_told(shown) < 1e-6 and f"1 biases, norms and tables differ too, e.g. {norm}" in shown
    found = deltas(out)
    for name, want in changed.items():
        np.testing.assert_allclose(found[name], want, atol=1e-6)
    assert all(np.linalg.norm(found[name]) < 1e-6 for name in found.keys() - changed.keys())
    assert len(found) <= 3 and header_of(out)["extracted_from"] == "tuned"
    out.unlink()
    assert main([*command, "--rank", "2"]) == 0
    told, found = error_told(capsys.readouterr().out), deltas(out)
    groups = [list(changed)] if file_format == "kohya" else [[name] for name in changed]
    best = [
        np.linalg.svd(np.concatenate([changed[name] for name in group]), compute_uv=False) for group in groups
    ]
    missed = np.sqrt(sum(np.sum(s[2:] ** 2) for s in best) / sum(np.sum(s**2) for s in best))
    assert told == pytest.approx(missed, rel=0.05) and told > 0.1
    off = [np.linalg.norm(found[name] - want) for name, want in changed.items()]
    whole = np.linalg.norm([np.linalg.norm(want) for want in changed.values()])
    assert np.linalg.norm(off) / whole == pytest.approx(missed, rel=1e-3)


def test_extract_reads_text_encoders_where_asked(tmp_path, out, capsys):
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    rows, columns = read_header(FLUX / "text_encoder_2" / "model.safetensors")[name].shape
    delta = 0.1 * np.outer(np.arange(rows) % 3, np.ones(columns))

    def change(key, values):
        return np.float32(values + {name: delta, "shared.weight": 1}.get(key, 0))

    folder = tuned(tmp_path / "tuned", FLUX, "text_encoder_2", change)
    command = ["lora", "extract", str(FLUX), str(folder), str(out), "--rank", "1"]
    assert main(command) == 2
    assert "are equal: give two that differ" in one_line(capsys)
    assert main([*command, "--text_encoders"]) == 0
    assert "tables differ too, e.g. shared.weight" in capsys.readouterr().out
    found = deltas(out)
    assert found.keys() == {f"text_encoder_2.{name}"}
    np.testing.assert_allclose(found[f"text_encoder_2.{name}"], delta, atol=1e-6)


def test_extract_takes_folders_of_transformers_and_names_numbers_that_are_none(tmp_path, out, capsys):
    broken = "transformer_blocks.0.attn.to_k.weight"
    folder = tuned(tmp_path / "tuned", FLUX, "transformer",
                   lambda name, values: values * (np.nan if name == broken else 1))  # fmt: skip
    for base, other in ((FLUX, folder), (FLUX / "transformer", folder / "transformer")):
        assert main(["lora", "extract", str(base), str(other), str(out), "--rank", "1"]) == 2
        assert f"{broken} holds NaN or infinity in" in one_line(capsys)
    first, other = str(FLUX / "transformer"), str(FLUX)
    assert main(["lora", "extract", first, other, str(out), "--rank", "1", "--text_encoders"]) == 2
    assert "has no text_encoder: give models with FLUX's CLIP and T5, or leave --text" in one_line(capsys)
    assert main(["lora", "extract", str(FLUX / "vae"), str(FLUX), str(out), "--rank", "1"]) == 2
    assert "vae is of a AutoencoderKL: wanted the folder of a FLUX or NewBie pipeline" in one_line(capsys)


def test_extract_takes_files_of_models_too(tmp_path, out, capsys):
    """The middle third of a fused weight under Black Forest Labs' names is changed."""
    folder, changed, other = (
        FIXTURES / "single_file",
        tmp_path / "tuned.safetensors",
        tmp_path / "b.safetensors",
    )
    base = folder / "flux_bfl_bf16.safetensors"
    tensors = {name: values.astype("float32") for name, values in load_file(base).items()}
    delta = 0.01 * np.outer(np.arange(32) - 15.5, np.ones(32))
    tensors["double_blocks.0.img_attn.qkv.weight"][32:64] += delta
    save_file(tensors, changed)
    assert main(["lora", "extract", str(base), str(changed), str(out), "--rank", "1"]) == 0
    assert "1 of their modules differ" in capsys.readouterr().out
    found = deltas(out)
    assert found.keys() == {"transformer_blocks.0.attn.to_k.weight"}
    np.testing.assert_allclose(*found.values(), delta, atol=1e-6)
    resize = ["lora", "resize", str(out), str(other), "--rank", "1", "--model"]
    assert main([*resize, str(folder / "flux_bfl_fp8_e4m3.safetensors")]) == 0
    whole = ["lora", "extract", str(base), str(changed), f"{out}1.safetensors", "--rank", "1"]
    assert main([*whole, "--text_encoders"]) == 2
    assert "has no text_encoder: give models with FLUX" in one_line(capsys)
    lora = ADAPTERS / "dora.safetensors"
    assert main(["lora", "extract", str(lora), str(changed), f"{out}2.safetensors", "--rank", "1"]) == 2
    assert "is a LoRA, not a base model" in one_line(capsys)


def test_adapters_of_two_models_are_not_added_up(tmp_path, out, capsys):
    small = tmp_path / "small.safetensors"
    key = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    factors = {key.format("A"): np.ones([2, 32], "float32"), key.format("B"): np.ones([32, 2], "float32")}
    save_file(factors, small)
    assert main(["lora", "combine", str(small), str(ADAPTERS / "split_peft"), str(out)]) == 2
    assert "attn.to_q is for weights [32, 32] and [64, 64]: give adapters of one model" in one_line(capsys)


def test_extract_refuses_models_of_two_kinds(out, capsys):
    assert main(["lora", "extract", str(FLUX), str(NEWBIE), str(out), "--rank", "1"]) == 2
    assert "give two of one model" in one_line(capsys)


def test_newbies_adapters_are_read_with_its_folder(tmp_path, out, capsys):
    source = NEWBIE / "lora"
    assert main(["lora", "resize", str(source), str(out), "--rank", "1"]) == 2
    assert "give NewBie's folder with --model" in one_line(capsys)
    assert main(["lora", "resize", str(source), str(out), "--rank", "1", "--model", str(NEWBIE)]) == 0
    told = error_told(capsys.readouterr().out)
    paths = {
        key.removesuffix(".weight")
        for key in read_header(next((NEWBIE / "transformer").glob("*.safetensors")))
    }
    before, after = deltas(source, paths), deltas(out, paths)
    assert before.keys() == after.keys()
    missed = sum(np.linalg.norm(before[name] - after[name]) ** 2 for name in before)
    assert told == pytest.approx(
        np.sqrt(missed / sum(np.sum(d**2) for d in before.values())), rel=0.05, abs=1e-7
    )
    name = next(iter(before))

    def change(key, values):
        return np.float32(values + before[name]) if key == name else values

    folder = tuned(tmp_path / "tuned", NEWBIE, "transformer", change)
    taken = tmp_path / "taken.safetensors"
    assert (
        main(
            [
                "lora",
                "extract",
                *(str(each / "transformer") for each in (NEWBIE, folder)),
                str(taken),
                "--rank",
                "4",
            ]
        )
        == 0
    )
    np.testing.assert_allclose(deltas(taken, paths)[name], before[name], atol=1e-6)


def test_a_word_of_lora_that_is_missing_or_wrong_is_answered_with_the_three(capsys):
    for argv in (["lora"], ["lora", "--help"], ["lora", "shrink", "a", "b"]):
        assert main(argv) == 2
        message = one_line(capsys)
        assert "use one of lora resize, lora combine, lora extract" in message and "train" not in message
    assert sum(name.startswith("lora ") for name in COMMANDS) == 3
