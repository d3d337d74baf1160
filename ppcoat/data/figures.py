"""A simple figure in a pose, drawn as sticks or dressed in a garment: the data of trying on.

A pose is joints and a background. Its stick drawing and its dressed figure have all of it in common, so that
nothing of the figure is left to guess. Each kind of garment has one cut on a figure: sleeves follow the arms,
trousers the legs, a hat the head. Lengths are in sides of the picture, y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ppcoat.data.garments import COLOURS, SUPERSAMPLING, Frame, Garment, averaged, fabric, filled, stroked

SKIN = (232, 182, 146)
_STICK = (240, 240, 240)
_NECK, _HEAD, _HEAD_RADIUS = -0.32, -0.44, 0.085  # from the hip, upwards
_ARM, _FOREARM, _LEG = 0.17, 0.15, 0.36  # lengths
_LIMB, _CLOTH = 0.068, 0.1  # widths: of an arm or a leg, and of what is worn over it

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Pose:
    """hip: the middle of the figure. tilt: of the body, in degrees. arms: (angle at the shoulder, bend at the
    elbow), left and right, in degrees outwards from hanging down. legs: angles, alike. background: 0..1
    each."""

    hip: tuple[float, float]
    scale: float
    tilt: float
    arms: tuple[tuple[float, float], tuple[float, float]]
    legs: tuple[float, float]
    background: tuple[float, float, float]

    @classmethod
    def random(cls, seed: int) -> Pose:
        """One of many; the same seed gives the same."""
        rng = np.random.default_rng([seed, 5])
        grey = rng.uniform(0.3, 0.5)
        return cls(
            (rng.uniform(0.44, 0.56), rng.uniform(0.6, 0.64)),
            rng.uniform(0.86, 0.98),
            rng.uniform(-14, 14),
            ((rng.uniform(12, 150), rng.uniform(-60, 60)), (rng.uniform(12, 150), rng.uniform(-60, 60))),
            (rng.uniform(3, 28), rng.uniform(3, 28)),
            tuple(np.clip(grey + rng.uniform(-0.06, 0.06, 3), 0, 1).tolist()),
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point beside the hip, in the directions of the body."""
        c, s = math.cos(math.radians(self.tilt)), math.sin(math.radians(self.tilt))
        return self.hip[0] + self.scale * (c * x - s * y), self.hip[1] + self.scale * (s * x + c * y)

    def arm(self, side: int) -> Points:
        """Shoulder, elbow and hand; side: -1 left, 1 right."""
        angle, bend = self.arms[side > 0]
        elbow = _beyond((side * 0.105, _NECK + 0.02), side * angle, _ARM)
        hand = _beyond(elbow, side * (angle + bend), _FOREARM)
        return [self.at(side * 0.105, _NECK + 0.02), self.at(*elbow), self.at(*hand)]

    def leg(self, side: int) -> Points:
        """Hip and foot."""
        start = (side * 0.055, 0.0)
        return [self.at(*start), self.at(*_beyond(start, side * self.legs[side > 0], _LEG))]

    def outline(self, points: Points) -> Points:
        """Points beside the hip -> points of the picture."""
        return [self.at(*point) for point in points]


def draw_pose(pose: Pose, size: int = 64) -> Image.Image:
    """The pose as sticks, an RGB picture of `size` x `size` pixels."""
    n = size * SUPERSAMPLING
    lines = [pose.arm(-1), pose.arm(1), pose.leg(-1), pose.leg(1)]
    lines += [
        [pose.at(0, 0), pose.at(0, _NECK)],
        [pose.leg(-1)[0], pose.leg(1)[0]],
        [pose.arm(-1)[0], pose.arm(1)[0]],
    ]
    sticks = stroked(n, [_pixels(line, n) for line in lines], round(0.03 * n))
    sticks = np.maximum(sticks, filled(n, [_pixels(_circle(pose, _HEAD_RADIUS), n)]))
    return averaged(_over(_plain(pose.background, n), sticks, _STICK), size)


