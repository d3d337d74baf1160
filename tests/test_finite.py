"""What is found not finite in tensors and models, and whom an error names."""

import numpy as np
import paddle
import pytest
from paddle import nn

from ppcoat.errors import ConfigError
from ppcoat.finite import check_made, damaged_weight, first_not_finite, is_finite


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
)
def test_one_number_is_found_in_every_dtype(dtype):
    for bad in (np.nan, np.inf, -np.inf):
        if dtype.startswith("float8"):  # a cast makes 448 of it; stored bits are what they are
            bits = paddle.to_tensor(np.uint8([0, 127 if dtype == "float8_e4m3fn" else 124, 60]))
            tensor = bits.view(dtype)
        else:
            tensor = paddle.to_tensor(np.float32([1, bad, 3])).astype(dtype)
        assert not is_finite(tensor)
    assert is_finite(paddle.ones([2]).astype(dtype))


def test_integers_and_nothing_are_finite():
    assert is_finite(paddle.to_tensor([127], dtype="uint8")) and is_finite(paddle.zeros([0]))


def test_the_first_is_named_and_what_has_no_memory_is_passed_over():
    good, bad = paddle.ones([2]), paddle.full([2], float("nan"))
    assert first_not_finite({"a": good, "b": bad, "c": bad}) == "b"
    assert first_not_finite({"a": good}) is None
    with paddle.LazyGuard():
        assert damaged_weight(nn.Linear(2, 2)) is None


def test_an_error_names_the_weight_or_says_that_there_is_none():
    model, bad = nn.Linear(2, 2), paddle.full([1], float("inf"))
    check_made(paddle.ones([1]), "the latent")
    with pytest.raises(ConfigError, match=r"^the latent is not finite; use model.dtype float32"):
        check_made(bad, "the latent", lambda: ("vae/", model))
    model.bias.set_value(paddle.to_tensor([0.0, float("nan")]))
    with pytest.raises(ConfigError, match=r"^the latent is not finite: bias of vae/ holds NaN"):
        check_made(bad, "the latent", lambda: ("vae/", model))
