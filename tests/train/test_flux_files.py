"""The LoRA files of a run: names, formats, dtype, what is kept, and that all hold one delta-W."""

import os

import numpy as np
import pytest
from safetensors import safe_open

from ppcoat.config.load import load_config
from ppcoat.lora import inject_lora, lora_layers
from ppcoat.train.flux import LoRAFiles
from ppcoat.train.run import train_lora


def read(file):
    with safe_open(str(file), framework="np") as opened:
        return {name: opened.get_tensor(name).astype(np.float64) for name in opened.keys()}  # noqa: SIM118


@pytest.fixture
def files(tmp_path, build_flux, write_run):
    """files(*overrides) -> LoRAFiles of a small FLUX whose LoRA is not zero."""
    model = build_flux()
    inject_lora(model, rank=2, alpha=6.0)
    rng = np.random.default_rng(0)
    for layer in lora_layers(model).values():
        layer.lora_B.set_value(rng.standard_normal(layer.lora_B.shape, dtype=np.float32))
    path = write_run(tmp_path, tmp_path)

    def make(*overrides):
        config = load_config(path, overrides)
        config.run_dir.mkdir(exist_ok=True)
        return LoRAFiles(config, model)

    return make


def names(files):
    return sorted(path.name for path in files.config.run_dir.iterdir())


def test_each_format_has_a_file_with_the_same_update(files):
    """delta-W of one module in float64 from each file: alpha / rank * B A, alpha 6 and rank 2 in training."""
    written = files("save.format=[diffusers, kohya, paddle]").write(7, final=True)
    assert [path.name for path, _ in written] == [
        "run.safetensors",
        "run_kohya.safetensors",
        "run_paddle.safetensors",
    ]
    diffusers, kohya, paddle = (read(path) for path, _ in written)
    layer = lora_layers(files().transformer)["single_transformer_blocks.1.proj_out"]
    wanted = 3 * (layer.lora_A.numpy().astype(np.float64) @ layer.lora_B.numpy().astype(np.float64)).T
    name = "single_transformer_blocks.1.proj_out"
    found = diffusers[f"transformer.{name}.lora_B.weight"] @ diffusers[f"transformer.{name}.lora_A.weight"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    found = (paddle[f"{name}.lora_A"] @ paddle[f"{name}.lora_B"]).T
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    key = "lora_unet_single_blocks_1_linear2"
    found = kohya[f"{key}.lora_up.weight"] @ kohya[f"{key}.lora_down.weight"]
    scale = kohya[f"{key}.alpha"] / kohya[f"{key}.lora_down.weight"].shape[0]
    np.testing.assert_allclose(found * scale, wanted, rtol=1e-5, atol=1e-6)
    for _, summary in written:
        assert summary.error < 1e-6 and not summary.zero and summary.norm > 0
        assert "delta-W norm" in summary.line() and "0 of them zero" in summary.line()


def test_the_dtype_is_that_of_save(files):
    path, summary = files("save.dtype=bfloat16").write(1, final=True)[0]
    with safe_open(str(path), framework="np") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118
    assert 1e-4 < summary.error < 1e-2  # a bfloat16 has 8 bits


def test_files_of_the_newest_steps_are_kept_and_strangers_stay(files):
    some = files("save.max_step_saves_to_keep=2", "save.format=[diffusers, kohya]")
    for stranger in ("run_1.safetensors", "other_000000001.safetensors", "run_000000001_mine.safetensors"):
        (some.config.run_dir / stranger).touch()
    some.write(4, final=True)
    for process in (999999999, os.getppid()):  # one is gone, one may be writing
        (some.config.run_dir / f".run_000000001.safetensors.tmp-{process}").touch()
    (some.config.run_dir / "run_000000009.safetensors").touch()  # of a history that was given up
    for step in (1, 2, 3):
        some.write(step, final=False)
    kept = [f"run_00000000{step}{ending}.safetensors" for step in (2, 3) for ending in ("", "_kohya")]
    kept += ["run_000000009.safetensors", "run.safetensors", "run_kohya.safetensors"]
    strangers = ["run_1.safetensors", "other_000000001.safetensors", "run_000000001_mine.safetensors"]
    assert names(some) == sorted([*kept, *strangers, f".run_000000001.safetensors.tmp-{os.getppid()}"])


def test_a_run_leaves_files_of_its_saved_steps_and_says_what_is_in_them(make_config, capfd):
    config = make_config(
        "save.format=[diffusers, paddle]",
        "train.steps=3",
        "save.save_every=1",
        "save.max_step_saves_to_keep=1",
    )
    result = train_lora(config)
    found = sorted(path.name for path in config.run_dir.glob("*.safetensors"))
    assert found == sorted(f"run{s}{e}.safetensors" for s in ("", "_000000002") for e in ("", "_paddle"))
    assert result.lora_file.name == "run.safetensors"
    said = [line for line in capfd.readouterr().err.split("LoRA file: ")[1:] if "39 modules" in line]
    assert len(said) == 6
    with safe_open(str(config.run_dir / "run_000000002.safetensors"), framework="np") as opened:
        assert opened.metadata()["step"] == "2"
