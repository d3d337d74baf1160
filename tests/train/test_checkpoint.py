"""Checkpoints: exact round trip, a kill at any moment, damage, pruning, refusal under other settings."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from ppcoat.data import garments
from ppcoat.errors import ConfigError
from ppcoat.train.checkpoint import load_latest, save_checkpoint
from ppcoat.train.resume import check_compatible


def tensors(step):
    return {
        "lora": {"a.lora_A": paddle.full([4, 3], float(step)), "a.lora_B": paddle.zeros([2])},
        "optimizer": {"codes": paddle.full([300], step % 256, dtype="uint8")},
    }


def save(run, step, keep=9):
    return save_checkpoint(run, step, tensors(step), {"step": step, "loss": 0.1 + step}, keep)


def intact(loaded, step):
    """Whether every part belongs to the same step: never a mixture."""
    return (
        loaded.step == loaded.state["step"] == step
        and loaded.state["loss"] == 0.1 + step
        and set(loaded.tensors) == {"lora", "optimizer"}
        and (loaded.tensors["lora"]["a.lora_A"].numpy() == step).all()
        and (loaded.tensors["optimizer"]["codes"].numpy() == step % 256).all()
    )


def raw_bytes(tensor):
    if tensor.dtype in (paddle.float8_e4m3fn, paddle.float8_e5m2, paddle.bfloat16):
        tensor = tensor.view("uint8")
    return tensor.contiguous().numpy().tobytes()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_round_trip_is_bit_exact_in_every_dtype(tmp_path):
    bits = np.arange(256, dtype=np.uint8)
    bits = bits[bits & 0x7F < 0x7C]  # all codes of a byte that are finite in each of the three
    group = {
        "e4m3": paddle.to_tensor(bits).view("float8_e4m3fn"),
        "e5m2": paddle.to_tensor(bits).view("float8_e5m2"),
        "bf16": paddle.to_tensor(bits).view("bfloat16"),
        "fp32": paddle.to_tensor(np.array([1 / 3, -3e38, -0.0, 1e-45], np.float32)),
        "int64": paddle.to_tensor([2**62]),
        "scalar": paddle.to_tensor(3.5),
        "view": paddle.arange(6, dtype="float32").reshape([2, 3]).t(),
    }
    rng = np.random.default_rng(5).bit_generator.state
    path = save_checkpoint(tmp_path, 7, {"all": group}, {"rng": rng, "loss": 0.1 + 0.2}, keep=1)
    loaded = load_latest(tmp_path)
    assert path.name == "000000007" and loaded.path == path and loaded.step == 7
    assert loaded.state == {"rng": rng, "loss": 0.1 + 0.2}
    for name, tensor in group.items():
        other = loaded.tensors["all"][name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(tensor) == raw_bytes(other), name


def test_files_are_the_documented_ones(tmp_path):
    path = save(tmp_path, 3)
    assert sorted(each.name for each in path.iterdir()) == [
        "lora.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert (tmp_path / "checkpoints/latest").read_text() == "000000003\n"
    facts = json.loads((path / "manifest.json").read_text())["files"]
    assert facts["state.json"]["size"] == (path / "state.json").stat().st_size


def test_no_checkpoints(tmp_path):
    assert load_latest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert load_latest(tmp_path) is None


def test_only_the_last_are_kept_and_strangers_are_left_alone(tmp_path):
    root = tmp_path / "checkpoints"
    for stranger in ("000000001", "best", "000000002.tmp-x"):
        (root / stranger).mkdir(parents=True)
        (root / stranger / "mine.txt").write_text("precious")
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["000000001", "000000002.tmp-x", "000000020", "000000030", "best", "latest"]
    assert intact(load_latest(tmp_path), 30)


@contextmanager
def disturbed(number, act, after=False):
    """Context manager: `act` is called at (or right after) the number-th write, sync, rename, replace or
    removal, a write then being half done; {"left": calls until then}."""
    state = {"left": number}

    def patched(target, name):
        real = getattr(target, name)

        def call(*args, **kwargs):
            state["left"] -= 1
            if state["left"] != 0:
                return real(*args, **kwargs)
            if name == "write_bytes":
                real(args[0], args[1][: len(args[1]) // 2])
            elif after:
                with suppress(FileNotFoundError):  # of a rename where there was nothing to set aside
                    real(*args, **kwargs)
            return act()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for target, names in (
            (Path, ["write_bytes"]),
            (os, ["fsync", "rename", "replace"]),
            (shutil, ["rmtree"]),
        ):
            for name in names:
                patch.setattr(target, name, patched(target, name))
        yield state


def in_a_killed_child(number, action, after=False):
    """Run `action` in a forked process that gets SIGKILL where `disturbed` says; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            with disturbed(number, lambda: os.kill(os.getpid(), signal.SIGKILL), after):
                action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
