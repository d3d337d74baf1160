"""The flat buffer: where parameters lie, and stochastic rounding."""

import ml_dtypes
import numpy as np
import paddle
import pytest

from ppcoat.fp8.flat import FlatLayout, FlatSpace, round_stochastically

SHAPES = [[3, 5], [128], [1], [130]]


def tensors(dtype: str) -> list[paddle.Tensor]:
    values = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(SHAPES)]
    return [paddle.to_tensor(value.astype("float32")).astype(dtype) for value in values]


def laid_out(params: list[paddle.Tensor], block_size: int) -> np.ndarray:
    """Each parameter from the start of a group, zeros behind it."""
    rows = []
    for param in params:
        flat = param.astype("float32").numpy().reshape(-1)
        rows.append(np.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("dtype", "keep_master"), [("float32", True), ("bfloat16", True), ("bfloat16", False), ("float16", True)]
)
def test_no_group_crosses_two_parameters_and_parameters_follow_the_buffer(dtype, keep_master):
    params = tensors(dtype)
    space = FlatSpace(params, 64, keep_master)
    np.testing.assert_array_equal(space.values().numpy(), laid_out(params, 64))
    np.testing.assert_array_equal(space.gather(tensors(dtype)).numpy(), laid_out(params, 64))
    values = space.values()
    paddle.assign(values * 2.0, output=values)
    space.store(values)
    for param, before in zip(params, tensors(dtype), strict=True):
        np.testing.assert_array_equal(param.astype("float32").numpy(), 2 * before.astype("float32").numpy())
        assert param.shape == before.shape
    assert (space.master is None) == (dtype == "float32" or not keep_master)


def test_a_moved_parameter_comes_back_into_the_buffer():
    for dtype, keep_master, kept in (
        ("float32", True, 7.0),
        ("bfloat16", False, 7.0),
        ("bfloat16", True, None),
    ):
        params = tensors(dtype)
        space = FlatSpace(params, 64, keep_master)
        paddle.full(SHAPES[0], 7.0).astype(dtype)._share_buffer_to(params[0])
        space.adopt_moved()
        want = np.full(15, kept) if kept else tensors(dtype)[0].astype("float32").numpy().reshape(-1)
        np.testing.assert_array_equal(space.values().numpy()[0, :15], want)
        np.testing.assert_array_equal(params[0].astype("float32").numpy().reshape(-1), want)


def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_odds():
    paddle.seed(3)
    for value in (1.0 + 0.3 / 128, -2.0 - 1.9 / 64, 3e-20 * (1 + 0.5 / 128)):
        value = float(np.float32(value))
        drawn = round_stochastically(paddle.full([40000], value)).astype("float32").numpy()
        inner = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
        neighbours = np.uint32([inner, inner + 0x10000]).view(np.float32)
        assert set(np.unique(drawn)) == set(neighbours)
        share = (value - neighbours[0]) / (neighbours[1] - neighbours[0])
        assert np.mean(drawn == neighbours[1]) == pytest.approx(share, abs=0.012)  # 5 standard errors


def test_stochastic_rounding_leaves_bfloat16_values_alone():
    exact = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16).astype(np.float32)
    exact[:3] = 0.0, -0.0, 1e38
    exact = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    got = round_stochastically(paddle.to_tensor(exact)).astype("float32").numpy()
    np.testing.assert_array_equal(got, exact)


def test_tensors_of_several_dtypes_are_gathered():
    mixed = [paddle.full([3], 1.5), paddle.full([4], -2.0).astype("bfloat16")]
    assert FlatLayout(mixed, 4).current().tolist() == [[1.5, 1.5, 1.5, 0.0], [-2.0] * 4]
