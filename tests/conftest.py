"""What tests of several parts need: a small random FLUX transformer, and the config file of a small run."""

from pathlib import Path

import paddle
import pytest
import yaml

from ppcoat.models.flux import FluxTransformer2DModel

FIXTURE = Path(__file__).parent / "fixtures" / "tiny_flux_fp32"


@pytest.fixture(scope="session")
def build_flux():
    """build_flux(...) -> a random FluxTransformer2DModel, the same for the same arguments."""

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
