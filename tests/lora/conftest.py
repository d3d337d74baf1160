"""A small Layer with diffusers' FLUX names: one double block, one single block, and Linears that are no
targets.
"""

import numpy as np
import paddle
import pytest
from paddle import nn


class Names(nn.Layer):
    """A Layer with the given sublayers, so that dotted names can be spelt as a nested dict."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def double_block() -> nn.Layer:
    attention = {name: nn.Linear(16, 16) for name in ("to_q", "to_k", "to_v", "to_add_out")}
    attention |= {name: nn.Linear(16, 16) for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
    attention["to_out"] = nn.LayerList([nn.Linear(16, 16)])

    def feed_forward() -> nn.Layer:
        return Names(net=nn.LayerList([Names(proj=nn.Linear(16, 64)), nn.Identity(), nn.Linear(64, 16)]))

    norm = Names(linear=nn.Linear(16, 96))
    return Names(attn=Names(**attention), ff=feed_forward(), ff_context=feed_forward(), norm1=norm)


def single_block() -> nn.Layer:
    attention = Names(**{name: nn.Linear(16, 16) for name in ("to_q", "to_k", "to_v")})
    return Names(
        attn=attention,
        proj_mlp=nn.Linear(16, 64),
        proj_out=nn.Linear(80, 16),
        norm=Names(linear=nn.Linear(16, 48)),
    )


@pytest.fixture
def model() -> nn.Layer:
    paddle.seed(0)
    return Names(
        x_embedder=nn.Linear(8, 16),
        transformer_blocks=nn.LayerList([double_block()]),
        single_transformer_blocks=nn.LayerList([single_block()]),
        proj_out=nn.Linear(16, 8),
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
