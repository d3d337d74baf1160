"""What tests of several parts need: a small random FLUX transformer, and the config file of a small run."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

FIXTURES = Path(__file__).parent / "fixtures"
FIXTURE = FIXTURES / "tiny_flux_fp32"
# What a process tells of itself that only a new one can tell.
FRESH = """
import json, sys
import paddle
import ppcoat.train.report
modules = sorted(sys.modules)
from ppcoat.device import LARGEST_KEPT, keep_freed_memory
from ppcoat.device import HostMeter
tuned = keep_freed_memory()
(paddle.ones([4, 4]) @ paddle.ones([4, 4])).numpy()
left = {}
for name, size in {"large": 4 * LARGEST_KEPT, "small": LARGEST_KEPT // 2}.items() if tuned else ():
    before = HostMeter().memory()
    x = paddle.ones([4, size // 16])
    held = HostMeter().memory() - before
    del x
    left[name] = (HostMeter().memory() - before) / held
print(json.dumps({"modules": modules, "left": left}))
"""


def pytest_addoption(pluginmanager):
    """Kernels run in the interpreter where there is no GPU. Triton reads that when a kernel is defined, so it
    is said before anything imports ppcoat; what compiles kernels runs in a process of its own.
    The process that starts others for the tests (-n 2) runs none, and they wait: it imports no Paddle."""
    given = pluginmanager.get_plugin("pytestconfig").known_args_namespace
    if getattr(given, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import paddle

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in each fork of a test
    if not paddle.get_device().startswith("gpu"):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays to the end. To look through it for circles again and again takes a
    fifth of the start, so nobody does; later only what the tests make is looked at."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """No file of a test outlives the power. What is synced, and when, is counted in test_atomic.py and
    storm/, which put their own in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)  # it is open
        yield


CUT = []  # folders that first_blocks made


@pytest.fixture(scope="session")
def first_blocks(tmp_path_factory):
    """first_blocks(model) -> folder of that FLUX with the first block of each kind alone, which nobody
    changes: a run on it takes half the time."""
    from safetensors.numpy import load_file, save_file

    def cut(model: Path) -> Path:
        folder = tmp_path_factory.mktemp("models") / model.name
        CUT.append(folder)
        (folder / "transformer").mkdir(parents=True)
        for part in model.iterdir():
            if part.name != "transformer":
                (folder / part.name).symlink_to(part)
        config = json.loads((model / "transformer" / "config.json").read_text())
        config |= {"num_layers": 1, "num_single_layers": 1}
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        (file,) = (model / "transformer").glob("*.safetensors")
        later = re.compile(r"\w+_blocks\.[1-9]")
        weights = {name: value for name, value in load_file(file).items() if not later.match(name)}
        save_file(weights, folder / "transformer" / file.name, {"format": "pt"})
        return folder

    return cut


@pytest.fixture(scope="session")
def small_flux(first_blocks) -> Path:
    """The reference FLUX with the first block of each kind alone."""
    return first_blocks(FIXTURE)


ASSETS = Path(__file__).parents[1] / "ppcoat" / "assets"
# A function, on a device of this dtype -> that function, each result of which is kept for all tests.
ONCE = cache(lambda load, dtype: cache(load))


def read_once(load):
    """`load`, whose results from a reference model are kept."""
    from ppcoat.device import default_dtype

    def found(*given):
        paths = [Path(each).resolve() for each in given if isinstance(each, str | Path)]
        folders = {parent for path in paths for parent in path.parents}
        if folders.isdisjoint((FIXTURES, ASSETS, *CUT)):
            return load(*given)
        kept = ONCE(load, default_dtype())(*given)
        # an encoder that somebody's pipeline takes to the device and back is that pipeline's
        return load(*given) if getattr(kept, "_forward_pre_hooks", None) else kept

    return found


def reading_once(names):
    """For fixtures: meanwhile these functions of modules are as `read_once` makes them."""
    with pytest.MonkeyPatch.context() as patch:
        for module, functions in names.items():
            for name in functions:
                patch.setattr(module, name, read_once(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def folders_checked_once():
    """What checks of the reference models' folders read and build is kept: these are tested in
    tests/models."""
    from ppcoat.models import fingerprint, loading, tensor_files
    from ppcoat.models.flux import tokenizers
    from ppcoat.models.newbie import pipeline
    from ppcoat.train import flux, newbie

    yield from reading_once(
        {
            fingerprint: ("_fingerprint",),
            tensor_files: ("read_entries",),
            tokenizers: ("_load",),
            loading: ("unfilled",),
            flux: ("unfilled",),
            newbie: ("unfilled_nextdit", "check_newbie_folder"),
            pipeline: ("check_newbie_folder",),
        }
    )


@pytest.fixture(scope="module")
def encoders_read_once(folders_checked_once):
    """Runs on the reference models share their encoders, which no run changes. How they are loaded is tested
    in tests/models."""
    from ppcoat.models import loading
    from ppcoat.models.newbie import pipeline

    yield from reading_once(
        {
            loading: ("load_vae", "load_clip", "load_t5"),
            pipeline: ("load_newbie_vae", "load_gemma3", "load_jina_clip"),
        }
    )
    ONCE.cache_clear()  # what a run may yet have changed is nothing for the tests of another file


@pytest.fixture(scope="session")
def in_fork():
    """in_fork(function) -> what it returns, in a fork, so that this process stays as it is."""

    def result(function):
        hear, tell = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=lambda: tell.send(function()))
        process.start()
        tell.close()
        try:
            return hear.recv()
        finally:
            process.join()

    return result


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """drawings(folder, count): `folder` gets a copy of so many drawings of 64 x 64 with captions, the same in
    every test."""
    from ppcoat.data import garments

    @cache
    def drawn(count: int) -> Path:
        folder = tmp_path_factory.mktemp("drawings")
        garments.write_folder(folder, count, seed=1, motif="gold star", prefix="[trigger] ")
        return folder

    return lambda folder, count: shutil.copytree(drawn(count), folder)


@pytest.fixture(scope="session")
def bf16_folder() -> Path:
    return FIXTURES / "tiny_flux_bf16_sharded"


@pytest.fixture(scope="session")
def fresh_process():
    """-> {"modules": those that `import ppcoat.train.report` loads, "left": shares of a large and of a small
    tensor's memory that stay with the process after keep_freed_memory() when they are freed}."""
    child = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def build_flux():
    """build_flux(...) -> a random FluxTransformer2DModel, the same for the same arguments."""
    import paddle

    from ppcoat.models.flux.transformer import FluxTransformer2DModel

    def build(
        double=2, single=2, heads=2, head_dim=8, channels=4, text=12, pooled=6, guidance=False, axes=None
    ):
        paddle.seed(0)
        time, rows = head_dim // 4, (head_dim - head_dim // 4) // 4 * 2
        return FluxTransformer2DModel(
            in_channels=channels,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=text,
            pooled_projection_dim=pooled,
            guidance_embeds=guidance,
            axes_dims_rope=axes or [time, rows, head_dim - time - rows],
        )

    return build


@pytest.fixture(scope="session")
def write_run():
    """write_run(folder, data, section={...}) -> run.yaml in `folder`: a run on the reference FLUX and the
    pictures in `data`, whose train/coat/save sections are added to."""

    def write(folder: Path, data: Path, **sections: dict) -> Path:
        run = {
            "name": "run",
            "output_dir": str(folder),
            "trigger_word": "sks",
            "device": "cpu",
            "model": {"name_or_path": str(FIXTURE)},
            "network": {"linear": 2, "linear_alpha": 4},
            "datasets": [{"folder_path": str(data), "resolution": 64}],
            "train": {"max_sequence_length": 16, **sections.pop("train", {})},
            "coat": {"enabled": True, **sections.pop("coat", {})},
            "sample": {"sample_every": 0},
            "logging": {"visualdl": False},
            **sections,
        }
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(run), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def write_newbie_run():
    """write_newbie_run(folder, data, section={...}) -> run.toml in `folder`: a run on the reference
    NewBie-image and the pictures in `data`, in folder/out; its section Model is added to."""

    def write(folder: Path, data: Path, **sections: dict) -> Path:
        run = {
            "Model": {
                "base_model_path": str(FIXTURES / "tiny_newbie"),
                "output_dir": str(folder / "out"),
                "output_name": "run",
                "train_data_dir": str(data),
                "resolution": 64,
                "train_batch_size": 2,
                "num_epochs": 2,
                "lr_warmup_steps": 1,
                "lora_rank": 2,
                "lora_dropout": 0.0,
                **sections.pop("Model", {}),
            },
            "Optimization": {"optimizer_type": "AdamW"},
            "logging": {"visualdl": False},
            **sections,
        }
        lines = ['device = "cpu"']
        for name, values in run.items():  # of texts, numbers and lists of these JSON is TOML
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        file = folder / "run.toml"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return write


@pytest.fixture
def stopped_in(monkeypatch):
    """stopped_in(step, train, config) -> the exit status of train(config), which gets SIGTERM at the end of
    that step."""
    from ppcoat.train.trainer import Trainer

    own = Trainer.train_step

    def stopped(step: int, train: Callable, config: object) -> int:
        def interrupted(trainer: Trainer) -> object:
            done = own(trainer)
            if trainer.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return done

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            patch.setattr(Trainer, "train_step", interrupted)
            train(config)
        return left.value.code

    return stopped
