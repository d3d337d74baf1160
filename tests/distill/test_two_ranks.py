"""Two processes from paddle.distributed.launch distil as one process with both their pictures, and in windows
as with everything encoded at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppcoat.data import garments

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_flux_lightning_lora.py"
LAUNCH = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir"]


@pytest.mark.slow
def test_two_ranks_are_one_with_both_pictures(tmp_path):
    """Three steps, with the heads' turns and the LoRA's, and an epsilon above rounding."""
    garments.write_folder(tmp_path / "data", 5, seed=1)
    flags = {
        "data_path": tmp_path / "data",
        "pretrained_teacher_model": ROOT / "tests" / "fixtures" / "tiny_flux_fp32",
        "output_dir": tmp_path,
        "resolution": 64,
        "lora_rank": 2,
        "max_train_steps": 3,
        "max_sequence_length": 16,
        "adam_epsilon": 1e-6,
        "learning_rate": 1e-4,
        "saving_policy": "none",
        "device": "cpu",
    }
    shared = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    shared += ["--use_dmd_loss", "--apply_reflow_loss", "--no-fp8_optimizer", "--no-visualdl"]
    shared += ["--validation_steps", "0", "--log_every", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    two = [*LAUNCH, str(tmp_path / "log")]
    for name, size, start in (("one", 2, []), ("two", 1, two), ("windows", 1, two)):
        own = ["--tracker_project_name", name, "--train_batch_size", str(size)]
        own += ["--encode_ahead", "1"] if name == "windows" else []
        command = [sys.executable, *start, str(SCRIPT), *shared, *own]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, two, windows = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two", "windows")
    )
    assert windows == two
    assert [line.keys() - {"kept_bytes"} for line in one] == [line.keys() - {"kept_bytes"} for line in two]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], rel=1e-4), name
