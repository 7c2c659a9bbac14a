# SPDX-License-Identifier: Apache-2.0
"""Fabric: a plain weave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from drawing import Array, Rng, blob, blur, noise, pixel_grid, ramp, slopes

PITCHES = 32.0  # threads across the image


@dataclass
class Yarns:
    """One family of parallel threads: what makes each differ from the next (tables indexed by the thread)."""

    shift: Array
    width: Array
    tone: Array
    phase: Array
    over: float  # 1 or -1: which crossings this family passes on top

    @classmethod
    def spin(cls, rng: Rng, over: float) -> Yarns:
        """Draw the threads of one family."""
        n = 64
        return cls(
            shift=rng.normal(0.0, 0.025, n),
            width=np.clip(rng.normal(0.95, 0.03, n), 0.86, 1.04),
            tone=rng.normal(1.0, 0.04, n),
            phase=rng.uniform(0.0, 2.0 * np.pi, n),
            over=over,
        )

    def lay(self, across: Array, along: Array) -> tuple[Array, Array]:
        """Height and brightness of the family at thread coordinates (in pitches)."""
        near = np.floor(across).astype(np.int64) % len(self.shift)
        across = across + 0.07 * np.sin(0.8 * along + self.phase[near])
        number = np.floor(across).astype(np.int64) % len(self.shift)
        slub = 1.0 + 0.06 * np.sin(0.45 * along + 2.0 * self.phase[number])
        f = 2.0 * (across - np.floor(across) - 0.5 - self.shift[number]) / (self.width[number] * slub)
        crimp = self.over * (1 - 2 * (number % 2)) * np.sin(np.pi * along)
        height = np.where(np.abs(f) < 1.0, 0.55 * np.sqrt(np.clip(1.0 - f * f, 0.0, 1.0)) + 0.45 * crimp, -1.5)
        twist = np.sin(2.0 * np.pi * (1.5 * along + 0.45 * f) + self.phase[number])
        return height, self.tone[number] * (1.0 + 0.07 * twist)


@dataclass
class Cloth:
    """A piece of cloth before it is lit; defects edit it."""

    u: Array  # thread coordinates in pitches: across the warp ...
    v: Array  # ... and across the weft
    warp: Yarns
    weft: Yarns
    warp_cut: Array  # above 0 the threads of that family are gone
    weft_cut: Array
    lift: Array  # extra height of the cloth, in pitches
    weft_lift: Array  # extra height of the weft alone
    dye: Array  # (h, w, 3) factor on the colour
    fibre: Array
    lamp: Array  # brightness of the light, uneven over the image
    light: tuple[float, float]


def weave(rng: Rng, size: int) -> Cloth:
    """Draw a piece of sound cloth."""
    x, y = pixel_grid(size)
    turn = rng.normal(0.0, 0.012)
    sway = 0.13 * noise(rng, size, 3), 0.13 * noise(rng, size, 3)
    u = PITCHES * (x * np.cos(turn) - y * np.sin(turn)) + rng.uniform(4.0, 24.0) + sway[0]
    v = PITCHES * (y * np.cos(turn) + x * np.sin(turn)) + rng.uniform(4.0, 24.0) + sway[1]
    slope = rng.normal(0.0, 0.03, 2)
    azimuth = rng.normal(-2.2, 0.06)
    nothing = np.zeros_like(x)
    return Cloth(
        u=u,
        v=v,
        warp=Yarns.spin(rng, 1.0),
        weft=Yarns.spin(rng, -1.0),
        warp_cut=nothing - 1.0,
        weft_cut=nothing - 1.0,
        lift=0.05 * noise(rng, size, 4),
        weft_lift=nothing.copy(),
        dye=np.ones((size, size, 3)),
        fibre=0.6 * noise(rng, size, size / 5) + 0.4 * noise(rng, size, size / 2.5),
        lamp=rng.normal(1.0, 0.015) + slope[0] * (x - 0.5) + slope[1] * (y - 0.5),
        light=(float(np.cos(azimuth)), float(np.sin(azimuth))),
    )


def light_cloth(cloth: Cloth) -> Array:
    """Photograph a piece of cloth: linear RGB (size, size, 3)."""
    size = len(cloth.u)
    warp, warp_tone = cloth.warp.lay(cloth.u, cloth.v)
    weft, weft_tone = cloth.weft.lay(cloth.v, cloth.u)
    warp = np.where(cloth.warp_cut > 0.0, -1.5, warp)
    weft = np.where(cloth.weft_cut > 0.0, -1.5, weft + cloth.weft_lift)
    top = np.maximum(warp, weft)
    height = np.where(top > -1.4, top + cloth.lift, -1.5)
    pitch = size / PITCHES
    height = blur(height, 0.07 * pitch)
    right, down = slopes(height / PITCHES)
    facing = -(cloth.light[0] * right + cloth.light[1] * down)
    upright = 1.0 / np.sqrt(1.0 + right**2 + down**2)
    # a point is dark when it lies lower than what surrounds it: threads shade the gaps between them
    open_sky = np.clip(0.75 + 0.42 * (height - blur(height, 0.45 * pitch)), 0.12, 1.25)
    shade = open_sky * (0.35 + upright * np.clip(0.62 + 0.42 * facing, 0.0, 2.0))
    linen = np.where((warp >= weft)[..., None], np.array([0.47, 0.40, 0.29]), np.array([0.52, 0.45, 0.34]))
    tone = np.where(warp >= weft, warp_tone, weft_tone) * (1.0 + 0.09 * cloth.fibre)
    backing = np.array([0.030, 0.031, 0.036]) * (1.0 + 0.1 * cloth.fibre[..., None])
    threads = linen * cloth.dye * tone[..., None]
    thread = ramp(-1.35, -0.9, height)[..., None]
    return (threads * thread + backing * (1.0 - thread)) * (shade * cloth.lamp)[..., None]


def _spot(rng: Rng, cloth: Cloth, margin: float) -> tuple[Array, Array]:
    """Thread coordinates around a random point at least ``margin`` of the image from its border."""
    row, column = (int(rng.uniform(margin, 1.0 - margin) * len(cloth.u)) for _ in range(2))
    return cloth.u - cloth.u[row, column], cloth.v - cloth.v[row, column]


def _tear(rng: Rng, cloth: Cloth, distance: Array, fray: float) -> None:
    """Cut both families where ``distance`` (in pitches) is negative, every thread at a length of its own."""
    ends = rng.normal(0.0, fray, (2, 64))
    cloth.warp_cut = np.maximum(cloth.warp_cut, -distance + ends[0][np.floor(cloth.u).astype(np.int64) % 64])
    cloth.weft_cut = np.maximum(cloth.weft_cut, -distance + ends[1][np.floor(cloth.v).astype(np.int64) % 64])


def fabric_hole(rng: Rng, cloth: Cloth) -> None:
    """A worn hole with frayed edges."""
    u, v = _spot(rng, cloth, 0.18)
    distance = blob(rng, u, v, rng.uniform(1.6, 3.0), rng.uniform(1.0, 1.6))
    _tear(rng, cloth, distance, 0.4)
    cloth.lift += 0.5 * np.exp(-((distance / 0.9) ** 2)) * (distance > 0)


def fabric_stain(rng: Rng, cloth: Cloth) -> None:
    """Oil that crept along the threads, darker where its edge dried."""
    u, v = _spot(rng, cloth, 0.2)
    size = len(u)
    creep = 0.35 * noise(rng, size, PITCHES / 2)
    distance = blob(rng, u, v, rng.uniform(2.0, 4.4), rng.uniform(1.0, 1.8)) + creep
    wet = ramp(0.35, -0.35, distance)
    rim = np.exp(-(((distance + 0.3) / 0.4) ** 2))
    strength = rng.uniform(0.75, 1.0) * wet * (0.75 + 0.4 * rim + 0.08 * noise(rng, size, 10))
    brown = np.array([0.62, 0.74, 0.86]) * rng.uniform(0.9, 1.05)
    cloth.dye *= 1.0 - np.clip(strength, 0.0, 0.95)[..., None] * brown


def fabric_thread(rng: Rng, cloth: Cloth) -> None:
    """A weft thread that is missing for a stretch, or one that floats above the warp."""
    u, v = _spot(rng, cloth, 0.3)
    first = np.floor(cloth.v[np.unravel_index(np.argmin(u * u + v * v), u.shape)])
    row = (np.floor(cloth.v) >= first) & (np.floor(cloth.v) < first + rng.integers(1, 3))
    reach = rng.uniform(5.0, 9.0)
    stretch = ramp(reach + 0.6, reach - 0.6, np.abs(u))
    if rng.random() < 0.5:
        cloth.weft_cut = np.where(row, 2.0 * stretch - 1.0, cloth.weft_cut)
    else:
        cloth.weft_lift += row * stretch * 1.3
        cloth.dye *= 1.0 + 0.3 * (row * stretch)[..., None]


def fabric_cut(rng: Rng, cloth: Cloth) -> None:
    """A slit from a blade: both families end along a line, its lips gape and stand up."""
    u, v = _spot(rng, cloth, 0.25)
    turn, half, gape = rng.uniform(0.0, np.pi), rng.uniform(3.0, 6.0), rng.uniform(0.40, 0.80)
    along, beside = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    beside = beside - 0.03 * along**2 * rng.uniform(-1.0, 1.0)
    lens = gape * np.clip(1.0 - (along / half) ** 2, 0.0, None)
    inside = np.abs(along) < half
    _tear(rng, cloth, np.where(inside, np.abs(beside) - lens, 1.0), 0.05)
    lip = np.exp(-(((np.abs(beside) - lens) / 0.45) ** 2)) * np.sqrt(lens / gape)
    cloth.lift += 0.55 * lip
