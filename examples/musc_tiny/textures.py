# SPDX-License-Identifier: Apache-2.0
"""Kinds of surface: every function draws the parameters of one material and returns how to draw pieces of it.

Pieces of one material differ as two pieces of one cloth do: same threads, other places. All pictures are RGB,
``(size, size, 3)``, float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[Any]
Rng = np.random.Generator
Material = Callable[[Rng, int], Picture]


def palette(rng: Rng, count: int) -> Picture:
    """Colours that go together, ``(count, 3)``: around one base colour, or far apart."""
    base = rng.uniform(0.1, 0.9, 3)
    base = rng.choice([0.0, 0.3, 1.0]) * (base - base.mean()) + base.mean()
    spread = rng.choice([0.05, 0.12, 0.25, 0.45])
    lightness = rng.normal(0.0, spread, (count, 1))
    tint = rng.normal(0.0, spread * rng.choice([0.0, 0.3, 0.8]), (count, 3))
    return np.clip(base + lightness + tint, 0.0, 1.0).astype(np.float32)


def colourise(field: Picture, colours: Picture) -> Picture:
    """Colours along a field ``(size, size)``, whose values are ranked softly into [0, 1]."""
    spread = 4.0 * float(field.std()) + 1e-6
    position = np.clip((field - field.mean()) / spread + 0.5, 0.0, 1.0) * (len(colours) - 1)
    stops = np.arange(len(colours))
    return np.stack([np.interp(position, stops, channel) for channel in colours.T], axis=-1).astype(np.float32)


def spectral_noise(rng: Rng, size: int, exponent: float, stretch: float = 1.0, angle: float = 0.0) -> Picture:
    """Gaussian noise of power 1 / f^exponent, ``(size, size)``, unit variance; stretched along an angle."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    frequency = np.hypot(along * stretch, across) + 1.0 / size
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * frequency ** (-exponent / 2.0)
    spectrum[0, 0] = 0.0
    noise = np.fft.irfft2(spectrum, s=(size, size))
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def band_noise(rng: Rng, size: int, wavelength: float, width: float) -> Picture:
    """Gaussian noise around one wavelength in pixels, ``(size, size)``, unit variance."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    frequency = np.hypot(fx, fy)
    window = np.exp(-0.5 * ((frequency * wavelength - 1.0) / width) ** 2)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * window, s=(size, size))
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def coordinates(rng: Rng, size: int, angle: float) -> tuple[Picture, Picture]:
    """Pixel coordinates turned by an angle, at a random place."""
    y, x = np.mgrid[:size, :size].astype(np.float32) + rng.uniform(0, 1000, (2, 1, 1)).astype(np.float32)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def plain(rng: Rng) -> Material:
    """A plain coat: one colour with faint clouds and grain."""
    colours = palette(rng, 1)[0]
    clouds, grain, exponent = rng.uniform(0, 0.06), rng.choice([0.0, 0.01, 0.03, 0.06]), rng.uniform(1.5, 3.5)

    def draw(rng: Rng, size: int) -> Picture:
        shade = clouds * spectral_noise(rng, size, exponent) + grain * rng.standard_normal((size, size))
        return np.clip(colours + shade[..., None], 0, 1).astype(np.float32)

    return draw


def clouded(rng: Rng) -> Material:
    """Clouds of any roughness, from mist to sand; stretched, it is brushed metal or wood grain."""
    colours = palette(rng, int(rng.integers(2, 6)))
    exponent, angle = rng.uniform(0.0, 4.0), rng.uniform(0, np.pi)
    stretch = float(rng.choice([1.0, 1.0, 3.0, 10.0, 40.0]))

    def draw(rng: Rng, size: int) -> Picture:
        return colourise(spectral_noise(rng, size, exponent, stretch, angle), colours)

    return draw


def marbled(rng: Rng) -> Material:
    """Stripes bent by clouds: marble, wood, corduroy."""
    colours = palette(rng, int(rng.integers(2, 5)))
    angle, period, bend = rng.uniform(0, np.pi), rng.uniform(5, 50), rng.choice([0.0, 0.3, 1.0, 4.0])
    exponent, sharpness = rng.uniform(2.0, 4.0), rng.uniform(0.5, 4.0)

    def draw(rng: Rng, size: int) -> Picture:
        u, _ = coordinates(rng, size, angle)
        phase = 2 * np.pi * u / period + bend * spectral_noise(rng, size, exponent)
        return colourise(np.tanh(sharpness * np.sin(phase)).astype(np.float32), colours)

    return draw


def spotted(rng: Rng) -> Material:
    """Spots or labyrinths of one wavelength: leather, hammered metal, granite, cork."""
    colours = palette(rng, int(rng.integers(2, 5)))
    wavelength, width = rng.uniform(4, 30), rng.uniform(0.1, 0.5)
    sharpness, bias = rng.uniform(0.5, 5.0), rng.uniform(-1.2, 1.2)

    def draw(rng: Rng, size: int) -> Picture:
        return colourise(np.tanh(sharpness * (band_noise(rng, size, wavelength, width) - bias)), colours)

    return draw


def woven(rng: Rng) -> Material:
    """A weave of two threads: plain, twill or satin."""
    colours = palette(rng, 2)
    pitch, angle, shift = rng.uniform(4, 16), rng.uniform(0, np.pi), int(rng.integers(1, 4))
    repeat, wander, fuzz = int(rng.integers(2, 6)), rng.uniform(0, 0.15), rng.uniform(0, 0.08)

    def draw(rng: Rng, size: int) -> Picture:
        u, v = coordinates(rng, size, angle)
        u = u / pitch + wander * spectral_noise(rng, size, 3.0)
        v = v / pitch + wander * spectral_noise(rng, size, 3.0)
        warp_on_top = (np.floor(u) + shift * np.floor(v)) % repeat < max(repeat // 2, 1)
        height = np.where(warp_on_top, np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1)))
        cloth = np.where(warp_on_top[..., None], colours[0], colours[1]) * (0.45 + 0.55 * height[..., None])
        return np.clip(cloth + fuzz * rng.standard_normal((size, size, 1)), 0, 1).astype(np.float32)

    return draw


def celled(rng: Rng) -> Material:
    """Cells around scattered seeds: cobbles, crackle, scales, foam, crystal grain."""
    colours = palette(rng, int(rng.integers(2, 7)))
    pitch, disorder = rng.uniform(6, 40), rng.choice([0.1, 0.4, 1.0])
    joint, fill, dome = rng.uniform(0, 0.3), rng.uniform(0, 1), rng.uniform(-0.6, 0.6)

    def draw(rng: Rng, size: int) -> Picture:
        places = np.mgrid[-1 : size / pitch + 1, -1 : size / pitch + 1].reshape(2, -1).T
        places = (places + disorder * rng.uniform(-0.6, 0.6, places.shape) + rng.uniform(0, 1, 2)) * pitch
        inside = np.clip(np.rint(places), 0, size - 1).astype(int)
        seeds = np.ones((size, size), np.uint8)
        seeds[inside[:, 0], inside[:, 1]] = 0
        distance, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        owners = rng.integers(0, len(colours), int(np.max(label)) + 1)
        cells = colours[0] * (1 - fill) + colours[owners[label]] * fill
        cells = cells * (1 - dome * np.clip(distance / pitch, 0, 1))[..., None]
        edge = cv2.morphologyEx(label.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        line = cv2.GaussianBlur(edge.astype(np.float32), (0, 0), 0.6 + joint * 3)
        line = np.clip(line * (2 if joint > 0.1 else 0.8), 0, 1)[..., None]
        return np.clip(cells * (1 - line) + colours[-1] * line, 0, 1).astype(np.float32)

    return draw


def outline(rng: Rng) -> Picture:
    """A closed outline around the origin, ``(K, 2)``, radius about 1: polygons, stars, gears, blobs, rectangles."""
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    kind = rng.integers(5)
    if kind == 0:
        radius = np.ones_like(turn)
    elif kind == 1:  # superformula (Gielis 2003)
        lobes, power = rng.integers(2, 10), rng.uniform(0.4, 6.0, 3)
        wave = np.abs(np.cos(lobes * turn / 4)) ** power[1] + np.abs(np.sin(lobes * turn / 4)) ** power[2]
        radius = np.clip(wave, 1e-3, None) ** (-1 / power[0])
    elif kind == 2:
        radius = 1.0 + 0.15 * np.tanh(4 * np.sin(rng.integers(3, 16) * turn))
    elif kind == 3:
        waves = rng.normal(0, 0.12, (5, 2)) / np.arange(1, 6)[:, None]
        radius = 1.0 + sum(a * np.cos(k * turn) + b * np.sin(k * turn) for k, (a, b) in enumerate(waves, 2))
    else:
        sides = rng.integers(3, 8)
        radius = np.cos(np.pi / sides) / np.cos(turn % (2 * np.pi / sides) - np.pi / sides)
    radius = radius / np.abs(radius).max()
    points = np.stack([radius * np.cos(turn), radius * np.sin(turn) * rng.uniform(0.4, 1.0)], axis=1)
    return points.astype(np.float32)


def rotation(angle: float) -> Picture:
    """What rows of points (x, y) are multiplied with to turn them, ``(2, 2)``."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def placed(points: Picture, centre: npt.ArrayLike, radius: float, angle: float) -> npt.NDArray[np.int32]:
    """Outline in pixels with four fractional bits, for OpenCV's drawing functions."""
    return np.rint((points @ rotation(angle) * radius + np.asarray(centre)) * 16).astype(np.int32)


