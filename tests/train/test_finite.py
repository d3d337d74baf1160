"""The first module whose output is not finite."""

import paddle
from paddle import nn

from ppcoat.train.report import first_bad_module


class TwoOutputs(nn.Layer):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x), paddle.to_tensor([1])


def model():
    return nn.Sequential(nn.Linear(2, 2), TwoOutputs(), nn.LayerList([nn.Linear(2, 2)]))


def forward(layers, x):
    return layers[2][0](layers[1](layers[0](x))[0])


def test_the_innermost_of_the_first_is_named_and_hooks_are_gone():
    layers, x = model(), paddle.ones([1, 2])
    assert first_bad_module(layers, lambda: forward(layers, x)) is None
    layers[1].inner.weight.set_value(paddle.full([2, 2], float("inf")))
    assert first_bad_module(layers, lambda: forward(layers, x)) == "1.inner"
    assert not any(layer._forward_post_hooks for layer in layers.sublayers())


def test_a_bad_input_is_the_first_module_that_sees_it():
    layers, x = model(), paddle.to_tensor([[float("nan"), 0.0]])
    assert first_bad_module(layers, lambda: forward(layers, x)) == "0"
