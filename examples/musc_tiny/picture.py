# SPDX-License-Identifier: Apache-2.0
"""Draw a picture of what ``musc-tiny`` learns from.

    python examples/musc_tiny/picture.py drawn_products.jpg

Each row is one product: three sound images, two with a defect, and the mask of the second.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np
from pools import UNSEEN, draw_material, draw_pool

ROWS, COLUMNS, SIDE = 5, 2, 112
MATERIALS, IMAGES = 40, 5


def main(path: str) -> None:
    """Write the picture."""
    materials = np.stack([draw_material(UNSEEN, index, IMAGES) for index in range(MATERIALS)])
    rows = []
    for product in range(ROWS * COLUMNS):
        pool = draw_pool(np.random.default_rng([UNSEEN, 3, product]), materials, SIDE, IMAGES, 2)
        mask = np.repeat(pool.masks[-1, ..., None] * 255, 3, axis=2)
        rows.append(np.concatenate([*pool.images, mask], axis=1))
    columns = [np.concatenate(rows[start::COLUMNS]) for start in range(COLUMNS)]
    cv2.imwrite(path, np.concatenate(columns, axis=1)[..., ::-1])


if __name__ == "__main__":
    main(sys.argv[1])
