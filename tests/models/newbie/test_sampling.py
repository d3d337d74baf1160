from pathlib import Path

import numpy as np
import paddle
import pytest

from ppcoat.errors import ConfigError
from ppcoat.models.newbie.files import load_nextdit
from ppcoat.models.newbie.pipeline import Guidance, guided_velocity, integrate, time_grid

FOLDER = Path(__file__).parents[2] / "fixtures" / "tiny_newbie"
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def velocity_with(refs):
    """velocity_with(guidance) -> velocity(x, t) of the tiny model, for the conditions of the references."""
    model = load_nextdit(FOLDER / "transformer", "float32")
    names = {"cap_feats": "cap_feats", "cap_mask": "cap_mask", "clip_text_pooled": "clip"}
    conditions = {name: paddle.to_tensor(refs[f"sample_{ref}"]) for name, ref in names.items()}

    def with_guidance(guidance):
        def velocity(x, t):
            with paddle.no_grad():
                return guided_velocity(model, x, t, conditions, guidance)

        return velocity

    return with_guidance


@pytest.mark.parametrize("points", [5, 6])
def test_time_grid_is_that_of_the_original(refs, points):
    np.testing.assert_allclose(time_grid(points), refs[f"sample_grid_{points}"], rtol=0, atol=1e-7)


def test_guided_velocity_is_that_of_the_original(refs, velocity_with):
    velocity = velocity_with(Guidance(scale=4.0))(paddle.to_tensor(refs["sample_z"]), 0.0)
    np.testing.assert_allclose(velocity.numpy(), refs["cfg_v_t0"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "solver", "guidance"),
    [
        ("euler", "euler", Guidance(4.0)),
        ("midpoint", "midpoint", Guidance(4.0)),
        ("midpoint_trunc", "midpoint", Guidance(4.0, until=0.25)),
        ("euler_renorm", "euler", Guidance(4.0, renorm=1.0)),
    ],
)
def test_trajectories_are_those_of_the_original(refs, velocity_with, name, solver, guidance):
    wanted = refs[f"sample_{name}"]
    x = paddle.to_tensor(refs["sample_z"])
    points = list(integrate(velocity_with(guidance), x, time_grid(len(wanted)), solver))
    trajectory = np.concatenate([x.numpy(), *(point.numpy() for point in points)])
    np.testing.assert_allclose(trajectory, wanted, rtol=0, atol=TOLERANCE)


class Straight(paddle.nn.Layer):
    """A velocity that is the pooled text, whatever x and t are; counts the rows it was asked for."""

    def forward(self, x, t, cap_feats, cap_mask, clip_text_pooled):
        self.rows = x.shape[0]
        return paddle.ones_like(x) * clip_text_pooled.reshape([-1, 1, 1, 1])


def straight(pooled, guidance, t=0.5):
    rows = len(pooled)
    conditions = {"cap_feats": paddle.zeros([rows, 1, 1]), "cap_mask": paddle.ones([rows, 1])}
    conditions["clip_text_pooled"] = paddle.to_tensor(pooled)
    model = Straight()
    velocity = guided_velocity(model, paddle.zeros([rows // 2, 1, 2, 2]), t, conditions, guidance)
    return velocity.numpy()[:, 0, 0, 0].tolist(), model.rows


def test_guidance_goes_off_and_then_costs_nothing():
    pooled = [1.0, 2.0, 0.0, 1.0]
    assert straight(pooled, Guidance(3.0)) == ([3.0, 4.0], 4)
    assert straight(pooled, Guidance(3.0, until=0.5)) == ([1.0, 2.0], 2)
    assert straight(pooled, Guidance(1.0)) == ([1.0, 2.0], 2)


def test_renorm_limits_each_picture_by_itself():
    # Unlimited they are 3 and 1, beside 1 and 2 of the prompt alone: only the first is too long.
    velocity, _ = straight([1.0, 2.0, 0.0, 2.5], Guidance(3.0, renorm=1.0))
    np.testing.assert_allclose(velocity, [1.0, 1.0], rtol=1e-6)


def test_midpoint_is_exact_for_a_velocity_that_grows_with_time():
    grid = np.array([0.0, 0.5, 1.0], "float32")
    for solver, end in (("euler", 0.25), ("midpoint", 0.5)):
        *_, last = integrate(lambda x, t: paddle.full_like(x, t), paddle.zeros([1]), grid, solver)
        assert abs(float(last) - end) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: time_grid(1), "1 time points"),
        (lambda: time_grid(5, 0.0), "shift 0.0"),
        (lambda: next(integrate(lambda x, t: x, paddle.zeros([1]), time_grid(3), "heun")), "'heun'"),
        (lambda: Guidance(renorm=-1.0), "renorm"),
        (lambda: Guidance(scale=float("nan")), "finite"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
