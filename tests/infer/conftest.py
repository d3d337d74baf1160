"""What tests of drawing and of scores share."""

import paddle
import pytest

import ppcoat.infer.garment_scores as garment_scores
from ppcoat.infer.garment_scores import GarmentClassifier
from ppcoat.models.flux import prompt_encoding


@pytest.fixture(autouse=True)
def shared_checks(folders_checked_once):
    """In every test here."""


@pytest.fixture
def quick_and_untrained(monkeypatch):
    """Scores need no good judge to be counted, and captions no 512 tokens."""
    monkeypatch.setattr(prompt_encoding, "MAX_T5_TOKENS", 16)

    def load():
        paddle.seed(0)
        return GarmentClassifier()

    monkeypatch.setattr(garment_scores.GarmentClassifier, "load", staticmethod(load))
