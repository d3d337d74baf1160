"""Two processes train as one process with both their pictures, and stop as one. They come from
paddle.distributed.launch, in the slow tests; else they are forks, which have all imported."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from ppcoat.config.load import load_config
from ppcoat.data import garments
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.run import train_lora

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_scripts" / "train_flux_lora.py"
NO_COAT = {"coat": {"enabled": False}}
IN_GROUPS = {"optimizer": {"use_fp8": False}, "activation": {"linear_granularity": "per_group"}}


@pytest.fixture
def write(tmp_path, write_run, small_flux):
    """write(name, batch_size, train={...}, section={...}) -> config file of a run in tmp_path/<name>."""
    data = tmp_path / "data"
    garments.write_folder(data, 6, seed=1, motif="gold star", prefix="[trigger] ")

    def write(name, batch_size, train=None, **sections):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        # an epsilon above rounding: with a small one AdamW makes a whole step of any gradient
        settings = {"steps": 3, "lr": 1e-4, "batch_size": batch_size, "epsilon": 1e-6, **(train or {})}
        model = {"name_or_path": str(small_flux)}
        return write_run(folder, data, train=settings, model=model, **sections)

    return write


@pytest.fixture
def launch(tmp_path):
    """launch(file, *flags) -> Popen of the launcher, whose ranks run `script` and log to tmp_path/log."""
    started = []

    def launch(file, *flags, script=SCRIPT):
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", tmp_path / "log"]
        command = [sys.executable, *launcher, script, file, *flags]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PADDLE_")}
        environment |= {"PYTHONPATH": str(ROOT)}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # a process group of its own, as a shell gives to a command
        process = subprocess.Popen(command, env=environment, start_new_session=True, cwd=tmp_path, **output)
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def fork_ranks():
    """fork_ranks(work, folder of logs) -> two ranks, each a process that does work()."""
    started = []

    def fork(work, folder):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            store, ours = (each.getsockname()[1] for each in (one, other))

        def run(rank):
            for number in (1, 2):
                os.dup2(os.open(folder / f"workerlog.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
            os.environ.update(
                PADDLE_TRAINERS_NUM="2", PADDLE_MASTER=f"127.0.0.1:{store}", PADDLE_TRAINER_ID=str(rank),
                PADDLE_TRAINER_ENDPOINTS=f"127.0.0.1:{ours},127.0.0.1:1",
                PADDLE_CURRENT_ENDPOINT="127.0.0.1:1",
            )  # fmt: skip
            work()

        for rank in (0, 1):
            started.append(multiprocessing.get_context("fork").Process(target=run, args=(rank,)))
            started[-1].start()
        return started

    yield fork
    for process in started:
        process.kill()


def run_of(file):
    return file.parent / "run"


def log(file):
    return [json.loads(line) for line in (run_of(file) / "log.jsonl").read_text().splitlines()]


def logs_of_ranks(tmp_path):
    return [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]


def largest_difference(first, second):
    ours, theirs = (load_file(run_of(file) / "run.safetensors") for file in (first, second))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(value).max() for name, value in ours.items() if "lora_B" in name) > 1e-4
    return max(np.abs(value - theirs[name]).max() for name, value in ours.items())


def assert_equal_runs(first, second, tolerance):
    difference = largest_difference(first, second)
    assert difference < tolerance
    ours, theirs = log(first), log(second)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() - {"kept_bytes"} == other.keys() - {"kept_bytes"}
        for name in mine.keys() - {"kept_bytes", "step"}:
            assert mine[name] == pytest.approx(other[name], abs=10 * tolerance), name


def test_two_ranks_are_one_with_both_pictures(write, fork_ranks, tmp_path):
    """With dropped captions, two passes per step, noise levels told apart, a cache on disk, a reference and a
    mask for all pictures but one, and the model's own output preserved."""
    settings = {"gradient_accumulation": 2, "diff_output_preservation": True,
                "diff_output_preservation_multiplier": 50.0}  # fmt: skip
    data = [{"folder_path": str(tmp_path / "data"), "resolution": 64, "caption_dropout_rate": 0.5,
             "cache_to_disk": True, "control_path": str(tmp_path / "before"),
             "mask_path": str(tmp_path / "before"), "mask_min_value": 0.1}]  # fmt: skip
    (tmp_path / "before").mkdir()
    (tmp_path / "log").mkdir()
    for path in sorted((tmp_path / "data").glob("*.png"))[1:]:
        ImageOps.mirror(Image.open(path).convert("RGB")).save(tmp_path / "before" / path.name)
    two = write("two", 1, settings, datasets=data, **NO_COAT)
    processes = fork_ranks(lambda: train_lora(load_config(two)), tmp_path / "log")
    one = write("one", 2, settings, datasets=data, **NO_COAT)
    train_lora(load_config(one))
    assert [process.join(300) or process.exitcode for process in processes] == [0, 0], logs_of_ranks(tmp_path)
    assert_equal_runs(two, one, 1e-6)
    assert log(two)[-1]["preservation_loss"] > 0
    names = sorted(path.name for path in run_of(two).iterdir())
    assert names == sorted(path.name for path in run_of(one).iterdir())
    assert not list(run_of(two).rglob("*tmp*"))
    first, second = logs_of_ranks(tmp_path)
    assert first.count("data: 6 pictures") == 1 and "LoRA file: " in first
    for said in ("data: ", "LoRA file", "step/s", "s/step"):
        assert said not in second