def leaves(rng: Rng) -> Material:
    """Dead leaves (Lee, Mumford and Huang 2001): shapes of all sizes that cover each other."""
    colours, shape = palette(rng, int(rng.integers(2, 12))), [outline(rng) for _ in range(int(rng.integers(1, 4)))]
    smallest, largest = rng.uniform(1.5, 6), rng.uniform(10, 50)
    upright, rim, cover = rng.random() < 0.3, rng.random() < 0.3, rng.uniform(0.5, 4.0)

    def draw(rng: Rng, size: int) -> Picture:
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = colours[0]
        mean_area = smallest * largest * 2.0
        for _ in range(int(min(cover * size * size / mean_area, 500))):
            radius = 1.0 / np.sqrt(rng.uniform(1 / largest**2, 1 / smallest**2))
            points = placed(
                shape[rng.integers(len(shape))],
                rng.uniform(0, size, 2),
                radius,
                0.0 if upright else rng.uniform(0, 2 * np.pi),
            )
            colour = colours[rng.integers(len(colours))] * rng.uniform(0.85, 1.0)
            cv2.fillPoly(canvas, [points], colour.tolist(), cv2.LINE_AA, 4)
            if rim:
                cv2.polylines(canvas, [points], True, (colour * 0.6).tolist(), 1, cv2.LINE_AA, 4)
        return np.clip(canvas, 0, 1)

    return draw


