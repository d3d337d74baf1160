"""A true training on a disk that fails, dies or loses its power: the same command goes on, and ends bit for
bit as a run that nothing hit."""

import errno
import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
from counts import judge
from disk import (
    Disk,
    Failure,
    PowerCut,
    a_new_process,
    chosen,
    drafts,
    in_a_child,
    killed_at,
    named,
    put,
    recorded,
    snapshot,
)
from safetensors.numpy import load_file
from savers import read_run

from ppcoat.config.lightning import lightning_config
from ppcoat.config.load import load_config
from ppcoat.config.newbie import load_newbie_config
from ppcoat.distill.flux_lightning import train_flux_lightning
from ppcoat.errors import ConfigError
from ppcoat.train import trainer
from ppcoat.train.checkpoint import load_latest
from ppcoat.train.run import train_lora

ERRORS = [
    (errno.ENOSPC, True),
    (errno.EIO, False),
    (errno.EROFS, True),
    (errno.ENOSPC, False),
    (errno.EACCES, True),
]
LOGS = ("log.jsonl", ".lock")
FIXTURES = Path(__file__).parents[1] / "fixtures"


def flux(folder, out, fixture):
    sample = {"sample_every": 3, "sample_steps": 1, "prompts": ["a hat"], "width": 32, "height": 32}
    train = {"steps": 4, "batch_size": 2, "lr": 1e-2}
    sections = {"train": train, "save": {"save_every": 2}, "sample": sample}
    file = fixture("write_run")(folder, folder / "data", coat={"optimizer": {"block_size": 16}}, **sections)
    config = load_config(file, [f"output_dir={out}", "datasets.0.cache_latents_to_disk=true"])
    return partial(train_lora, config)


def newbie(folder, out, fixture):
    own = {"output_dir": str(out), "learning_rate": 1e-2, "lora_alpha": 4, "lora_dropout": 0.05}
    file = fixture("write_newbie_run")(folder, folder / "data", Model=own)
    return partial(train_lora, load_newbie_config(file, ["train.steps=4", "save.save_every=2"]))


def lightning(folder, out, fixture):
    config = lightning_config({
        "data_path": str(folder / "data"), "pretrained_teacher_model": str(FIXTURES / "tiny_flux_fp32"),
        "output_dir": str(out), "tracker_project_name": "run", "resolution": "64", "lora_rank": "2",
        "learning_rate": "1e-2", "adv_lr": "1e-3", "train_batch_size": "2", "max_train_steps": "4",
        "max_sequence_length": "16", "num_euler_timesteps": "20", "visualdl": False, "validation_steps": 0,
        "checkpointing_steps": 2, "device": "cpu", "resume_from_checkpoint": "latest",
    })  # fmt: skip
    return partial(train_flux_lightning, config)


RUNS = {"FLUX": flux, "NewBie": newbie, "Lightning": lightning}


@pytest.fixture(params=RUNS)
def run(request, tmp_path, memory, monkeypatch, encoders_read_once, drawings):
    """train() is the run, in `root`; trace: of its operations; reported: {length of the trace: step} of the
    checkpoints that it said it had saved; outcome() what it left."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    drawings(tmp_path / "data", 4)
    root = memory / "disk"
    trainings = RUNS[request.param](tmp_path, root / "out", request.getfixturevalue)
    folder = root / "out" / "run"

    def train():
        a_new_process()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            trainings()

    def outcome():
        files = [file for file in folder.rglob("*.safetensors") if file.parent in (folder, folder / "run")]
        results = {(file.name, name): value.tobytes() for file in files
                   for name, value in load_file(file).items()}  # fmt: skip
        return results, read_run(root)

    put(root, {})
    reported, save_run = {}, trainer.save_run

    def saved(state, config):
        save_run(state, config)
        reported[len(disk.trace)] = state.step

    with monkeypatch.context() as patch, recorded(root).watched() as disk:
        patch.setattr(trainer, "save_run", saved)
        train()
    calm = outcome()
    assert calm[0] and calm[1] and reported
    return SimpleNamespace(
        row=f"a {request.param} run", root=root, folder=folder, train=train, outcome=outcome, calm=calm,
        trace=disk.trace, reported=reported, count=disk.count,
    )  # fmt: skip


def goes_on(run) -> bool:
    run.train()
    return run.outcome() == run.calm and not drafts(run.root)


def test_what_a_run_reported_is_there_when_the_power_goes_at_its_end(run):
    model, there = PowerCut(), snapshot(run.root)
    for operation in run.trace:
        model.apply(operation)
    for variant in PowerCut.VARIANTS:
        left = {name: data for name, data in model.left(variant).items() if data is not None}
        lost = [name for name, data in there.items() if left.get(name) != data and not name.endswith(LOGS)]
        judge(run.row, "power cut", not lost, f"at the end, {variant}: {lost}")


@pytest.mark.slow
def test_a_run_that_is_really_killed(run):
    def killed(number):
        with killed_at(run.root, number).watched():
            run.train()

    for number in chosen(run.count, every=False, few=16):
        put(run.root, {})
        status = in_a_child(partial(killed, number))
        judge(run.row, "real kill", status == -signal.SIGKILL and goes_on(run), f"operation {number}")


@pytest.mark.slow
def test_a_run_on_a_disk_that_fails(run):
    for number, (code, lasting) in zip(chosen(run.count, every=False, few=20), cycle(ERRORS), strict=False):
        put(run.root, {})
        error, failure = None, Failure(number, code, lasting)
        try:
            with Disk(run.root, failure).watched():
                run.train()
        except (OSError, ConfigError) as caught:
            error = caught
        clean = error is None or isinstance(error, ConfigError) or named(error)
        told = f"operation {number}, {errno.errorcode[code]}, lasting {lasting}: {error!r}"
        judge(run.row, "error", clean and (error or run.outcome() == run.calm) and goes_on(run), told)


@pytest.mark.slow
def test_a_run_after_a_power_cut(run):
    model, last = PowerCut(), 0
    moments = set(chosen(len(run.trace), every=False, few=10)) | set(run.reported)
    for number, operation in enumerate(run.trace, 1):
        model.apply(operation)
        last = run.reported.get(number, last)
        for variant in PowerCut.VARIANTS if number in moments else ():
            put(run.root, model.left(variant))
            found = load_latest(run.folder)
            right = last == 0 or (found is not None and found.step >= last)
            judge(run.row, "power cut", right and goes_on(run), f"after {number}, {variant}, step {last}")
