"""What the original code computed from the reference NewBie-image, and the texts that it was given."""

import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"


@pytest.fixture(scope="session")
def refs():
    with np.load(FOLDER / "refs.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def texts():
    return json.loads((FOLDER / "texts.json").read_text(encoding="utf-8"))