def printed(rng: Rng) -> Material:
    """One motif printed on a lattice: foil, wallpaper, perforated sheet, printed circuit, keyboard."""
    colours, pitch = palette(rng, 5), rng.uniform(12, 60, 2)
    motif = [(outline(rng), rng.uniform(-0.3, 0.3, 2), rng.uniform(0.1, 0.5), rng.uniform(0, 6.3)) for _ in range(3)]
    brick, slant, jitter = rng.choice([0.0, 0.5]), rng.uniform(-0.3, 0.3), rng.choice([0.0, 0.0, 0.08])
    parts = int(rng.integers(1, 4))

    def draw(rng: Rng, size: int) -> Picture:
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = colours[0]
        turn = rotation(slant)
        reach = int(1.5 * size / np.min(pitch)) + 2
        start = rng.uniform(0, 1, 2)
        for row in range(-2, reach):
            for column in range(-reach // 2, reach):
                cell = np.array([column + brick * (row % 2), row]) + start + jitter * rng.standard_normal(2)
                middle = (cell * pitch) @ turn
                if np.all(np.abs(middle - size / 2) < size / 2 + np.max(pitch)):
                    for index, (points, offset, radius, angle) in enumerate(motif[:parts]):
                        where = placed(points, middle + offset * pitch @ turn, radius * np.min(pitch), angle + slant)
                        cv2.fillPoly(canvas, [where], colours[1 + index].tolist(), cv2.LINE_AA, 4)
        return canvas

    return draw


def fibrous(rng: Rng) -> Material:
    """Fibres, hairs or scratches on a ground: paper, felt, ground metal."""
    colours, length = palette(rng, 5), rng.uniform(6, 80)
    curl, spread, angle = rng.choice([0.0, 0.1, 0.4]), rng.choice([0.02, 0.3, 3.0]), rng.uniform(0, np.pi)
    density, ground = rng.uniform(0.02, 0.2), clouded(rng)

    def draw(rng: Rng, size: int) -> Picture:
        canvas = np.ascontiguousarray(ground(rng, size) * 0.4 + colours[0] * 0.6)
        for _ in range(int(min(density * size * size / length, 600))):
            heading = angle + spread * rng.standard_normal() + np.cumsum(curl * rng.standard_normal(8))
            steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * length / 8
            points = np.rint((np.cumsum(steps, axis=0) + rng.uniform(-10, size + 10, 2)) * 16).astype(np.int32)
            cv2.polylines(canvas, [points], False, colours[rng.integers(1, 5)].tolist(), 1, cv2.LINE_AA, 4)
        return canvas.astype(np.float32)

    return draw


def fractal(rng: Rng) -> Material:
    """The attractor of random affine maps (as FractalDB draws them, Kataoka et al. 2020), scattered on a ground."""
    colours = palette(rng, 3)
    maps = rng.uniform(-1, 1, (int(rng.integers(2, 6)), 2, 3))
    maps[:, :, :2] *= 0.9 / np.linalg.norm(maps[:, :, :2], ord=2, axis=(1, 2), keepdims=True)
    scale, copies = rng.uniform(0.1, 0.5), int(rng.integers(1, 10))

    def draw(rng: Rng, size: int) -> Picture:
        points = rng.uniform(-1, 1, (4000, 2))
        cloud = []
        for step in range(18):
            chosen = maps[rng.integers(len(maps), size=len(points))]
            points = np.einsum("nij,nj->ni", chosen[:, :, :2], points) + chosen[:, :, 2]
            if step >= 12:
                cloud.append(points)
        leaf = np.concatenate(cloud)
        leaf = (leaf - leaf.mean(axis=0)) / (np.abs(leaf - leaf.mean(axis=0)).max() + 1e-6)
        density = np.zeros((size, size), np.float32)
        for _ in range(copies):
            turn = rotation(rng.uniform(0, 2 * np.pi))
            where = ((leaf @ turn) * scale * size * rng.uniform(0.6, 1) + rng.uniform(0, size, 2)).astype(int)
            where = where[np.all((where >= 0) & (where < size), axis=1)]
            np.add.at(density, (where[:, 1], where[:, 0]), 1.0)
        alpha = 1 - np.exp(-cv2.GaussianBlur(density, (0, 0), 0.7))[..., None]
        return (colours[0] * (1 - alpha) + (colours[1] * (1 - alpha) + colours[2] * alpha) * alpha).astype(np.float32)

    return draw


def shaded(rng: Rng) -> Material:
    """A random smooth function of place and noise, as of a small network of sines: pictures of no known kind."""
    colours, width = palette(rng, int(rng.integers(2, 6))), 8
    first, second = rng.normal(0, rng.uniform(0.5, 2.0), (4, width)), rng.normal(0, 1.0, (width, width))
    last, angle, period = rng.normal(0, 1.0, width), rng.uniform(0, np.pi), rng.uniform(10, 80)
    exponent = rng.uniform(2.0, 4.0)

    def draw(rng: Rng, size: int) -> Picture:
        u, v = coordinates(rng, size, angle)
        waves = [np.sin(2 * np.pi * u / period), np.cos(2 * np.pi * v / period)]
        noise = [spectral_noise(rng, size, exponent), spectral_noise(rng, size, exponent)]
        inputs = np.stack([*waves, *noise], axis=-1).astype(np.float32)
        hidden = np.sin(inputs @ first.astype(np.float32))
        hidden = np.sin(hidden @ second.astype(np.float32))
        return colourise(hidden @ last.astype(np.float32), colours)

    return draw


def written(rng: Rng) -> Material:
    """Rows of strokes: print, engraving, bar codes."""
    colours, height = palette(rng, 3), rng.uniform(8, 30)
    glyphs = [rng.uniform(0, 1, (int(rng.integers(3, 7)), 2)) for _ in range(int(rng.integers(2, 20)))]
    aspect, thickness, slope = rng.uniform(0.3, 1.0), int(rng.integers(1, 4)), rng.uniform(-0.4, 0.4)

    def draw(rng: Rng, size: int) -> Picture:
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = colours[0]
        start = rng.uniform(-height, 0, 2)
        for row in np.arange(start[0] - size / 2, size * 1.5, height * 1.4):
            for column in np.arange(start[1], size, height * aspect * 1.2):
                if rng.random() < 0.9:
                    strokes = glyphs[rng.integers(len(glyphs))] * [height * aspect, height]
                    points = np.rint((strokes + np.array([column, row + slope * column])) * 16).astype(np.int32)
                    colour = colours[1 + int(rng.random() < 0.1)].tolist()
                    cv2.polylines(canvas, [points], False, colour, thickness, cv2.LINE_AA, 4)
        return canvas

    return draw


SIMPLE = (plain, clouded, marbled, spotted, woven, celled, leaves, printed, fibrous, fractal, shaded, written)


def mixed(rng: Rng) -> Material:
    """Two materials: one veiled by the other, or each where a pattern of spots says."""
    one, other = (SIMPLE[rng.integers(len(SIMPLE))](rng) for _ in range(2))
    veil, wavelength, by_spots = rng.uniform(0.15, 0.6), rng.uniform(10, 60), rng.random() < 0.5

    def draw(rng: Rng, size: int) -> Picture:
        spots = 1 / (1 + np.exp(-4 * band_noise(rng, size, wavelength, 0.4)))[..., None] if by_spots else None
        alpha = veil if spots is None else spots
        return (one(rng, size) * (1 - alpha) + other(rng, size) * alpha).astype(np.float32)

    return draw


def any_material(rng: Rng) -> Material:
    """One material of any kind, plain and mixed ones more often than others."""
    kinds = (*SIMPLE, plain, mixed, mixed, mixed)
    return kinds[rng.integers(len(kinds))](rng)
