# SPDX-License-Identifier: Apache-2.0
"""What a glance at an image shows: whether it is grey or coloured, and whether it shows anything."""

from typing import NamedTuple

import torch

LEVEL = 1 / 255  # of 8 bits
_SIDE = 512  # pixels that are looked at for colour, along each side


class Look(NamedTuple):
    """What a glance at an image shows.

    Attributes:
        is_grey: Whether its channels are equal everywhere, but for what rounding in YCbCr can make of it.
        is_coloured: Whether they are not at most places.
        contrast: By how much its brightest and its darkest value differ, from 0 to 1; of a large image that shows
            something, the same of every few pixels.
    """

    is_grey: bool
    is_coloured: bool
    contrast: float


def look_at(image: torch.Tensor) -> Look:
    """Glance at an image ``(3, H, W)`` in [0, 1].

    Example:
        >>> look_at(torch.zeros(3, 4, 4))
        Look(is_grey=True, is_coloured=False, contrast=0.0)
    """
    height, width = image.shape[-2:]
    some = image[:, :: 1 + height // _SIDE, :: 1 + width // _SIDE]
    low, high = some.aminmax()
    if high - low <= LEVEL:
        low, high = image.aminmax()
    has_colour = some.amax(dim=0) - some.amin(dim=0) > 2.5 * LEVEL
    return Look(not has_colour.any().item(), has_colour.float().mean().item() > 0.5, (high - low).item())
