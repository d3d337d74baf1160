"""Two processes from paddle.distributed.launch pretrain one transformer, on parts that rank 0 made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppcoat.models.flux.pipeline import FluxPipeline

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "ppcoat" / "assets"
SCRIPT = ROOT / "train_scripts" / "pretrain_tiny_flux.py"


@pytest.mark.slow
def test_two_ranks_train_one_transformer(tmp_path):
    work, output = tmp_path / "work", tmp_path / "out"
    shutil.copytree(ASSETS / "tiny_flux" / "vae", work / "vae")
    shutil.copy(ASSETS / "garment_classifier.safetensors", work)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PADDLE_", "OMP_"))}
    launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", tmp_path / "log"]
    flags = ["--work_dir", work, "--output_dir", output, "--transformer_steps", "3", "--guided_after", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, *flags, "--pictures", "12"],
        env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    assert done.returncode == 0, "\n".join(logs)
    assert "2 ranks: " in logs[0] and "2 ranks: " not in logs[1] and "transformer:" not in logs[1]
    training = json.loads((work / "training.json").read_text())
    assert training["ranks"] == 2 and np.isfinite(training["final_loss"])
    FluxPipeline.from_pretrained(output)
    weights = load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(np.isfinite(value).all() for value in weights.values())
    assert np.abs(weights["proj_out.weight"].astype("float32")).max() > 0, "it starts as zero"