@pytest.mark.slow  # tests/storm/test_writing.py has kills of a checkpoint's save by default
def test_killed_anywhere_in_a_save_old_or_new_is_loaded(tmp_path, caplog, after, again):
    """The real thing: the process is gone, and only what it gave to the kernel is there."""
    seen = []
    for number in range(1, 100):
        run = tmp_path / str(number)
        for step in (10, 20):
            save(run, step)
        target = 20 if again else 30
        killed = in_a_killed_child(number, lambda run=run, target=target: save(run, target, keep=2), after)
        loaded = load_latest(run)
        assert loaded.step in (20, target) and intact(loaded, loaded.step)
        assert not [name for name in names(run) if "tmp" in name or "old" in name]
        save(run, 40)  # and training goes on
        assert intact(load_latest(run), 40)
        if not killed:
            assert loaded.step == target
            break
        seen.append(loaded.step)
    assert len(seen) >= 12 and set(seen) == {20, target} and seen == sorted(seen)
    assert not caplog.text  # the pointer moved last, so nothing was ever missing or damaged


def test_a_full_disk_is_an_error_and_costs_nothing(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    save(tmp_path, 10)
    for number in range(1, 100):
        with disturbed(number, full) as state:
            try:
                save(tmp_path, 20, keep=5)
            except OSError as error:
                assert error.errno == 28
                assert not list((tmp_path / "checkpoints").glob(".*"))
        if state["left"] > 0:
            break
        assert load_latest(tmp_path).step in (10, 20)
        assert not list((tmp_path / "checkpoints").glob(".*"))  # a draft that could not be removed either
    assert intact(load_latest(tmp_path), 20)


def spoil_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def spoil_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoil_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [spoil_cut, spoil_flip, spoil_empty, os.remove], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_used_or_where_strict_none(
    tmp_path, caplog, spoil, name
):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    assert intact(load_latest(tmp_path, strict=True), 20)
    spoil(newest / name)
    if name == "manifest.json" and spoil is spoil_flip:  # one flipped bit in white space or a digit may hide
        (newest / name).write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        with pytest.raises(ConfigError, match=rf"000000020.*{name}.* without --strict") as refused:
            load_latest(tmp_path, strict=True)
        assert "\n" not in str(refused.value) and not caplog.text
        assert intact(load_latest(tmp_path), 10)
    assert "000000020" in caplog.text and name in caplog.text


def test_nothing_intact_is_refused_not_started_over(tmp_path):
    for step in (10, 20):
        spoil_flip(save(tmp_path, step) / "lora.safetensors")
    with pytest.raises(ConfigError, match="no checkpoint in .* is intact"):
        load_latest(tmp_path)


def test_later_steps_of_a_history_given_up_are_not_loaded(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    spoil_flip(tmp_path / "checkpoints/000000030/lora.safetensors")
    assert load_latest(tmp_path).step == 20
    save(tmp_path, 25, keep=1)  # trained on from 20
    spoil_flip(tmp_path / "checkpoints/000000030/lora.safetensors")  # the second flip mends it
    assert intact(load_latest(tmp_path), 25)
    assert names(tmp_path) == ["000000025", "000000030", "latest"]
    spoil_flip(tmp_path / "checkpoints/000000025/state.json")
    with pytest.raises(ConfigError):
        load_latest(tmp_path)


@pytest.mark.parametrize("text", ["", "000000099\n", "../../etc\n", "\xff"])
def test_a_wrong_pointer_is_survived(tmp_path, text, caplog):
    save(tmp_path, 10)
    (tmp_path / "checkpoints/latest").write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert intact(load_latest(tmp_path), 10)
    assert "latest" in caplog.text
    with pytest.raises(ConfigError, match="latest.* without --strict"):
        load_latest(tmp_path, strict=True)


def test_a_first_save_killed_before_its_pointer_is_no_damage(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "checkpoints/latest").unlink()
    assert intact(load_latest(tmp_path, strict=True), 10)


def test_a_manifest_cannot_point_outside(tmp_path, caplog):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["../000000010/state.json"] = manifest["files"]["state.json"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert load_latest(tmp_path).step == 10


def test_drafts_of_living_processes_are_left_alone(tmp_path):
    save(tmp_path, 10)
    root = tmp_path / "checkpoints"
    (root / f"000000020.tmp-{os.getppid()}").mkdir()
    (root / "000000020.tmp-999999999").mkdir()
    load_latest(tmp_path)
    assert names(tmp_path) == ["000000010", f"000000020.tmp-{os.getppid()}", "latest"]


def test_other_settings_are_refused_by_field():
    saved = {"network": {"linear": 16, "targets": ["to_q"]}, "optimizer": {"m1_format": "e4m3"}}
    check_compatible(
        saved, {"network": {"linear": 16, "targets": ("to_q",)}, "optimizer": {"m1_format": "e4m3"}}
    )
    for change, parts in (
        ({"network": {"linear": 32, "targets": ["to_q"]}}, ("network.linear", "16", "32")),
        ({"network": {"linear": 16, "targets": None}}, ("network.targets", "['to_q']", "None")),
        ({"optimizer": {"m1_format": "e5m2"}}, ("optimizer.m1_format", "'e4m3'", "'e5m2'")),
        ({"optimizer": {}}, ("optimizer",)),
        ({"resolution": 64}, ("resolution", "not recorded", "64")),
        ({"new": None}, ("new", "not recorded")),
    ):
        with pytest.raises(ConfigError) as caught:
            check_compatible(saved, saved | change)
        assert all(part in str(caught.value) for part in parts)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="came 0"):
        save(tmp_path, 1, keep=0)


RUN_AND_BE_KILLED = """
import os, signal, sys
from ppcoat.config.load import load_config
from ppcoat.train.run import train_lora

kill_at = int(sys.argv[2])
for name in ("fsync", "rename", "replace"):
    def killing(*arguments, real=getattr(os, name), **options):
        global kill_at
        kill_at -= 1
        if kill_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, killing)
train_lora(load_config(sys.argv[1]))
"""


@pytest.mark.slow
def test_runs_killed_in_their_saves_end_as_one_that_was_not(tmp_path, write_run):
    garments.write_folder(tmp_path / "data", 6, seed=1, motif="gold star", prefix="[trigger] ")
    train = {"steps": 4, "batch_size": 2, "gradient_accumulation": 2, "lr_scheduler": "cosine",
             "ema": {"use_ema": True}}  # fmt: skip
    final = {}
    for kill_at in (0, 8, 15, 24):
        folder = tmp_path / f"killed_at_{kill_at}"
        folder.mkdir()
        file = write_run(folder, tmp_path / "data", train=train, save={"save_every": 1},
                         network={"linear": 2, "linear_alpha": 4, "dropout": 0.1})  # fmt: skip
        command = [sys.executable, "-c", RUN_AND_BE_KILLED, str(file)]
        first = subprocess.run([*command, str(kill_at)], capture_output=True, check=False)
        assert first.returncode == (-signal.SIGKILL if kill_at else 0), first.stderr.decode()[-2000:]
        if kill_at:
            subprocess.run([*command, "0"], capture_output=True, check=True)
        final[kill_at] = load_file(str(folder / "run" / "run.safetensors"))
        assert not list((folder / "run").rglob("*.tmp-*"))
    for kill_at, tensors in final.items():
        for name, value in final[0].items():
            assert tensors[name].tobytes() == value.tobytes(), (kill_at, name)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_process_saves_and_gives_its_exit_code(tmp_path, write_run, number, code):
    garments.write_folder(tmp_path / "data", 6, seed=1, motif="gold star", prefix="[trigger] ")
    file = write_run(tmp_path, tmp_path / "data", train={"steps": 100000}, save={"save_every": 100000})
    command = [sys.executable, "-m", "ppcoat", "train", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == code, process.stderr.read().decode()[-2000:]
    assert load_latest(tmp_path / "run").step == len(log.read_text().splitlines())