ENCODES_ON_RANK_0_ONLY = """
import os, sys
from ppcoat.cli.main import run
from ppcoat.models.flux.pipeline import FluxPipeline

def refuse(*_, **__):
    raise AssertionError("rank 1 encodes")

if os.environ["PADDLE_TRAINER_ID"] == "1":
    FluxPipeline.encode_image = FluxPipeline.encode_prompt = refuse
sys.exit(run("train"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("coat", "tolerance"),
    [
        (IN_GROUPS, 2e-6),
        ({"enabled": True, "activation": {"use_fp8": False}}, 2.8e-5),
        ({"enabled": True}, 1e-4),
    ],
    ids=["FP8 activations in groups", "FP8 optimizer", "all of COAT"],
)
def test_with_coat_two_ranks_are_one_up_to_its_rounding(write, launch, tmp_path, coat, tolerance):
    """A code that falls to the other side of a rounding edge differs by 1/16 of its value, which moves an
    update of lr 1e-4 by 1/16 (first moment) and 1/32 (root of the second): 2.8e-5 in 3 steps. A scale per
    tensor depends on the pictures of a rank. Without a cache on disk, and yet one rank encodes for both."""
    two, one = write("two", 1, coat=coat), write("one", 2, coat=coat)
    script = tmp_path / "encodes_once.py"
    script.write_text(ENCODES_ON_RANK_0_ONLY)
    process = launch(two, script=script)
    assert process.wait(timeout=300) == 0, process.stdout.read()
    train_lora(load_config(one))
    assert_equal_runs(two, one, tolerance)
    assert not list(run_of(two).glob("handover*"))


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_also_with_another_number_of_ranks(write, launch, tmp_path):
    """Stopped by Ctrl+C, then two steps of two ranks, then one of one rank."""
    settings = {"steps": 400, "gradient_accumulation": 2}
    two = write("two", 1, settings, **NO_COAT)
    process = launch(two)
    wait_for_steps(two, 3)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl+C reaches the launcher and what it started
    assert process.wait(timeout=180) != 0
    done = load_latest(run_of(two)).step
    assert 3 <= done < 400
    first, second = logs_of_ranks(tmp_path)
    assert f"stopped at step {done}" in first and "Traceback" not in first + second
    assert "has died" not in first + second

    again = launch(two, "--set", f"train.steps={done + 2}")
    assert again.wait(timeout=300) == 0, again.stdout.read()
    assert f"{done:09d}: 2 of {done + 2} steps are left" in logs_of_ranks(tmp_path)[0]
    whole = write("whole", 2, settings | {"steps": done + 2}, **NO_COAT)
    train_lora(load_config(whole))
    assert_equal_runs(two, whole, 1e-6)

    alone = load_config(two, [f"train.steps={done + 3}", "train.batch_size=2"])
    assert len(train_lora(alone).losses) == 1


@pytest.mark.slow
def test_a_killed_rank_ends_the_run(write, launch, tmp_path):
    two = write("two", 1, {"steps": 100000}, **NO_COAT)
    process = launch(two)
    wait_for_steps(two, 3)
    victim = pids_of_ranks(process.pid)[1]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=180) != 0
    assert time.monotonic() - began < 30
    first = logs_of_ranks(tmp_path)[0]
    assert "rank 1 has died and so ends this one; run the same command again" in first
    assert "Traceback" not in first


INFINITE_ON_RANK_1 = """
import os, sys
from ppcoat.cli.main import run
from ppcoat.train import run as train_run

built = train_run.build_trainer

def build(*arguments):
    trainer = built(*arguments)
    if os.environ["PADDLE_TRAINER_ID"] == "1":
        norm = trainer.model.norm_out.linear.weight
        norm.set_value(norm * 0 + 3e38)  # finite: what it makes is not
    return trainer

train_run.build_trainer = build
sys.exit(run("train"))
"""


@pytest.mark.slow
def test_bad_numbers_on_one_rank_end_all_with_its_name(write, launch, tmp_path):
    script = tmp_path / "infinite.py"
    script.write_text(INFINITE_ON_RANK_1)
    two = write("two", 1, {"steps": 9, "max_skipped_in_a_row": 2}, **NO_COAT)
    process = launch(two, script=script)
    assert process.wait(timeout=180) != 0
    first, second = logs_of_ranks(tmp_path)
    assert "error: 2 steps in a row" in first and "the loss, nan, on rank 1, whose log says more" in first
    assert "the first bad tensor is the loss, nan, and before it the output of" in second
    assert "has died" not in first + second and "Traceback" not in first + second


def pids_of_ranks(launcher):
    """Children of the launcher, by rank."""
    pids = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
    return {rank: pid for pid, entries in environments.items() for rank in (0, 1)
            if f"PADDLE_TRAINER_ID={rank}".encode() in entries}  # fmt: skip


def wait_for_steps(file, steps, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = run_of(file) / "log.jsonl"
        if path.exists() and path.read_text().count("\n") >= steps:
            return
        time.sleep(0.05)
    raise AssertionError("the run does not start")
