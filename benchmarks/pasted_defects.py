# SPDX-License-Identifier: Apache-2.0
"""One and the same defect, pasted into many photographs: a scratch, a stain, a printed mark or a dull spot."""

from collections.abc import Callable

import cv2
import numpy as np

Draw = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def scratch(image: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is seen in the place of an image ``(H, W, 3)``, and how much of it, ``(H, W)``: a thin dark line."""
    height, width = image.shape[:2]
    points = (np.array([[0.40, 0.42], [0.47, 0.52], [0.52, 0.50], [0.60, 0.61]]) + shift) * [width, height]
    alpha = np.zeros((height, width), np.float32)
    cv2.polylines(alpha, [points.astype(np.int32)], False, 0.8, max(2, width // 120), cv2.LINE_AA)
    return np.full_like(image, 32), alpha


def stain(image: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likewise a soft brown spot, a seventh of the image wide."""
    distance = _distance(image, shift, (0.07, 0.05))
    return np.full_like(image, (60, 45, 30)), 0.6 * _inside(distance, 8)


def mark(image: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likewise two printed characters, light on dark and dark on light."""
    height, width = image.shape[:2]
    drawn = np.zeros((height, width), np.uint8)
    place = (int((0.40 + shift[0]) * width), int((0.54 + shift[1]) * height))
    cv2.putText(drawn, "K7", place, cv2.FONT_HERSHEY_SIMPLEX, width / 200, 255, max(2, width // 100), cv2.LINE_AA)
    return np.full_like(image, 235 if image.mean() < 128 else 30), drawn.astype(np.float32) * (0.7 / 255)


def dull(image: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likewise a blurred spot, a fifth of the image wide, as a worn tool leaves it."""
    alpha = _inside(_distance(image, shift, (0.10, 0.08)), 12)
    return cv2.GaussianBlur(image, (0, 0), image.shape[1] / 40), alpha


DEFECTS: dict[str, Draw] = {"scratch": scratch, "stain": stain, "mark": mark, "dull": dull}


def paste(image: np.ndarray, kind: str, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an image ``(H, W, 3)`` with a defect, and its mask ``(H, W)``, 0 or 1.

    Args:
        image: RGB, uint8.
        kind: One of :data:`DEFECTS`.
        shift: How far it lies from the middle, (x, y) in widths and heights of the image.
    """
    seen, alpha = DEFECTS[kind](image, shift)
    mixed = image * (1 - alpha[..., None]) + seen * alpha[..., None]
    return mixed.round().astype(np.uint8), (alpha > alpha.max() / 2).astype(np.uint8)


def _distance(image: np.ndarray, shift: np.ndarray, radii: tuple[float, float]) -> np.ndarray:
    """Return the distance of every pixel to a place near the middle, 1 on an ellipse of these radii."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    x, y = (columns / width - 0.5 - shift[0]) / radii[0], (rows / height - 0.5 - shift[1]) / radii[1]
    return np.hypot(x, y).astype(np.float32)


def _inside(distance: np.ndarray, steepness: float) -> np.ndarray:
    """Return 1 well below a distance of 1, 0 well above."""
    return 1 / (1 + np.exp((steepness * (distance - 1)).clip(-50, 50)))