def draw_figure(pose: Pose, garment: Garment | None, seed: int = 0, size: int = 64) -> Image.Image:
    """The figure in this pose, wearing the garment (None: nothing), an RGB picture of `size` x `size` pixels.
    seed: of the cloth."""
    n = size * SUPERSAMPLING
    picture = _over(_plain(pose.background, n), _body(pose, n), SKIN)
    if garment is None:
        return averaged(picture, size)
    parts, details = _WORN[garment.kind](pose)
    cloth = filled(n, [_pixels(part, n) for part in parts])
    frame = Frame(n, 0.2 * pose.scale * n, math.radians(pose.tilt), (pose.hip[0] * n, pose.hip[1] * n))
    picture = np.where(
        cloth[..., None] > 0, fabric(garment, np.random.default_rng([seed, 6]), frame), picture
    )
    dark = tuple(0.45 * value for value in COLOURS[garment.colour])
    edges = [_pixels([*part, part[0]], n) for part in parts]
    inner = filled(n, [_pixels(_shrunk(part), n) for part in parts])
    rim = stroked(n, edges, max(2, n // 96)) * (1 - inner)
    lines = stroked(n, [_pixels(line, n) for line in details], max(2, n // 96))
    return averaged(_over(picture, np.maximum(rim, lines), dark), size)


def _body(pose: Pose, n: int) -> np.ndarray:
    limbs = [_along(pose.arm(side), _LIMB * pose.scale) for side in (-1, 1)]
    limbs += [_along(pose.leg(side), 1.2 * _LIMB * pose.scale) for side in (-1, 1)]
    torso = [(-0.11, _NECK), (0.11, _NECK), (0.08, -0.1), (0.095, 0.03), (-0.095, 0.03), (-0.08, -0.1)]
    parts = [part for limb in limbs for part in limb]
    parts += [pose.outline(torso), _circle(pose, _HEAD_RADIUS)]
    parts += _along([pose.at(0, _NECK), pose.at(0, _HEAD)], 0.06 * pose.scale)
    return filled(n, [_pixels(part, n) for part in parts])


def _shirt(pose: Pose) -> tuple[list[Points], list[Points]]:
    body = [(-0.13, -0.335), (0.13, -0.335), (0.115, 0.03), (-0.115, 0.03)]
    sleeves = [part for side in (-1, 1) for part in _along(pose.arm(side)[:2], _CLOTH * pose.scale, 0.8)]
    return [*sleeves, pose.outline(body)], []


def _jacket(pose: Pose) -> tuple[list[Points], list[Points]]:
    body = [(-0.135, -0.335), (0.135, -0.335), (0.13, 0.07), (-0.13, 0.07)]
    sleeves = [part for side in (-1, 1) for part in _along(pose.arm(side), _CLOTH * pose.scale)]
    lapels = [(-0.06, -0.335), (0, -0.2), (0.06, -0.335)]
    return [*sleeves, pose.outline(body)], [pose.outline(lapels), pose.outline([(0, -0.2), (0, 0.07)])]


def _dress(pose: Pose) -> tuple[list[Points], list[Points]]:
    right = [(0.06, -0.36), (0.1, -0.3), (0.08, -0.1), (0.23, 0.21)]
    return [pose.outline(right + [(-x, y) for x, y in reversed(right)])], [
        pose.outline([(-0.08, -0.1), (0.08, -0.1)])
    ]


def _trousers(pose: Pose) -> tuple[list[Points], list[Points]]:
    hips = [(-0.095, -0.08), (0.095, -0.08), (0.11, 0.04), (-0.11, 0.04)]
    legs = [part for side in (-1, 1) for part in _along(pose.leg(side), 1.1 * _CLOTH * pose.scale, 0.95)]
    return [*legs, pose.outline(hips)], [pose.outline([(-0.1, -0.05), (0.1, -0.05)])]


def _skirt(pose: Pose) -> tuple[list[Points], list[Points]]:
    right = [(0.09, -0.07), (0.21, 0.2)]
    return [pose.outline(right + [(-x, y) for x, y in reversed(right)])], [
        pose.outline([(-0.1, -0.04), (0.1, -0.04)])
    ]


def _hat(pose: Pose) -> tuple[list[Points], list[Points]]:
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    brim = [(0.17 * math.cos(a), _HEAD - 0.035 + 0.035 * math.sin(a)) for a in turns]
    right = [(0.075, _HEAD - 0.14), (0.095, _HEAD - 0.04)]
    dome = right + [(-x, y) for x, y in reversed(right)]
    return [pose.outline(brim), pose.outline(dome)], []


_WORN = {
    "shirt": _shirt,
    "dress": _dress,
    "jacket": _jacket,
    "trousers": _trousers,
    "skirt": _skirt,
    "hat": _hat,
}


def _beyond(start: tuple[float, float], degrees: float, length: float) -> tuple[float, float]:
    """The end of a limb; 0 degrees hang down, positive ones turn to the right."""
    angle = math.radians(degrees)
    return start[0] + length * math.sin(angle), start[1] + length * math.cos(angle)


def _along(line: Points, width: float, share: float = 1.0) -> list[Points]:
    """A band of that width along the first `share` of each piece of a line, with round joints."""
    parts = []
    for (x0, y0), (x1, y1) in zip(line[:-1], line[1:], strict=True):
        x1, y1 = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        length = math.hypot(x1 - x0, y1 - y0)
        u, v = width / 2 * (y1 - y0) / length, -width / 2 * (x1 - x0) / length
        parts.append([(x0 + u, y0 + v), (x1 + u, y1 + v), (x1 - u, y1 - v), (x0 - u, y0 - v)])
    turns = np.linspace(0, 2 * math.pi, 16, endpoint=False)
    for x, y in line[:-1]:
        parts.append([(x + width / 2 * math.cos(a), y + width / 2 * math.sin(a)) for a in turns])
    return parts


def _circle(pose: Pose, radius: float) -> Points:
    turns = np.linspace(0, 2 * math.pi, 24, endpoint=False)
    return pose.outline([(radius * math.cos(a), _HEAD + radius * math.sin(a)) for a in turns])


def _shrunk(part: Points, by: float = 0.8) -> Points:
    x, y = np.mean(part, axis=0)
    return [(x + by * (a - x), y + by * (b - y)) for a, b in part]


def _plain(colour: tuple[float, float, float], n: int) -> np.ndarray:
    return np.broadcast_to(np.float32(colour), (n, n, 3))


def _over(picture: np.ndarray, mask: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """`colour`, 0..255 each, where the mask is."""
    return np.where(mask[..., None] > 0, np.float32(colour) / 255, picture)


def _pixels(points: Points, n: int) -> Points:
    return [(x * n, y * n) for x, y in points]
