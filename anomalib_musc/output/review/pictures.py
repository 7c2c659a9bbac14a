# SPDX-License-Identifier: Apache-2.0
"""Pictures and maps as the review page holds them: JPEGs, and grids of 8 bits."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.output.review.records import Card
from anomalib_musc.pool.grey_range import find_grey_range, sample
from anomalib_musc.pool.high_bit_depth import has_high_bit_depth, read_small, to_pixels

# With at most three small thumbnails of other pages a card, 2,000 cards take
# 2000 x (30 + 3 x 3 + 4) kB x 4/3 for base64 = 115 MB at the very most.
SIDE, MAX_BYTES = 512, 30_000
SMALL_SIDE, SMALL_MAX_BYTES = 128, 3_000
MAX_GRID = 64

_QUALITIES = (85, 75, 60, 45)
_FORMATS = {"JPEG", "PNG", "BMP", "GIF", "WEBP"}  # which every browser shows


@dataclass(frozen=True)
class Picture:
    """An image as the page holds it.

    Attributes:
        jpeg: A JPEG file, empty where the image cannot be read.
        size: (width, height) of the original.
        uri: Where a browser finds an original that it shows as it was scored; "" where there is none.
    """

    jpeg: bytes
    size: tuple[int, int]
    uri: str = ""


def encode_thumbnail(image: Image.Image | np.ndarray, side: int = SIDE, max_bytes: int = MAX_BYTES) -> bytes:
    """Return an image as a small JPEG file in its own proportions.

    Args:
        image: A picture; or RGB ``(H, W, 3)`` or grey ``(H, W)``, uint8.
        side: Its longer side in pixels at most; it is not enlarged.
        max_bytes: The file's size at most: its quality is lowered to 45, then its side.

    Example:
        >>> jpeg = encode_thumbnail(np.zeros((100, 400, 3), np.uint8), side=64)
        >>> Image.open(io.BytesIO(jpeg)).size
        (64, 16)
    """
    picture = _to_8_bits(image if isinstance(image, Image.Image) else Image.fromarray(image))
    while True:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            if file.tell() <= max_bytes or max(picture.size) <= 8:
                return file.getvalue()
        side = max(picture.size) * 3 // 4


def thumbnail_of(image: torch.Tensor) -> bytes:
    """Return the thumbnail of an image ``(3, H, W)`` in [0, 1]."""
    step = max(1, min(max(image.shape[-2:]) // (2 * SIDE), *image.shape[-2:]))
    image = image[:, ::step, ::step]  # of more than twice the thumbnail's size
    return encode_thumbnail(to_pixels(image))


def picture_of(card: Card) -> Picture:
    """Return a card's image; its file is opened only where the card holds none."""
    if isinstance(card.image, bytes):
        image = Image.open(io.BytesIO(card.image))
        jpeg = card.image if len(card.image) <= MAX_BYTES else encode_thumbnail(image)
        return Picture(jpeg, card.size or image.size)
    if card.image is not None:
        height, width = card.image.shape[:2]
        return Picture(encode_thumbnail(card.image), card.size or (width, height))
    try:
        with Image.open(card.path) as image:
            is_as_shown = image.format in _FORMATS and not has_high_bit_depth(image)
            picture, size = read_small(image, 2 * SIDE)
            jpeg = encode_thumbnail(picture)
    except (OSError, ValueError, Image.DecompressionBombError):  # gone since it was predicted
        return Picture(b"", card.size or (1, 1))
    uri = Path(card.path).absolute().as_uri() if is_as_shown else ""
    return Picture(jpeg, card.size or size, uri)


def shrink(jpeg: bytes) -> bytes:
    """Return a thumbnail's small version, which stands for it on other pages."""
    return encode_thumbnail(Image.open(io.BytesIO(jpeg)), SMALL_SIDE, SMALL_MAX_BYTES) if jpeg else b""


def shrink_map(anomaly_map: torch.Tensor) -> torch.Tensor:
    """Return a map ``(h, w)`` of at most 64 x 64, by the maximum over cells."""
    return F.adaptive_max_pool2d(anomaly_map[None], [min(side, MAX_GRID) for side in anomaly_map.shape])[0]


def quantise(anomaly_map: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return a map in 8 bits, and the values that 0 and 255 stand for.

    Those are the map's own extremes rather than the pool's: one image far above all others takes no steps from them.

    Args:
        anomaly_map: Shape ``(h, w)``.

    Returns:
        uint8 of the same shape, or of one of at most 64 x 64 by the maximum over cells, and of at least 2 x 2; lowest
        value; highest value.

    Example:
        >>> quantise(np.array([[1.0, 2.0], [3.0, 1.5]]))[0].tolist()
        [[0, 128], [255, 64]]
    """
    grid = shrink_map(torch.from_numpy(np.ascontiguousarray(anomaly_map, dtype=np.float64)))
    for axis in (0, 1):  # the browser interpolates between two values at least
        grid = grid.repeat_interleave(2, dim=axis) if grid.shape[axis] == 1 else grid
    low, high = grid.min().item(), grid.max().item()
    levels = (grid - low) / (high - low) * 255 if high > low else torch.zeros_like(grid)
    return levels.round().to(torch.uint8).numpy(), low, high


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return a copy in RGB or grey of 8 bits; of more bits, black and white are found in the image."""
    if has_high_bit_depth(image):
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        return Image.fromarray((find_grey_range(sample(values)).apply(values) * 255).byte().numpy())
    return image.copy() if image.mode in {"L", "RGB"} else image.convert("RGB")
