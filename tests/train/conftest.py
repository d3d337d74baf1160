"""A small run on the reference FLUX: 6 drawings of 64 x 64, rank 2, everything in a folder of the test's
own."""

from pathlib import Path

import pytest

from ppcoat.config.load import load_config
from ppcoat.data import garments

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny_flux_fp32"


@pytest.fixture
def make_config(tmp_path):
    """make_config("train.steps=3", ...) -> RunConfig; runs are named by `name=`, all in tmp_path."""
    data = tmp_path / "data"
    garments.write_folder(data, 6, seed=1, motif="gold star", prefix="[trigger] ")
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
name: run
output_dir: {tmp_path}
trigger_word: sks
device: cpu
model: {{name_or_path: {FIXTURE}}}
network: {{linear: 2, linear_alpha: 4}}
datasets: [{{folder_path: {data}, resolution: 64}}]
train: {{steps: 4, batch_size: 2, lr: 1e-2, max_sequence_length: 16}}
coat: {{enabled: true, optimizer: {{block_size: 16}}}}
save: {{save_every: 2}}
sample: {{sample_every: 0}}
logging: {{visualdl: false}}
""",
        encoding="utf-8",
    )
    return lambda *overrides: load_config(file, overrides)
