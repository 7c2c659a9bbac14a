# SPDX-License-Identifier: Apache-2.0
"""Gear: turned steel on a belt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from drawing import Array, Rng, blob, blur, line, noise, pixel_grid, ramp, slopes, walk

TEETH = 22
ROOT, TOOTH = 0.340, 0.030  # mean radius of the toothing and half a tooth's depth
RIM, HUB, BORE = 0.265, 0.135, 0.068


@dataclass
class Part:
    """A part on the belt before it is lit; defects edit it."""

    x: Array  # in the part's own frame: the origin is its centre
    y: Array
    solid: Array  # depth inside the part's outline, negative outside
    relief: Array  # height of the surface where it is solid
    finish: Array  # brightness of the machined surface
    rough: Array  # 0 machined, 1 broken
    paint: Array  # (h, w, 3) colour of what lies on the part
    cover: Array  # how much of it
    gloss: Array  # height of a wet film
    belt: Array
    lamp: Array
    light: tuple[float, float]


def _outline(x: Array, y: Array, radius: Array) -> Array:
    """Depth inside the gear's outline: teeth, bore with its keyway, five round windows in the web."""
    angle = np.arctan2(y, x)
    flank = np.tanh(2.0 * np.cos(TEETH * angle))
    slope = TOOTH * (1.0 - flank**2) * 2.0 * TEETH * np.sin(TEETH * angle) / np.maximum(radius, 0.05)
    teeth = (ROOT + TOOTH * flank - radius) / np.sqrt(1.0 + slope**2)
    keyway = np.maximum(np.abs(x) - 0.018, np.abs(y + BORE) - 0.026)
    depth = np.minimum(teeth, np.minimum(radius - BORE, keyway))
    for k in range(5):
        turn = 2.0 * np.pi * (k + 0.5) / 5.0 + np.pi / 2.0
        centre = 0.5 * (RIM + HUB)
        depth = np.minimum(depth, np.hypot(x - centre * np.cos(turn), y - centre * np.sin(turn)) - 0.036)
    return depth


def _belt(rng: Rng, x: Array, y: Array) -> Array:
    """Brightness of a fine-ribbed belt that has seen some use."""
    size = len(x)
    phase = rng.uniform(0.0, 2.0 * np.pi, 2)
    ribs = np.sin(2.0 * np.pi * 56.0 * (x + y) + phase[0]) * np.sin(2.0 * np.pi * 56.0 * (x - y) + phase[1])
    wear = 0.03 * noise(rng, size, 5) + 0.04 * noise(rng, size, 60, 8) + 0.08 * noise(rng, size, size / 4)
    return 1.0 + 0.16 * ribs + wear


def place_part(rng: Rng, size: int) -> Part:
    """Draw a sound gear, put down almost the same way each time."""
    image_x, image_y = pixel_grid(size)
    turn, offset = rng.normal(0.0, 0.010), rng.normal(0.5, 0.003, 2)
    x = (image_x - offset[0]) * np.cos(turn) + (image_y - offset[1]) * np.sin(turn)
    y = (image_y - offset[1]) * np.cos(turn) - (image_x - offset[0]) * np.sin(turn)
    radius = np.hypot(x, y)
    web = ramp(HUB, HUB + 0.012, radius) * ramp(RIM, RIM - 0.012, radius)
    rings = np.interp(radius, np.linspace(0.0, 0.75, 400), rng.standard_normal(400))
    # turning marks are strong on the faces; the web was cast and only blasted
    blasted = 0.6 * noise(rng, size, size / 5) + 0.5 * noise(rng, size, size / 12)
    finish = (1.0 - web) * (0.07 * rings + 0.02 * blasted) + web * 0.05 * blasted + 0.02 * noise(rng, size, 6)
    slope, azimuth = rng.normal(0.0, 0.03, 2), rng.normal(-2.25, 0.04)
    nothing = np.zeros_like(x)
    return Part(
        x=x,
        y=y,
        solid=_outline(x, y, radius),
        relief=1.0 - 0.35 * web,
        finish=1.0 + finish,
        rough=nothing.copy(),
        paint=np.zeros((size, size, 3)),
        cover=nothing.copy(),
        gloss=nothing.copy(),
        belt=_belt(rng, image_x, image_y),
        lamp=rng.normal(1.0, 0.015) + slope[0] * (image_x - 0.5) + slope[1] * (image_y - 0.5),
        light=(float(np.cos(azimuth)), float(np.sin(azimuth))),
    )


def _shadow(part: Part, solid: Array) -> Array:
    """Light that reaches the belt beside the part: a soft cast shadow and the darkness right under its edge."""
    size = len(solid)
    shift = tuple(round(-0.022 * size * part.light[axis]) for axis in (1, 0))
    cast = blur(np.roll(solid, shift, axis=(0, 1)), 0.011 * size)
    return (1.0 - 0.62 * cast) * (1.0 - 0.45 * blur(solid, 0.02 * size))


