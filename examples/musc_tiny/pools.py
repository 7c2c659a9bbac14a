# SPDX-License-Identifier: Apache-2.0
"""Pools: images of one drawn product, some of them with defects, as MuSc would be given them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from defects import Defect, Scene, visible_change
from textures import Picture, Rng, any_material, outline, placed, rotation
from tqdm import tqdm

PIECE = 192  # pixels a side of a stored piece of material
UNSEEN = 1_000_000  # seeds from here on are those of validation and tests, never of a training
LEAST_AREA = 0.001  # of the image: a defect of less is drawn again
TRIES = 4


class Pool(NamedTuple):
    """One product.

    Attributes:
        images: ``(N, size, size, 3)``, uint8.
        masks: ``(N, size, size)``, uint8, 1 where a defect can be seen.
    """

    images: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]


def draw_material(seed: int, index: int, pieces: int) -> npt.NDArray[np.uint8]:
    """Pieces of one material, ``(pieces, PIECE, PIECE, 3)``; seed and index decide every pixel."""
    material = any_material(np.random.default_rng([seed, index]))
    drawn = [material(np.random.default_rng([seed, index, piece]), PIECE) for piece in range(pieces)]
    return np.rint(np.clip(np.stack(drawn), 0, 1) * 255).astype(np.uint8)


def draw_materials(path: Path, seed: int, count: int, pieces: int) -> None:
    """Draw so many materials into a file ``(count, pieces, PIECE, PIECE, 3)``, there only once it is complete."""
    shape = (count, pieces, PIECE, PIECE, 3)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        drawn = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        for index in tqdm(range(count), "Drawing materials"):
            drawn[index] = draw_material(seed, index, pieces)
        drawn.flush()
        part.replace(path)


def open_materials(path: Path, count: int, pieces: int) -> npt.NDArray[np.uint8]:
    """Materials in a file, not read before they are used.

    Raises:
        ValueError: If the file holds others than were asked for.
    """
    materials = np.load(path, mmap_mode="r")
    expected = (count, pieces, PIECE, PIECE, 3)
    if materials.shape != expected:
        msg = f"{path} holds materials of shape {materials.shape}, not {expected}: delete it to have them drawn again"
        raise ValueError(msg)
    return materials


class Look:
    """What all images of a pool share after the materials: colours, camera and light.

    Args:
        rng: Draws them.
    """

    def __init__(self, rng: Rng) -> None:
        self.is_grey = rng.random() < 0.35
        self.channels = rng.permutation(3)
        self.inverted = rng.random() < 0.3
        self.contrast, self.brightness = rng.uniform(0.35, 1.1), rng.uniform(-0.15, 0.15)
        self.flicker = rng.choice([0.0, 0.03, 0.08, 0.15])
        self.slope = rng.choice([0.0, 0.05, 0.15, 0.3])
        self.blur = rng.choice([0.0, 0.5, 0.8, 1.2])
        self.noise = rng.choice([0.003, 0.01, 0.02, 0.04])
        self.hotspot = rng.random() < 0.2

    def grade(self, picture: Picture) -> Picture:
        """The pool's colours."""
        picture = picture[..., self.channels]
        picture = 1 - picture if self.inverted else picture
        return (picture - 0.5) * self.contrast + 0.5 + self.brightness

    def light(self, rng: Rng, size: int) -> Picture:
        """Brightness of one image's places, ``(size, size, 1)``."""
        y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
        direction = self.slope * rng.normal(0, 0.6, 2)
        light = 1 + self.flicker * rng.standard_normal() + direction[0] * x + direction[1] * y
        if self.hotspot:
            centre = rng.uniform(-0.7, 0.7, 2)
            light = light + self.slope * np.exp(-3 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2))
        return np.clip(light, 0.3, 1.8)[..., None].astype(np.float32)

    def develop(self, picture: Picture) -> Picture:
        """The picture in the range and the colours that the camera can store."""
        if self.is_grey:
            picture = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
        return np.clip(picture, 0, 1).astype(np.float32)

    def expose(self, rng: Rng, picture: Picture) -> npt.NDArray[np.uint8]:
        """What the camera stores, in this image's light and with fresh noise."""
        picture = self.develop(picture) * self.light(rng, len(picture))
        if self.blur:
            picture = cv2.GaussianBlur(picture, (0, 0), float(self.blur))
        grain = rng.standard_normal(picture.shape[:2] if self.is_grey else picture.shape, dtype=np.float32)
        picture = picture + self.noise * (grain[..., None] if self.is_grey else grain)
        return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


