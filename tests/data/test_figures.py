"""Figures: the same seed draws the same, and what pose and garment say is where they say it."""

from dataclasses import replace

import numpy as np
import pytest

from ppcoat.data.figures import SKIN, Pose, draw_figure, draw_pose
from ppcoat.data.garments import KINDS, Garment


def pixels(picture):
    return np.asarray(picture, np.int32)


def near(picture, colour, within=60):
    return np.abs(pixels(picture) - np.array(colour)).sum(-1) < within


def test_same_seed_same_pixels_and_another_pose_another_picture():
    dress = Garment("dress", "red", "dots", "white")
    assert Pose.random(3) == Pose.random(3) != Pose.random(4)
    for draw in (draw_pose, lambda pose: draw_figure(pose, dress, 3)):
        assert np.array_equal(pixels(draw(Pose.random(3))), pixels(draw(Pose.random(3))))
        assert np.abs(pixels(draw(Pose.random(3))) - pixels(draw(Pose.random(4)))).mean() > 5


@pytest.mark.parametrize("size", [64, 96])
def test_sticks_and_figure_have_one_pose(size):
    """Hands and feet are skin in one drawing and sticks in the other; the corners are background in both."""
    pose = Pose.random(8)
    sticks, figure = draw_pose(pose, size), draw_figure(pose, None, size=size)
    assert sticks.size == figure.size == (size, size)
    ends = [pose.arm(-1)[1], pose.arm(1)[1], *(np.mean(pose.leg(side), axis=0) for side in (-1, 1))]
    for x, y in ends:
        place = round(y * size - 0.5), round(x * size - 0.5)
        assert near(figure, SKIN)[place]
        assert pixels(sticks)[place].min() > 150
    for picture in (sticks, figure):
        assert near(picture, 255 * np.array(pose.background), 6)[[0, 0, -1, -1], [0, -1, 0, -1]].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_garment_is_worn_where_it_belongs(kind):
    """What is green lies above the shoulders, between them and the hip, or below."""
    pose = replace(Pose.random(5), tilt=0.0, arms=((25.0, 0.0), (25.0, 0.0)))
    green = near(draw_figure(pose, Garment(kind, "green", "plain"), 5), (42, 148, 72))
    assert green.mean() > 0.008
    rows = np.nonzero(green)[0] / 64
    shoulders, hip = pose.at(0, -0.33)[1], pose.at(0, -0.05)[1]
    high, low = (rows < shoulders).mean(), (rows > hip).mean()
    wanted = {"hat": high, "trousers": low, "skirt": low}.get(kind, 1 - high)
    assert wanted > 0.9
    assert kind != "dress" or 0.3 < low < 0.8
