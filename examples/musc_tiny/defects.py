# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a product: a region of it, and what happens there.

A kind of defect is drawn once for a pool; each call then damages one image at another place. Pictures are
``(size, size, 3)`` and masks ``(size, size)``, float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from textures import Picture, Rng, band_noise, outline, placed

Region = Callable[[Rng, Picture], Picture]
Effect = Callable[[Rng, "Scene"], Picture]


class Scene(NamedTuple):
    """One image before the camera, and what its defects may be made of.

    Attributes:
        picture: The sound image.
        body: Where the product is.
        ground: What lies under the product.
        other: A material that is not the product's.
    """

    picture: Picture
    body: Picture
    ground: Picture
    other: Picture


def _somewhere(rng: Rng, body: Picture) -> Picture:
    """A place (x, y) on the product."""
    rows, columns = np.nonzero(body > 0.5)
    if not len(rows):
        return rng.uniform(0.2, 0.8, 2).astype(np.float32) * len(body)
    index = rng.integers(len(rows))
    return np.array([columns[index], rows[index]], np.float32)


def _filled(size: int, points: Picture, centre: Picture, radius: float, angle: float) -> Picture:
    region = np.zeros((size, size), np.float32)
    cv2.fillPoly(region, [placed(points, centre, radius, angle)], 1.0, cv2.LINE_AA, 4)
    return region


def blob(rng: Rng) -> Region:
    """A closed outline: dent, foreign body, missing part."""
    points, scale = outline(rng), np.exp(rng.uniform(np.log(0.03), np.log(0.25)))

    def draw(rng: Rng, body: Picture) -> Picture:
        radius = scale * len(body) * rng.uniform(0.7, 1.4)
        return _filled(len(body), points, _somewhere(rng, body), radius, rng.uniform(0, 2 * np.pi))

    return draw


def cloud(rng: Rng) -> Region:
    """An irregular patch: stain, wear, corrosion."""
    scale, wavelength = rng.uniform(0.05, 0.25), rng.uniform(4, 25)

    def draw(rng: Rng, body: Picture) -> Picture:
        size = len(body)
        y, x = np.mgrid[:size, :size].astype(np.float32)
        centre = _somewhere(rng, body)
        hill = np.exp(-0.5 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (scale * size) ** 2)
        return np.clip(6 * (hill + 0.25 * band_noise(rng, size, wavelength, 0.5) - 0.6), 0, 1) * (hill > 0.1)

    return draw


