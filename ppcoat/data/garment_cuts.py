"""Cuts of the drawn garments, each with proportions of its own.

A cut takes a generator and returns (outline polygons, detail lines, centre of the chest), all in garment
units: -1..1, y downwards.
"""

from __future__ import annotations

import math

import numpy as np


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """A symmetric outline from its right half, given from top to bottom."""
    return np.array(right + [(-x, y) for x, y in reversed(right)], np.float32)


def _shirt(rng):
    width, hem = rng.uniform(0.40, 0.54), rng.uniform(0.62, 0.92)
    reach, drop = rng.uniform(0.74, 0.96), rng.uniform(-0.32, -0.05)
    neck = rng.uniform(0.14, 0.24)
    cuff = rng.uniform(0.16, 0.26)
    body = _mirrored([(neck, -0.8), (width, -0.7), (reach, drop), (reach - cuff, drop + 0.16), (width, -0.25),
                      (width + rng.uniform(-0.05, 0.1), hem)])  # fmt: skip
    collar = np.array([(-neck, -0.8), (-neck * 0.6, -0.66), (0, -0.6), (neck * 0.6, -0.66), (neck, -0.8)])
    return [body], [collar], (0.0, -0.12)


def _dress(rng):
    top, waist, flare = rng.uniform(0.26, 0.36), rng.uniform(0.2, 0.3), rng.uniform(0.55, 0.88)
    line = rng.uniform(-0.2, 0.02)
    strap = rng.uniform(0.1, top - 0.08)
    body = _mirrored([(strap, -0.95), (strap + 0.08, -0.95), (top, -0.68), (waist, line), (flare, 0.95)])
    body = np.insert(body, 0, [(0.0, rng.uniform(-0.78, -0.62))], axis=0)
    return [body], [np.array([(-waist, line), (waist, line)])], (0.0, -0.3)


def _jacket(rng):
    width, hem = rng.uniform(0.42, 0.54), rng.uniform(0.6, 0.82)
    wrist = rng.uniform(0.74, 0.94)
    reach = rng.uniform(0.4, 0.72)
    sleeve = rng.uniform(0.18, 0.24)
    body = _mirrored(
        [
            (0.2, -0.82),
            (width, -0.74),
            (wrist, reach),
            (wrist - sleeve, reach + 0.07),
            (width, -0.2),
            (width + 0.03, hem),
        ]
    )
    lapel = rng.uniform(-0.45, -0.15)
    details = [
        np.array([(-0.2, -0.82), (0, lapel), (0.2, -0.82)]),
        np.array([(0, lapel), (0, hem)]),
        np.array([(-width, hem - 0.12), (width, hem - 0.12)]),
    ]
    return [body], details, (0.0, -0.08)


def _trousers(rng):
    waist, hip = rng.uniform(0.3, 0.4), rng.uniform(0.42, 0.52)
    leg_out, leg_in = rng.uniform(0.48, 0.68), rng.uniform(0.18, 0.3)
    crotch, end = rng.uniform(-0.38, -0.15), rng.uniform(0.75, 0.98)
    body = np.array([(-waist, -0.9), (waist, -0.9), (hip, -0.5), (leg_out, end), (leg_in, end), (0, crotch),
                     (-leg_in, end), (-leg_out, end), (-hip, -0.5)])  # fmt: skip
    belt = np.array([(-waist - 0.03, -0.78), (waist + 0.03, -0.78)])
    return [body], [belt, np.array([(0, -0.78), (0, crotch)])], (0.0, -0.46)


def _skirt(rng):
    waist, flare = rng.uniform(0.28, 0.4), rng.uniform(0.6, 0.95)
    top, hem = rng.uniform(-0.68, -0.5), rng.uniform(0.64, 0.92)
    sag = rng.uniform(0, 0.14)
    body = _mirrored([(waist, top), (flare, hem)])
    body = np.insert(body, 2, [(0.0, hem + sag)], axis=0)
    pleats = [np.array([(waist * f, top + 0.13), (flare * f, hem)]) for f in (-0.55, 0.55)]
    return [body], [np.array([(-waist - 0.05, top + 0.13), (waist + 0.05, top + 0.13)]), *pleats], (0.0, 0.06)


def _hat(rng):
    crown, brim = rng.uniform(0.36, 0.5), rng.uniform(0.84, 1.0)
    top, line = rng.uniform(-0.66, -0.46), rng.uniform(0.14, 0.26)
    thick = rng.uniform(0.12, 0.2)
    bend = rng.uniform(0.8, 1.0)
    dome = _mirrored([(crown * 0.55, top), (crown * bend, top + 0.14), (crown, line)])
    angles = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    edge = np.stack([brim * np.cos(angles), line + thick * np.sin(angles)], axis=1)
    band = np.array([(-crown, line - 0.14), (crown, line - 0.14)])
    return [edge, dome], [band], (0.0, -0.22)


CUTS = {
    "shirt": _shirt,
    "dress": _dress,
    "jacket": _jacket,
    "trousers": _trousers,
    "skirt": _skirt,
    "hat": _hat,
}
