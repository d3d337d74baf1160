"""`inspect` and `merge` of a base model in one file: what it holds; the folder that comes out."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ppcoat.cli.main import main
from ppcoat.models.flux.files import FLUX_COMPONENTS, FluxFiles
from ppcoat.models.loading import check_folder
from ppcoat.models.tensor_files import map_tensor, tensor_infos

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, FULL = FIXTURES / "single_file", FIXTURES / "tiny_flux_fp32"
K = "transformer_blocks.1.attn.to_k"


def merged(tmp_path, file, *flags, part="transformer", path=K, width=32):
    """Folder that a LoRA of one Linear was merged into, and its delta-W in float64."""
    rng = np.random.default_rng(0)
    a, b = (0.1 * rng.standard_normal(shape).astype("float32") for shape in ([2, width], [width, 2]))
    lora = tmp_path / "lora.safetensors"
    save_file({f"{part}.{path}.lora_A.weight": a, f"{part}.{path}.lora_B.weight": b}, lora)
    asked = [
        "merge",
        "--model",
        str(FOLDER / file),
        "--lora",
        str(lora),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*asked, *flags]) == 0
    return tmp_path / "out", np.float64(b) @ np.float64(a)


def rounded(values):
    return values.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("file", "flag"),
    [
        ("flux_bfl_bf16.safetensors", "--text_encoders"),
        ("flux_bfl_fp8_scaled.safetensors", "--text_encoders"),
        ("flux_Q8_0.gguf", "--text_encoders"),
        ("comfy_all_in_one_fp8.safetensors", "--tokenizers"),
    ],
)
def test_a_merged_file_becomes_a_folder_in_bfloat16(tmp_path, capsys, file, flag):
    out, delta = merged(tmp_path, file, flag, str(FULL))
    assert "1 modules; rounding to bfloat16 changed delta-W by" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted([*FLUX_COMPONENTS, "model_index.json"])
    check_folder(out)
    written = load_file(out / "transformer/diffusion_pytorch_model.safetensors")
    infos = tensor_infos(FluxFiles.found(FOLDER / file)["transformer"])
    assert written.keys() == infos.keys()
    for name, info in infos.items():
        before = map_tensor(info)
        before = before.view(ml_dtypes.bfloat16) if before.dtype == np.uint16 else before
        wanted = np.float64(before) + (delta if name == f"{K}.weight" else 0)
        if name == f"{K}.weight":
            np.testing.assert_allclose(np.float64(written[name]), wanted, rtol=2**-7, atol=2**-12)
        else:
            np.testing.assert_array_equal(written[name], rounded(wanted), err_msg=name)


def test_where_only_an_encoder_changes_the_rest_of_the_file_is_written(tmp_path):
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    file = "comfy_all_in_one_fp8.safetensors"
    out, delta = merged(tmp_path, file, "--tokenizers", str(FULL), part="text_encoder", path=path)
    clip = load_file(out / "text_encoder/model.safetensors")[f"{path}.weight"]
    before = load_file(FOLDER / file)[f"text_encoders.clip_l.transformer.{path}.weight"]
    assert clip.dtype == np.float16
    np.testing.assert_allclose(np.float64(clip), np.float64(before) + delta, rtol=2**-10, atol=2**-14)
    check_folder(out)
    config = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert (config["shift"], config["use_dynamic_shifting"]) == (3.0, True)


def test_what_is_missing_is_told_in_one_line(tmp_path, capsys):
    save_file({"a": np.ones(3)}, tmp_path / "lora.safetensors")
    asked = ["merge", "--model", str(FOLDER / "flux_Q4_0.gguf"), "--lora", str(tmp_path / "lora.safetensors")]
    assert main([*asked, "--output_dir", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert " hold transformer, but no text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae: set" in said


def test_inspect_says_what_a_base_model_holds_and_lacks(capsys):
    assert main(["inspect", str(FOLDER / "comfy_all_in_one_fp8.safetensors")]) == 0
    said = capsys.readouterr().out.splitlines()
    stored = load_file(FOLDER / "flux_bfl_bf16.safetensors").values()
    values = sum(tensor.size for tensor in stored)
    assert f"transformer     {values:,} values in tensors of 98 F8_E4M3" in said
    assert said[-1] == "lacks           tokenizer, tokenizer_2"
    assert main(["inspect", str(FOLDER / "flux_Q4_0.gguf")]) == 0
    assert "values in tensors of 62 F32, 33 Q4_0, 3 F16" in capsys.readouterr().out
    assert main(["inspect", "none.gguf"]) == 2
    assert "no LoRA file at none.gguf: check the path" in capsys.readouterr().err
