# SPDX-License-Identifier: Apache-2.0
"""Drawing tools.

Lengths are fractions of the image's side unless they are said to be thread pitches.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rng = np.random.Generator


def ramp(start: float, stop: float, value: Array) -> Array:
    """Rise smoothly from 0 at ``start`` to 1 at ``stop``."""
    t = np.clip((value - start) / (stop - start), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@lru_cache(maxsize=32)
def _gaussian(size: int, sigma: float) -> Array:
    """Matrix (size, size) that blurs a column."""
    place = np.arange(size)
    weights = np.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of a square image, ``sigma`` in pixels; in numpy alone, so that platforms agree."""
    matrix = _gaussian(len(image), sigma)
    if image.ndim == 3:
        return np.moveaxis(matrix @ np.moveaxis(image, 2, 0) @ matrix.T, 0, 2)
    return np.asarray(matrix @ image @ matrix.T)


@lru_cache(maxsize=32)
def _spline(size: int, cells: float) -> Array:
    """Cubic B-spline weights (size, knots) of ``cells`` unit intervals."""
    knots = np.arange(-1, int(cells) + 3)
    t = np.abs(np.linspace(0.0, cells, size)[:, None] - knots)
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)


def noise(rng: Rng, size: int, rows: float, columns: float | None = None) -> Array:
    """Smooth noise of about unit variance, with ``rows`` x ``columns`` independent cells over the image."""
    down, across = _spline(size, rows), _spline(size, rows if columns is None else columns)
    return np.asarray(down @ rng.standard_normal((down.shape[1], across.shape[1])) @ across.T / 0.48)


def blob(rng: Rng, x: Array, y: Array, radius: float, stretch: float = 1.0) -> Array:
    """Roughly the distance to the edge of an irregular round shape at the origin, negative inside."""
    turn = rng.uniform(0.0, 2.0 * np.pi)
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.sqrt(stretch)
    beside = (y * np.cos(turn) - x * np.sin(turn)) * np.sqrt(stretch)
    angle = np.arctan2(beside, along)
    edge = 1.0 + sum(rng.normal(0.0, 0.16 / k) * np.cos(k * angle + rng.uniform(0.0, 6.28)) for k in range(2, 9))
    return np.hypot(along, beside) - radius * edge


def walk(rng: Rng, start: tuple[float, float], heading: float, length: float, bend: float, steps: int) -> Array:
    """Points (steps + 1, 2) of a line whose steps stray from ``heading`` by about ``bend`` radians."""
    headings = heading + rng.normal(0.0, bend, steps)
    moves = length / steps * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return np.asarray(start) + np.vstack([np.zeros(2), np.cumsum(moves, axis=0)])


def line(x: Array, y: Array, points: Array) -> tuple[Array, Array]:
    """Distance to a polyline, and how far along it (0 to 1) the nearest point lies."""
    nearest, position = np.full_like(x, np.inf), np.zeros_like(x)
    for k, ((ax, ay), (bx, by)) in enumerate(itertools.pairwise(points)):
        dx, dy = bx - ax, by - ay
        t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0.0, 1.0)
        distance = np.hypot(x - ax - t * dx, y - ay - t * dy)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        position[closer] = (k + t[closer]) / (len(points) - 1)
    return nearest, position


def pixel_grid(size: int) -> tuple[Array, Array]:
    """Centres of the pixels: how far to the right and how far down."""
    centres = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def slopes(height: Array) -> tuple[Array, Array]:
    """Slope of a height field to the right and downwards; both in fractions of the image's side."""
    step = 1.0 / len(height)
    return np.asarray(np.gradient(height, step, axis=1)), np.asarray(np.gradient(height, step, axis=0))
