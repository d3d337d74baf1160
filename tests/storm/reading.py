"""Files of the world, damaged: KINDS has all kinds, each in a module of its own, and commands that read what
no command reads alone, so that all inputs are run by `ppcoat.cli.main.run`.
"""

import argparse
from pathlib import Path

import read_adapters  # noqa: F401  each adds its kinds
import read_configs  # noqa: F401
import read_data  # noqa: F401
import read_leftovers
import read_models  # noqa: F401
import read_pickles  # noqa: F401
from inputs import CONFIGS, FIXTURES, KINDS, Input

from ppcoat.cli.main import Command

__all__ = ["CONFIGS", "FIXTURES", "KINDS", "Input", "stand_ins"]


def stand_ins() -> dict[str, Command]:
    names = (
        "unpack",
        "weights",
        "prompts",
        "drawn",
        "checkpoint",
        "cache",
        "run",
        "studio",
        "dropped",
        "model",
    )
    return {name: Command(f"read {name}", "reading", f"read_{name}") for name in names}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+")


def read_unpack(arguments: argparse.Namespace) -> None:
    from ppcoat.data.laion import LaionSource, unpack_laion

    shards, listed, folder = arguments.paths
    found = unpack_laion(LaionSource(shards, listed, max_bad_share=0.5), Path(folder))
    assert found.pictures == len(list(Path(folder).glob("*.jpg"))) or found.pictures == 0
    print(f"{found.pictures} pictures, {found.bad} bad")


def read_weights(arguments: argparse.Namespace) -> None:
    from ppcoat.models.newbie.convert import checkpoint_infos
    from ppcoat.models.tensor_files import map_tensor

    infos = checkpoint_infos(Path(arguments.paths[0]))
    print(
        ", ".join(
            f"{name} {info.shape} {float(map_tensor(info).sum(dtype='float64')):g}"
            for name, info in infos.items()
        )
    )


def read_prompts(arguments: argparse.Namespace) -> None:
    from ppcoat.infer.drawing import Drawing, check_numbers
    from ppcoat.infer.prompts import read_pictures

    print(len(read_pictures(arguments.paths[0], Drawing(model="tiny_flux"), check_numbers)))


def read_drawn(arguments: argparse.Namespace) -> None:
    """What `generate` draws from, and what `evaluate` scores it by."""
    from ppcoat.infer.editing import opened_picture
    from ppcoat.infer.evaluate import own_prompt, prompts_of

    picture, prompts = map(Path, arguments.paths)
    print(opened_picture(picture).size, own_prompt(picture), prompts_of([picture], prompts))


def read_run(arguments: argparse.Namespace) -> None:
    """What goes on in a folder reads beside checkpoints."""
    from ppcoat.bench.parity import earlier_results
    from ppcoat.infer.batch import _settings_in
    from ppcoat.train.divergence import last_checkpoint
    from ppcoat.train.report import _open_log
    from ppcoat.train.search import Journal

    folder = Path(arguments.paths[0])
    _open_log(folder / "log.jsonl", 2).close()
    print((folder / "log.jsonl").read_text(), last_checkpoint(folder), _settings_in(folder / "picture.png"))
    print(Journal.of(folder / "journal.json", {"a": 1}).results, earlier_results(folder / "parity.json", {}))


def read_checkpoint(arguments: argparse.Namespace) -> None:
    from ppcoat.train.checkpoint import load_latest

    found = load_latest(arguments.paths[0], strict=bool(arguments.paths[1]))
    print(f"step {found.step}, loss {found.state['loss']}, a {float(found.tensors['lora']['a'][0])}")


def read_cache(arguments: argparse.Namespace) -> None:
    from ppcoat.data.embedding_store import EmbeddingStore

    found = EmbeddingStore(arguments.paths[0]).get(read_leftovers.KEY)
    print(
        "none"
        if found is None
        else ", ".join(f"{name} {float(t.astype('float32').mean())}" for name, t in sorted(found.items()))
    )


def read_studio(arguments: argparse.Namespace) -> None:
    from ppcoat.studio.access import Roots
    from ppcoat.studio.draw_list import read_drawing
    from ppcoat.studio.run_log import RunLog, find_runs, progress_of
    from ppcoat.studio.runs import ChildRun, Queue

    folder = Path(arguments.paths[0])
    job, log, queue = ChildRun(folder), RunLog(folder), Queue(folder)
    log.read()
    find_runs(Roots([folder.parent]))
    print(
        job.status,
        job.error,
        job.memory,
        job.tail(),
        progress_of(job, log),
        queue.waiting,
        queue.current,
        read_drawing(folder),
    )


def read_dropped(arguments: argparse.Namespace) -> None:
    from ppcoat.studio.draw_list import asked_of_picture, table_of

    print(len(table_of(asked_of_picture(Path(arguments.paths[0]).read_bytes())).lines))


def read_model(arguments: argparse.Namespace) -> None:
    """A model, and where the rest of one in a single file lies."""
    import paddle

    from ppcoat.models.flux.files import FluxFiles
    from ppcoat.models.loading import check_folder, load_component
    from ppcoat.models.newbie.pipeline import NewbiePipeline
    from ppcoat.models.tensor_files import pipeline_class

    place, *beside = map(Path, arguments.paths)
    if not beside and pipeline_class(place) == "NewbiePipeline":
        parts = NewbiePipeline.from_pretrained(place, "float32").components
    else:
        rest = beside[0] if beside else None
        where = check_folder(FluxFiles.found(place, text_encoders=rest, vae=rest, tokenizers=rest))
        parts = {name: load_component(component, name) for name, component in where.items()}
    for name, part in parts.items():
        if isinstance(part, paddle.nn.Layer):
            print(name, f"{sum(float(each.astype('float32').abs().sum()) for each in part.parameters()):.6g}")
        elif callable(part):
            print(name, part(["a red shirt"]))
        else:
            print(name, dict(part.config))