def light_part(part: Part) -> Array:
    """Photograph a part: linear RGB (size, size, 3)."""
    solid = ramp(-0.002, 0.002, part.solid)
    height = 0.022 * part.relief * ramp(0.0, 0.010, part.solid)
    right, down = slopes(height)
    facing = -(part.light[0] * right + part.light[1] * down)
    steep = right**2 + down**2
    # grooves round the axis spread the lamp's reflection into a bow-tie that points at the lamp
    radius = np.maximum(np.hypot(part.x, part.y), 1e-3)
    towards = (part.x * part.light[0] + part.y * part.light[1]) / radius
    bow = (0.55 * np.clip(towards, 0, 1) ** 5 + 0.42 * np.clip(-towards, 0, 1) ** 5) * (1.0 - part.rough)
    flat = np.exp(-1.6 * steep)
    lit = 0.24 + flat * (0.05 + 0.40 * bow) + 0.26 * np.clip(facing, -0.6, 1.6) * (1.0 - flat)
    occluded = np.clip(1.0 + 14.0 * (height - blur(height, 0.012 * len(height))), 0.55, 1.1)
    steel = (lit * occluded * part.finish)[..., None] * np.array([0.97, 1.0, 1.04])
    wet = slopes(part.gloss)
    glint = np.exp(-14.0 * ((wet[0] - 0.45 * part.light[0]) ** 2 + (wet[1] - 0.45 * part.light[1]) ** 2)) * part.cover
    cover = part.cover[..., None]
    steel = steel * (1.0 - cover) + part.paint * cover + 0.35 * (glint * (part.gloss > 0))[..., None]
    belt = (part.belt * _shadow(part, solid))[..., None] * np.array([0.048, 0.066, 0.070])
    return (steel * solid[..., None] + belt * (1.0 - solid[..., None])) * part.lamp[..., None]


def gear_scratch(rng: Rng, part: Part) -> None:
    """Two to four neighbouring scratches over the rim or the web."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    start = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(0.23, 0.31)
    heading, length = angle + np.pi / 2.0 + rng.normal(0.0, 0.5), rng.uniform(0.20, 0.34)
    across = np.array([-np.sin(heading), np.cos(heading)])
    for k in range(rng.integers(2, 5)):
        begin = start + k * 0.019 * across + rng.normal(0.0, 0.006, 2)
        points = walk(rng, (begin[0], begin[1]), heading + rng.normal(0.0, 0.04), length, 0.03, 10)
        distance, position = line(part.x, part.y, points)
        width = rng.uniform(0.0038, 0.0058) * np.sin(np.pi * np.clip(position, 0.04, 0.96)) ** 0.4
        groove = np.exp(-((distance / width) ** 2)) * ramp(0.006, 0.012, part.solid)
        part.finish += 1.1 * groove
        part.relief -= 0.30 * np.exp(-(((distance - 0.6 * width) / width) ** 2))
        length *= rng.uniform(0.6, 0.9)


def gear_chip(rng: Rng, part: Part) -> None:
    """A tooth that broke off, its neighbour sometimes hurt too: a rough slope is left."""
    tooth = 2.0 * np.pi * rng.integers(TEETH) / TEETH + rng.normal(0.0, 0.04)
    where = ROOT + TOOTH + rng.uniform(-0.004, 0.004)
    x, y = part.x - where * np.cos(tooth), part.y - where * np.sin(tooth)
    jagged = 0.0035 * noise(rng, len(x), 60)
    distance = blob(rng, x, y, rng.uniform(0.070, 0.110)) + jagged
    ledge = rng.uniform(0.016, 0.030)
    part.rough = ramp(0.001, -0.001, distance) * (part.solid > 0)
    part.finish = np.where(distance < 0, 0.62 + 0.2 * noise(rng, len(x), 110), part.finish)
    part.relief -= part.rough * np.clip(0.35 - 20.0 * distance + 0.10 * noise(rng, len(x), 70), 0.0, 0.8)
    part.solid = np.minimum(part.solid, distance + ledge)


def gear_contamination(rng: Rng, part: Part) -> None:
    """Grease and dirt: a dark, wet smear with a few splashes."""
    angle, radius = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.14, 0.30)
    x, y = part.x - radius * np.cos(angle), part.y - radius * np.sin(angle)
    size = len(x)
    distance = blob(rng, x, y, rng.uniform(0.034, 0.072), rng.uniform(1.0, 2.2))
    for _ in range(rng.integers(2, 6)):
        dx, dy = rng.normal(0.0, 0.055, 2)
        distance = np.minimum(distance, blob(rng, x - dx, y - dy, rng.uniform(0.004, 0.010)))
    distance += 0.0025 * noise(rng, size, 45)
    depth = np.clip(-distance, 0.0, 0.02)
    part.cover = ramp(0.002, -0.003, distance) * np.clip(0.66 + 14.0 * depth, 0.0, 0.95) * (part.solid > 0)
    part.gloss = (0.9 * depth + 0.0012 * noise(rng, size, 24) * (depth > 0.004)) * (part.solid > 0)
    part.paint += np.array([0.055, 0.034, 0.018]) * (1.0 + 0.25 * noise(rng, size, 30))[..., None]


def gear_crack(rng: Rng, part: Part) -> None:
    """A crack that runs outwards from the bore or inwards from the toothing, and forks."""
    angle = 2.0 * np.pi * (rng.integers(TEETH) + 0.5) / TEETH  # between two teeth, where a gear is weakest
    outwards = rng.random() < 0.5
    start = (BORE if outwards else ROOT - TOOTH) * np.array([np.cos(angle), np.sin(angle)])
    heading = angle + (0.0 if outwards else np.pi) + rng.normal(0.0, 0.35)
    trunk = walk(rng, (start[0], start[1]), heading, rng.uniform(0.15, 0.24), 0.60, 14)
    fork = trunk[rng.integers(6, 11)]
    branch = walk(rng, (fork[0], fork[1]), heading + rng.choice([-0.7, 0.7]), rng.uniform(0.04, 0.09), 0.55, 7)
    for points, wide in ((trunk, rng.uniform(0.0080, 0.0115)), (branch, 0.0060)):
        distance, position = line(part.x, part.y, points)
        width = wide * (1.0 - 0.75 * position)
        gap = ramp(1.3, 0.5, distance / width)
        part.finish *= 1.0 - 0.85 * gap
        part.relief -= 0.25 * np.exp(-((distance / (1.6 * width)) ** 2))
