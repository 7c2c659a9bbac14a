# SPDX-License-Identifier: Apache-2.0
"""From scene to picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from drawing import Array, Rng, blur, pixel_grid
from fabric import fabric_cut, fabric_hole, fabric_stain, fabric_thread, light_cloth, weave
from gear import gear_chip, gear_contamination, gear_crack, gear_scratch, light_part, place_part

Pixels = npt.NDArray[np.uint8]

OVERSAMPLING = 2  # scenes are drawn this much finer than the picture: edges come out anti-aliased
SPECK, PAINT = "speck", (0.55, 0.05, 0.04)  # red, which neither product has; linear
VISIBLE = 7.0  # grey levels of 255: a smaller change does not count as a defect


@dataclass(frozen=True)
class Category:
    """A product: how to draw a sound one, how to light it, and what can be wrong with it."""

    scene: Callable[[Rng, int], Any]
    light: Callable[[Any], Array]
    defects: dict[str, Callable[[Rng, Any], None]]


CATEGORIES = {
    "fabric": Category(
        weave,
        light_cloth,
        {"cut": fabric_cut, "hole": fabric_hole, "stain": fabric_stain, "thread": fabric_thread},
    ),
    "gear": Category(
        place_part,
        light_part,
        {"chip": gear_chip, "contamination": gear_contamination, "crack": gear_crack, "scratch": gear_scratch},
    ),
}


@dataclass(frozen=True)
class Spec:
    """What decides every pixel of the dataset."""

    seed: int = 0
    size: int = 256
    train_good: int = 8
    test_good: int = 20
    per_defect: int = 5
    speck: int = 0  # pixels; specks of up to this size, and at least half of it, are the only defects, if not 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn or read."""
        if self.seed < 0 or self.size < 64 or min(self.train_good, self.test_good, self.per_defect) < 1:
            msg = "the seed must not be negative, the size at least 64, every count at least 1"
            raise ValueError(msg)
        if self.speck and not 4 <= self.speck <= self.size // 8:
            msg = f"specks must have 4 to {self.size // 8} pixels"
            raise ValueError(msg)

    def defects(self, category: str) -> list[str]:
        """Kinds of defect of a product."""
        return [SPECK] if self.speck else list(CATEGORIES[category].defects)


@dataclass(frozen=True)
class Sample:
    """One image of the dataset; ``defect`` is ``good`` for a sound one."""

    category: str
    split: str
    defect: str
    index: int

    @property
    def image_path(self) -> Path:
        """Where the image goes, relative to the dataset's root."""
        return Path(self.category, self.split, self.defect, f"{self.index:03d}.png")

    @property
    def mask_path(self) -> Path | None:
        """Where its mask goes; a sound image has none."""
        if self.defect == "good":
            return None
        return Path(self.category, "ground_truth", self.defect, f"{self.index:03d}_mask.png")


def samples(spec: Spec) -> Iterator[Sample]:
    """List the images of a dataset."""
    for name in CATEGORIES:
        groups = [("train", "good", spec.train_good), ("test", "good", spec.test_good)]
        groups += [("test", defect, spec.per_defect) for defect in spec.defects(name)]
        for split, defect, count in groups:
            yield from (Sample(name, split, defect, index) for index in range(count))


def _streams(seed: int, sample: Sample) -> list[Rng]:
    """Three independent generators (scene, defect, camera) that no other image and no count touches."""
    name = list(sample.image_path.as_posix().encode())
    return [np.random.default_rng([seed, stream, *name]) for stream in range(3)]


def _expose(linear: Array, size: int) -> Array:
    """Average the fine grid down, soften as a lens does, and apply the display curve: 0 to 255."""
    linear = linear.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 3).mean(axis=(1, 3))
    centres = np.linspace(-1.0, 1.0, size)
    vignette = 1.0 - 0.05 * (centres[:, None] ** 2 + centres**2)
    linear = blur(linear, 0.5 * max(1.0, size / 256)) * vignette[..., None]
    return 255.0 * np.clip(linear, 0.0, 1.0) ** (1.0 / 2.2)


def _speck(rng: Rng, size: int, most: float) -> Array:
    """Return where a speck of up to ``most`` fine pixels is, ``(size, size, 1)``."""
    x, y = pixel_grid(size)
    length, turn = rng.uniform(0.5, 1.0) * most / size, rng.uniform(0.0, np.pi)
    x, y = x - rng.uniform(0.1, 0.9), y - rng.uniform(0.1, 0.9)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    inside = np.hypot(along, across / rng.uniform(0.5, 0.9)) < length / 2
    return inside[..., None]


def draw(sample: Sample, seed: int, size: int, *, speck: int = 0, with_defect: bool = True) -> tuple[Pixels, Pixels]:
    """Draw one image.

    Args:
        sample: Which image.
        seed: The dataset's seed.
        size: Side of the image in pixels.
        speck: See :class:`Spec`.
        with_defect: False leaves the defect out and changes nothing else.

    Returns:
        The image (size, size, 3) in RGB and the mask (size, size), 0 or 255.
    """
    category = CATEGORIES[sample.category]
    scene_rng, defect_rng, camera_rng = _streams(seed, sample)
    scene = category.scene(scene_rng, OVERSAMPLING * size)
    lit = category.light(scene)
    picture = _expose(lit, size)
    mask = np.zeros((size, size), dtype=bool)
    if with_defect and sample.defect != "good":
        if sample.defect == SPECK:
            painted = _speck(defect_rng, OVERSAMPLING * size, OVERSAMPLING * speck)
            damaged = _expose(np.where(painted, PAINT, lit), size)
        else:
            flawed = copy.deepcopy(scene)
            category.defects[sample.defect](defect_rng, flawed)
            damaged = _expose(category.light(flawed), size)
        changed = blur(np.abs(damaged - picture).max(axis=2), 1.2) > VISIBLE
        mask = blur(changed.astype(np.float64), 1.0) > 0.5  # without specks and pinholes
        picture = np.where(mask[..., None], damaged, picture)
    grain = camera_rng.standard_normal(picture.shape) * (0.8 + 0.11 * np.sqrt(picture))
    image = np.clip(np.rint(picture + grain), 0, 255).astype(np.uint8)
    return image, mask.astype(np.uint8) * 255