def crack(rng: Rng) -> Region:
    """A wandering line: crack, hair, thread."""
    thickness, curl, length = int(rng.integers(1, 5)), rng.uniform(0.02, 0.6), rng.uniform(0.15, 0.8)

    def draw(rng: Rng, body: Picture) -> Picture:
        size, steps = len(body), 24
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(curl * rng.standard_normal(steps))
        path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) * length * size / steps
        points = np.rint((path - path[steps // 2] + _somewhere(rng, body)) * 16).astype(np.int32)
        region = np.zeros((size, size), np.float32)
        cv2.polylines(region, [points], False, 1.0, thickness, cv2.LINE_AA, 4)
        return region

    return draw


def specks(rng: Rng) -> Region:
    """Several small discs: pores, splashes, dust."""
    count, scale, spread = int(rng.integers(2, 12)), rng.uniform(0.01, 0.04), rng.uniform(0.03, 0.15)

    def draw(rng: Rng, body: Picture) -> Picture:
        size = len(body)
        centre, region = _somewhere(rng, body), np.zeros((size, size), np.float32)
        for _ in range(count):
            place = np.rint((centre + spread * size * rng.standard_normal(2)) * 16).astype(int).tolist()
            radius = int(16 * max(scale * size * rng.uniform(0.5, 1.5), 1.0))
            cv2.circle(region, place, radius, 1.0, -1, cv2.LINE_AA, 4)
        return region

    return draw


def cut(rng: Rng) -> Region:
    """All of the product beyond a ragged line: broken off, frayed, not filled."""
    depth, raggedness = rng.uniform(0.05, 0.45), rng.uniform(0.0, 6.0)

    def draw(rng: Rng, body: Picture) -> Picture:
        size, angle = len(body), rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:size, :size].astype(np.float32)
        along = x * np.cos(angle) + y * np.sin(angle) + raggedness * band_noise(rng, size, size / 6, 0.5)
        inside = along[body > 0.5]
        if not inside.size:
            return np.zeros_like(body)
        line = inside.max() - depth * (inside.max() - inside.min())
        return np.clip(along - line, 0, 1) * body

    return draw


def _pasted(_rng: Rng, scene: Scene) -> Picture:
    return scene.other


def _missing(_rng: Rng, scene: Scene) -> Picture:
    return scene.ground


def _misplaced(rng: Rng, scene: Scene) -> Picture:
    down, right = rng.integers(len(scene.picture), size=2).tolist()
    return np.rot90(np.roll(scene.picture, (down, right), axis=(0, 1)), int(rng.integers(4)))


def _painted(rng: Rng, scene: Scene) -> Picture:
    colour = rng.uniform(0, 1, 3) if rng.random() < 0.5 else np.full(3, rng.choice([0.03, 0.1, 0.9, 0.97]))
    return np.broadcast_to(colour.astype(np.float32), scene.picture.shape)


def _shaded(rng: Rng, scene: Scene) -> Picture:
    return scene.picture * (rng.uniform(0.35, 0.85) if rng.random() < 0.6 else rng.uniform(1.15, 1.8))


def _blurred(rng: Rng, scene: Scene) -> Picture:
    return cv2.GaussianBlur(scene.picture, (0, 0), rng.uniform(2, 8)).astype(np.float32)


def _roughened(rng: Rng, scene: Scene) -> Picture:
    grain = band_noise(rng, len(scene.picture), rng.uniform(2, 12), 0.5)
    return scene.picture + rng.uniform(0.08, 0.3) * grain[..., None]


def _bent(rng: Rng, scene: Scene) -> Picture:
    size = len(scene.picture)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    reach, wavelength = rng.uniform(4, 14), rng.uniform(15, 40)
    shift = [reach * band_noise(rng, size, wavelength, 0.4) for _ in range(2)]
    return cv2.remap(scene.picture, x + shift[0], y + shift[1], cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)


AREAS, LINES = (blob, blob, cloud, cloud, cut), (crack, crack, specks)
EFFECTS: tuple[Effect, ...] = (_pasted, _missing, _misplaced, _painted, _shaded, _blurred, _roughened, _bent)
VISIBLE_ON_LINES: tuple[Effect, ...] = (_missing, _painted, _painted, _shaded, _pasted)


class Defect:
    """One kind of defect.

    Args:
        rng: Draws the kind: which region, which effect, how soft and how strong.
        has_body: Whether the product has an outline that something can be cut from.
    """

    def __init__(self, rng: Rng, has_body: bool) -> None:
        is_line = rng.random() < 0.35
        regions, effects = (LINES, VISIBLE_ON_LINES) if is_line else (AREAS, EFFECTS)
        region = regions[rng.integers(len(regions))]
        if region is cut and not has_body:
            region = blob
        self.region = region(rng)
        self.effect = _missing if region is cut and rng.random() < 0.9 else effects[rng.integers(len(effects))]
        self.softness = rng.choice([0.0, 0.5, 1.0, 2.0, 4.0]) if not is_line else rng.choice([0.0, 0.5])
        self.strength = rng.uniform(0.4, 1.0)
        self.seed = rng.integers(2**31)  # images of one kind are painted with one colour

    def __call__(self, rng: Rng, scene: Scene) -> Picture:
        """The damaged picture."""
        alpha = self.region(rng, scene.body)
        if self.softness:
            alpha = cv2.GaussianBlur(alpha.astype(np.float32), (0, 0), float(self.softness))
        alpha = (self.strength * alpha)[..., None]
        changed = self.effect(np.random.default_rng(self.seed), scene)
        return (scene.picture * (1 - alpha) + changed * alpha).astype(np.float32)


def visible_change(sound: Picture, damaged: Picture, threshold: float) -> Picture:
    """Where the damage can be seen, ``(size, size)`` of 0 and 1."""
    change = cv2.GaussianBlur(np.abs(damaged - sound).max(axis=2), (0, 0), 1.0)
    return cv2.morphologyEx((change > threshold).astype(np.float32), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
