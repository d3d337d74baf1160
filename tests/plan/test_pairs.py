"""The plan counts the tokens of references, of pictures that are there and of folders that are not, and knows
a Fill model."""

from pathlib import Path

import pytest
from PIL import Image

from ppcoat.config.schema import RunConfig
from ppcoat.plan.model import image_tokens
from ppcoat.plan.phases import MemoryModel, Settings

FIXTURES = Path(__file__).parents[1] / "fixtures"
PLAIN = Settings("none", 0, False, 0, 1, 1)


def config(folder="no/such", model="no/such/FLUX.1-dev", sample=None, **data):
    data = {"folder_path": f"{folder}/pictures", "resolution": 768, "bucket_rule": "square"} | data
    return RunConfig.model_validate(
        {
            "name": "x",
            "device": "gpu",
            "model": {"name_or_path": model},
            "datasets": [data],
            "sample": sample or {},
        }
    )


def test_a_reference_of_a_folder_that_is_not_there_counts_as_a_picture():
    assert image_tokens(config(), 16) == (2304, 0)
    assert image_tokens(config(control_path=["a", "b"]), 16) == (6912, 4608)
    assert image_tokens(config(control_path=["a"], bucket_rule="aspect"), 16) == (4838, 2419)


def test_only_the_step_and_previews_see_them(tmp_path):
    sample = {"sample_every": 1, "samples": [{"prompt": "a", "width": 512, "height": 512}]}
    shown = {
        "sample_every": 1,
        "samples": [{"prompt": "a", "width": 512, "height": 512, "ctrl_img": ["a", "b"]}],
    }
    plain, paired = (
        MemoryModel(config(sample=sample), True),
        MemoryModel(config(sample=shown, control_path="a"), True),
    )
    before, after = ({phase.name: phase.parts for phase in each.phases(PLAIN)} for each in (plain, paired))
    assert before["pictures"] == after["pictures"] and before["captions"] == after["captions"]
    kept = [each["forward, backward"]["kept"] for each in (before, after)]
    assert kept[1] / kept[0] == pytest.approx((2 * 2304 + 512) / (2304 + 512), rel=0.02)
    assert after["previews"]["working"] >= before["previews"]["working"]
    assert "at most 4608 image tokens (2304 of references) and 512 text tokens" in paired.facts[1]
    assert "of references" not in plain.facts[1]


def test_those_that_are_there_count_by_their_sizes(tmp_path):
    for name, size in (
        ("pictures/a.png", (64, 64)),
        ("pictures/b.png", (64, 64)),
        ("before/a.png", (32, 48)),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size).save(path)
        path.with_suffix(".txt").write_text("a") if "pictures" in name else None
    pairs = {"folder": tmp_path, "resolution": 64, "control_path": [str(tmp_path / "before")]}
    assert image_tokens(config(**pairs), 16) == (32, 16)
    assert image_tokens(config(**pairs, full_size_control_images=False), 16) == (22, 6)


def test_a_fill_model_is_planned(tmp_path):
    for part in (FIXTURES / "tiny_flux_fp32").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").symlink_to(FIXTURES / "fill/transformer")
    memory = MemoryModel(config(model=str(tmp_path), mask_path="a"), True)
    assert memory.model.linears["x_embedder"] == (384, 32)
    step = next(phase for phase in memory.phases(PLAIN) if phase.name == "forward, backward")
    assert step.parts["kept"] > 0
