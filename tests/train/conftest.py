"""A small run on the reference FLUX: 6 drawings of 64 x 64, rank 2, everything in a folder of the test's
own."""

import pytest

from ppcoat.config.load import load_config
from ppcoat.data import garments


@pytest.fixture
def make_config(tmp_path, write_run):
    """make_config("train.steps=3", ...) -> RunConfig; runs are named by `name=`, all in tmp_path."""
    data = tmp_path / "data"
    garments.write_folder(data, 6, seed=1, motif="gold star", prefix="[trigger] ")
    train = {"steps": 4, "batch_size": 2, "lr": 1e-2}
    file = write_run(
        tmp_path, data, train=train, coat={"optimizer": {"block_size": 16}}, save={"save_every": 2}
    )
    return lambda *overrides: load_config(file, overrides)
