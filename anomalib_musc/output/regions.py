# SPDX-License-Identifier: Apache-2.0
"""The connected regions of a mask."""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Region:
    """A connected region of a mask, in pixels of the original image.

    Attributes:
        x: Left edge of its box.
        y: Upper edge of its box.
        width: Width of its box.
        height: Height of its box.
        area: Number of its pixels.
    """

    x: int
    y: int
    width: int
    height: int
    area: int


def find_regions(mask: np.ndarray, size: tuple[int, int]) -> list[Region]:
    """Return the 8-connected regions of a mask, the largest first.

    Args:
        mask: Shape ``(h, w)``, anything but 0 is anomalous.
        size: (width, height) of the original image, to whose pixels boxes and areas are scaled.

    Example:
        >>> mask = np.zeros((4, 4))
        >>> mask[1, 1:3] = 1
        >>> find_regions(mask, (40, 20))
        [Region(x=10, y=5, width=20, height=5, area=100)]
    """
    width, height = size
    columns, rows = mask.shape[1], mask.shape[0]
    _, _, statistics, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=8)
    regions = []
    for x, y, w, h, area in statistics[1:].tolist():  # the first is the background
        left, upper = x * width // columns, y * height // rows
        right, lower = -(-(x + w) * width // columns), -(-(y + h) * height // rows)  # rounded up
        pixels = max(1, round(area * width * height / (columns * rows)))
        regions.append(Region(left, upper, right - left, lower - upper, pixels))
    return sorted(regions, key=lambda region: -region.area)
