"""Drawing with a model that is one file: the picture of the same weights in a folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ppcoat.cli.main import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER, FULL = FIXTURES / "single_file", FIXTURES / "tiny_flux_fp32"
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name.startswith(("flux_", "comfy_")))
COMFY = "comfy_all_in_one_fp8.safetensors"
SIZES = ["--height", "32", "--width", "32", "--max_sequence_length", "16", "--device", "cpu"]


def drawn(command, model, folder, *flags):
    """int [height, width, 3]"""
    asked = [command, "--model", str(model), "--prompt", "a red dress", "--output_dir", str(folder)]
    assert main([*asked, *SIZES, *flags]) == 0
    (file,) = Path(folder).glob("*.png")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


pytestmark = pytest.mark.usefixtures("encoders_read_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoders_read_once):
    """The truth of these files' transformer, with all else."""
    folder = tmp_path_factory.mktemp("model") / "flux"
    shutil.copytree(FULL, folder)
    shutil.rmtree(folder / "transformer")
    shutil.copytree(FOLDER / "transformer", folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def picture(folder, tmp_path_factory):
    return drawn("generate", folder, tmp_path_factory.mktemp("picture"), "--steps", "2")


@pytest.mark.parametrize("file", FILES)
def test_a_file_draws(file, picture, tmp_path):
    flag = "--tokenizers" if file == COMFY else "--text_encoders"
    got = drawn("generate", FOLDER / file, tmp_path, "--steps", "2", flag, str(FULL))
    off = np.abs(got - picture).mean()
    if file == "flux_bfl_bf16.safetensors":
        assert off == 0
    else:  # rounded to eight, six or four bits
        assert 0 < off < 12


def test_the_four_step_script_takes_a_file_and_a_lora(folder, tmp_path):
    rng, lora = np.random.default_rng(0), tmp_path / "lora.safetensors"
    path = "transformer.transformer_blocks.1.attn.to_k"
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ([2, 32], [32, 2]))
    save_file({f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}, lora)
    flags = ["--path_to_lora", str(lora), "--lora_scale", "1"]
    wanted = drawn("lightning", folder, tmp_path / "folder", *flags)
    file = FOLDER / "flux_bfl_bf16.safetensors"
    got = drawn("lightning", file, tmp_path / "file", *flags, "--text_encoders", str(FULL))
    assert (got == wanted).all()


def test_a_newbie_folder_takes_nothing_beside_it(capsys):
    asked = ["generate", "--model", str(FIXTURES / "tiny_newbie"), "--prompt", "a", "--vae", str(FULL)]
    assert main(asked) == 2
    assert "error: --vae is for a FLUX file; a NewBie folder has its own" in capsys.readouterr().err
