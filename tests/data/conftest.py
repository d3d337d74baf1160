"""Examples without pictures, and pictures with captions in a folder of the test's own."""

from pathlib import Path

import pytest
from PIL import Image

from ppcoat.config.schema import RunConfig
from ppcoat.data.examples import Example
from ppcoat.data.sources import Item


@pytest.fixture
def example():
    """example(size=(64, 32), repeats=2, ...) -> Example of a picture that no file holds."""

    def make(size=(64, 64), captions=("a shirt",), **fields):
        return Example(Item(Path("none.png"), captions[0], *size), size, captions, **fields)

    return make


@pytest.fixture
def draw(tmp_path):
    """draw("a/x.png", (32, 24), "a shirt") -> its path below tmp_path; caption None: no caption file."""

    def draw(name, size=(64, 64), caption="a shirt", color="red"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, "utf-8")
        return path

    return draw


@pytest.fixture
def run_config():
    """run_config({"folder_path": ...}, ..., trigger_word="sks") -> RunConfig with these datasets."""
    return lambda *datasets, **fields: RunConfig(
        name="run", model={"name_or_path": "none"}, datasets=list(datasets), **fields
    )
