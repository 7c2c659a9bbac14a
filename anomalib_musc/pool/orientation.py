# SPDX-License-Identifier: Apache-2.0
"""EXIF orientation: how a camera was held. Viewers turn the picture; anomalib 2.7.0 reads it as it is stored."""

from contextlib import suppress

import torch
from PIL import Image

UPRIGHT = 1
SIDEWAYS = 5  # and above: height and width are swapped
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened file, from 1 to 8; 1, upright, where nothing else is said."""
    if image.format == "TIFF":  # which Pillow turns when it decodes
        return UPRIGHT
    with suppress(Exception):  # a broken EXIF block does not make a broken picture
        found = image.getexif().get(_ORIENTATION, UPRIGHT)
        return found if found in _TRANSPOSES else UPRIGHT
    return UPRIGHT


def is_sideways_tiff(image: Image.Image) -> bool:
    """Whether an opened file is a TIFF whose height and width a viewer swaps."""
    tags = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and tags.get(_ORIENTATION, UPRIGHT) in range(SIDEWAYS, 9)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture that is stored with an EXIF orientation as a viewer shows it."""
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def turned_tensor(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Return an image ``(..., H, W)``, read as it is stored, as a viewer shows it; 5 to 8 swap height and width."""
    if orientation >= SIDEWAYS:
        image = image.transpose(-1, -2)
    flipped = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}.get(orientation)
    return image.flip(flipped) if flipped else image
