"""A small run on the reference FLUX (6 drawings of 64 x 64, rank 2, everything in a folder of the test's
own), and processes that are ranks."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest

from ppcoat.config.load import load_config
from ppcoat.train import rank_line, ranks

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "storm"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # tests here import changed_settings and counts by their names
CONTEXT = multiprocessing.get_context("fork")  # a fork has Paddle imported already


@pytest.fixture(autouse=True)
def shared_encoders(encoders_read_once):
    """In every test here."""


@pytest.fixture
def make_config(request, tmp_path, write_run, drawings):
    """make_config("train.steps=3", ...) -> RunConfig; runs are named by `name=`, all in tmp_path. They are
    on small_flux where a test uses it."""
    data, more = tmp_path / "data", {}
    drawings(data, 6)
    if "small_flux" in request.fixturenames:
        more["model"] = {"name_or_path": str(request.getfixturevalue("small_flux"))}
    train = {"steps": 4, "batch_size": 2, "lr": 1e-2}
    file = write_run(
        tmp_path, data, train=train, coat={"optimizer": {"block_size": 16}}, save={"save_every": 2}, **more
    )
    return lambda *overrides: load_config(file, overrides)


@pytest.fixture
def start():
    """start(work, size) -> (processes, receivers), one of each per rank: the process runs work(its Ranks,
    tell), and what it tells comes from its receiver."""
    started = []

    def start(work, size=2, grace=0.3, **patience):
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            store, ours = (each.getsockname()[1] for each in (one, other))
        environment = {
            "PADDLE_TRAINERS_NUM": str(size),
            "PADDLE_MASTER": f"127.0.0.1:{store}",
            "PADDLE_TRAINER_ENDPOINTS": ",".join([f"127.0.0.1:{ours}", *["127.0.0.1:1"] * (size - 1)]),
        }
        results = [CONTEXT.Pipe(duplex=False) for _ in range(size)]

        def run(rank):
            os.environ.update(environment, PADDLE_TRAINER_ID=str(rank), PADDLE_CURRENT_ENDPOINT="127.0.0.1:1")
            rank_line._GRACE_SECONDS = grace
            work(ranks.Ranks.current(patience=rank_line.Patience(**patience)), results[rank][1].send)

        for rank in range(size):
            process = CONTEXT.Process(target=run, args=(rank,))
            process.start()
            started.append(process)
        return started, [receive for receive, _ in results]

    yield start
    for process in started:
        process.kill()
