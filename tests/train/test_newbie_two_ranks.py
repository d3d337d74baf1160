"""Two ranks on NewBie-image train as one process with both their pictures, bucket by bucket."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ppcoat.config.newbie import load_newbie_config
from ppcoat.data import garments
from ppcoat.train.run import train_lora

ROOT = Path(__file__).parents[2]
LAUNCH = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", "log"]
SCRIPT = [str(ROOT / "train_scripts" / "train_newbie_lora.py"), "--config_file"]


@pytest.fixture
def write(tmp_path, write_newbie_run):
    """write(name, batch_size, ...) -> config of a run in tmp_path/<name> on 4 square and 2 wide pictures,
    with captions of different lengths."""
    data = tmp_path / "data"
    garments.write_folder(data, 4, seed=1, motif="gold star", prefix="")
    (data / "0003.txt").write_text("a far longer caption than those of the others, " * 3)
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (128, 64), colour).save(data / f"wide{number}.png")
        (data / f"wide{number}.txt").write_text(f"a wide {colour} picture")

    def write(name, batch_size, quantize=False, **more):
        folder = tmp_path / name
        folder.mkdir()
        own = {"output_dir": str(folder), "train_batch_size": batch_size, "num_epochs": 1,
               "learning_rate": 2e-4, "lr_warmup_steps": 0, **more}  # fmt: skip
        # an epsilon above rounding: with a small one AdamW makes a whole step of any gradient
        sections = {"Model": own, "train": {"epsilon": 1e-6}, "model": {"quantize": quantize}}
        return write_newbie_run(folder, data, **sections)

    return write


def log(file):
    return [json.loads(line) for line in (file.parent / "run" / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(first, second, tolerance):
    ours, theirs = (load_file(file.parent / "run" / "adapter_model.safetensors") for file in (first, second))
    assert ours.keys() == theirs.keys()
    learnt = [value for name, value in ours.items() if "lora_B" in name or name.endswith("lokr_w2_b")]
    assert max(np.abs(value).max() for value in learnt) > 1e-4  # they began at zero
    difference = max(np.abs(value - theirs[name]).max() for name, value in ours.items())
    print(f"weights differ by {difference:.2g} at most")
    assert difference < tolerance
    for mine, other in zip(log(first), log(second), strict=True):
        assert mine.keys() - {"kept_bytes"} == other.keys() - {"kept_bytes"}
        for name in mine.keys() - {"kept_bytes"}:
            assert mine[name] == pytest.approx(other[name], abs=10 * tolerance), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": False},
        {"adapter_type": "lokr", "gradient_checkpointing": True, "quantize": True},
    ],
    ids=["LoRA", "LoKr on an FP8 base, checkpointed"],
)
def test_two_ranks_are_one_with_both_pictures(write, tmp_path, settings):
    """Were the ranks in different buckets in a step, its times, and so its loss, would be others."""
    two, one = write("two", 1, **settings), write("one", 2, **settings)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PADDLE_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *LAUNCH, *SCRIPT, str(two)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_newbie_config(one)
    assert len(train_lora(config).losses) == 3  # two batches of square pictures, one of wide ones
    assert_equal_runs(two, one, 1e-6)
    names = [sorted(path.name for path in (file.parent / "run").iterdir()) for file in (two, one)]
    assert names[0] == names[1] and not list(two.parent.rglob("*tmp*"))
    copies = list((two.parent / "run").glob("*/*-fp8/*.safetensors"))
    assert bool(copies) == bool(config.model.quantize)
