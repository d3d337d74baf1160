"""A small random FLUX with a LoRA that does something, and a batch for it."""

import numpy as np
import paddle
import pytest

from ppcoat.lora import inject_lora, lora_layers


@pytest.fixture(autouse=True)
def shared_encoders(encoders_read_once):
    """In every test here."""


@pytest.fixture
def student(build_flux):
    """3 + 2 blocks, latents of 4 channels, LoRA of rank 2 with random B."""
    transformer = build_flux(double=2, single=3, channels=16, guidance=True)
    inject_lora(transformer, rank=2, alpha=2.0, seed=1)
    rng = np.random.default_rng(0)
    for layer in lora_layers(transformer).values():
        layer.lora_B.set_value(0.2 * rng.standard_normal(layer.lora_B.shape).astype("float32"))
    transformer.train()
    return transformer


@pytest.fixture
def batch():
    """3 pictures of 4 x 4 latents: 4 image tokens of 16."""
    rng = np.random.default_rng(1)
    shapes = {"latents": (3, 4, 4, 4), "prompt_embeds": (3, 5, 12), "pooled": (3, 6)}
    return {name: paddle.to_tensor(rng.standard_normal(shape), "float32") for name, shape in shapes.items()}
