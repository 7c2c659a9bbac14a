# SPDX-License-Identifier: Apache-2.0
"""Numbers of the method's official release on seeded inputs, kept beside the repository: `../shared/golden`."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
CHAINS = ["small", "pair_even", "interval"]  # files of the whole method
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason="the golden vectors (../shared/golden) are not here")


@cache
def load(name: str) -> dict[str, np.ndarray]:
    """Every array of `<name>.npz`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def settings(chain: dict[str, np.ndarray]) -> dict[str, Any]:
    """Degrees, interval, windows and image size of a whole-chain file, as plain Python numbers."""
    return {
        "degrees": tuple(chain["degrees"].tolist()),
        "interval": tuple(chain["interval"].tolist()),
        "windows": tuple(chain["windows"].tolist()),
        "image_size": int(chain["image_size"]),
    }


def feature_maps(chain: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens (layers, N, 1+L, C), class token first -> maps (layers, N, C, H, W)."""
    patches = chain["tokens"][:, :, 1:]
    layers, num_images, length, channels = patches.shape
    side = round(length**0.5)
    return patches.transpose(0, 1, 3, 2).reshape(layers, num_images, channels, side, side)