class Product:
    """How the sound images of a pool come about.

    Args:
        rng: Draws the product.
        materials: ``(M, pieces, PIECE, PIECE, 3)``; it takes one each for itself, its ground and its defects.
        size: Side of the images.
    """

    def __init__(self, rng: Rng, materials: npt.NDArray[np.uint8], size: int) -> None:
        self.materials, self.size = materials, size
        self.skin, self.under, self.foreign = (int(index) for index in rng.integers(len(materials), size=3))
        self.first_piece = int(rng.integers(materials.shape[1]))
        self.zoom = rng.uniform(0.5, 1.0, 3)
        self.turns, self.flipped = int(rng.integers(4)), bool(rng.random() < 0.5)
        self.has_body = rng.random() < 0.55
        self.same_ground = rng.random() < 0.6
        self.plain_ground = rng.uniform(0, 1, 3).astype(np.float32) if rng.random() < 0.5 else None
        self.outline, self.radius = outline(rng), rng.uniform(0.25, 0.48)
        self.any_angle, self.tilt, self.drift = rng.random() < 0.35, rng.uniform(0, 0.15), rng.uniform(0, 0.05)
        self.same_skin = self.has_body and rng.random() < 0.35
        self.relief = rng.uniform(-0.5, 0.5) if rng.random() < 0.6 else 0.0
        self.shadow = rng.uniform(0, 0.6) if rng.random() < 0.5 else 0.0
        part_count = int(rng.integers(0, 4)) if self.has_body else 0
        self.parts = [self._part(rng) for _ in range(part_count)]
        # sound variation: so many marks of one kind, at random places of every image
        self.marks = int(rng.integers(3, 15)) if rng.random() < 0.3 else 0
        self.mark_outline, self.mark_radius = outline(rng), rng.uniform(0.015, 0.06)
        self.mark_colour = rng.uniform(0, 1, 3)

    @staticmethod
    def _part(rng: Rng) -> tuple[Picture, Picture, float, float, Picture]:
        """Outline, offset, radius (both over the product's), angle and colour of something on the product."""
        points, offset = outline(rng), rng.uniform(-0.5, 0.5, 2)
        return points, offset, rng.uniform(0.08, 0.35), rng.uniform(0, 6.3), rng.uniform(0, 1, 3)

    def piece(self, rng: Rng, material: int, image: int, zoom: float, fixed: bool = False) -> Picture:
        """One image's piece of a material, cut out at a random place."""
        side = int(zoom * PIECE)
        middle = [(PIECE - side) // 2] * 2
        top, left = middle if fixed else rng.integers(PIECE - side + 1, size=2)
        index = (self.first_piece + (0 if fixed else image)) % self.materials.shape[1]
        cut = self.materials[material, index, top : top + side, left : left + side]
        method = cv2.INTER_AREA if side > self.size else cv2.INTER_LINEAR
        picture = cv2.resize(cut, (self.size, self.size), interpolation=method)
        picture = np.rot90(picture, self.turns)
        return np.ascontiguousarray(picture[:, ::-1] if self.flipped else picture).astype(np.float32) / 255

    def scene(self, rng: Rng, image: int) -> Scene:
        """A sound image and what its defects may be made of."""
        size = self.size
        other = self.piece(rng, self.foreign, image, self.zoom[2])
        ground = self.piece(rng, self.under, image, self.zoom[1], fixed=self.same_ground)
        if self.plain_ground is not None:
            ground = np.broadcast_to(self.plain_ground, ground.shape).astype(np.float32)
        skin = self.piece(rng, self.skin, image, self.zoom[0], fixed=self.same_skin)
        if not self.has_body:
            picture, body = skin, np.ones((size, size), np.float32)
            self._mark(rng, picture, body)
            return Scene(picture, body, ground, other)
        angle = rng.uniform(0, 2 * np.pi) if self.any_angle else self.tilt * rng.standard_normal()
        centre = size * (0.5 + self.drift * rng.standard_normal(2))
        radius = self.radius * size * (1 + 0.03 * rng.standard_normal())
        if self.same_skin:  # what is printed on it moves with it
            turn: Picture = cv2.getRotationMatrix2D((size / 2, size / 2), float(np.rad2deg(-angle)), 1.0)
            turn[:, 2] += centre - size / 2
            skin = cv2.warpAffine(skin, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
        for points, offset, scale, own_angle, colour in self.parts:
            where = placed(points, centre + offset @ rotation(angle) * radius, scale * radius, own_angle + angle)
            cv2.fillPoly(skin, [where], colour.tolist(), cv2.LINE_AA, 4)
        body = np.zeros((size, size), np.float32)
        cv2.fillPoly(body, [placed(self.outline, centre, radius, angle)], 1.0, cv2.LINE_AA, 4)
        self._mark(rng, skin, body)
        if self.relief:
            depth = cv2.distanceTransform((body > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / radius
            skin = skin * (1 + self.relief * (np.sqrt(np.clip(depth, 0, 1)) - 0.7))[..., None]
        if self.shadow:
            shift = np.array([[1, 0, 0.06 * size], [0, 1, 0.04 * size]], np.float32)
            shade = cv2.GaussianBlur(cv2.warpAffine(body, shift, (size, size)), (0, 0), 0.03 * size)
            ground = ground * (1 - self.shadow * shade[..., None])
        alpha = body[..., None]
        return Scene(np.clip(skin * alpha + ground * (1 - alpha), 0, 1), body, ground, other)

    def _mark(self, rng: Rng, picture: Picture, body: Picture) -> None:
        rows, columns = np.nonzero(body > 0.5)
        for _ in range(self.marks if len(rows) else 0):
            index = rng.integers(len(rows))
            radius = self.mark_radius * self.size * rng.uniform(0.6, 1.4)
            where = placed(self.mark_outline, (columns[index], rows[index]), radius, rng.uniform(0, 6.3))
            cv2.fillPoly(picture, [where], self.mark_colour.tolist(), cv2.LINE_AA, 4)


def draw_pool(rng: Rng, materials: npt.NDArray[np.uint8], size: int, count: int, defective: int) -> Pool:
    """Draw one product's pool.

    Args:
        rng: Draws everything.
        materials: ``(M, pieces, PIECE, PIECE, 3)``; at least ``count`` pieces, or images share them.
        size: Side of the images.
        count: Images.
        defective: How many of them get a defect, the last ones; one that cannot be seen leaves its mask empty.
    """
    look, product = Look(rng), Product(rng, materials, size)
    kinds = [Defect(rng, product.has_body) for _ in range(int(rng.integers(1, 4)))]
    images, masks = np.empty((count, size, size, 3), np.uint8), np.zeros((count, size, size), np.uint8)
    for index in range(count):
        scene = product.scene(rng, index)
        sound = look.grade(scene.picture)
        scene = Scene(sound, scene.body, look.grade(scene.ground), look.grade(scene.other))
        for _ in range(TRIES if index >= count - defective else 0):
            kind = int(rng.integers(len(kinds)))
            damaged = look.develop(kinds[kind](rng, scene))
            masks[index] = visible_change(look.develop(sound), damaged, 0.03 + look.noise)
            if masks[index].sum() > LEAST_AREA * size**2:
                sound = damaged
                break
            kinds[kind] = Defect(rng, product.has_body)
            masks[index] = 0
        images[index] = look.expose(rng, sound)
    return Pool(images, masks)
