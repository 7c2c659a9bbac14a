# SPDX-License-Identifier: Apache-2.0
"""Patches at the same place of two images, where neither camera nor background moves."""

import math

import torch

from anomalib_musc.distances.recomputing import DOUBT, SPOILT
from anomalib_musc.distances.tiles import CANCELLATION, Tile, in_float64

# Bytes of a number of an image, and of a pair of images at a place: copies in both precisions.
_IMAGE_BYTES, _PAIR_BYTES = 32, 32
_TOGETHER = 2**20  # numbers of some places of all images that are looked at together: few enough for a cache


def merge_same_places(
    left: Tile, right: Tile, index: int, memory: int, targets: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Add the distances of the patches at the same place, which the products have left out.

    Where neither camera nor background moves, these are too close for products of patches, but not for those of what
    is left when their mean at that place is subtracted. They are few beside those of all places.

    Args:
        left: n images.
        right: m others, or the same.
        index: That of the degree.
        memory: Bytes for a few images at a time.
        targets: Squared distances, ``(D, n, m, L)`` to the right and ``(D, m, n, L)`` to the left; those that are still
            too small for products become ``SPOILT``.
    """
    num_images, num_patches, channels = left.patches.shape
    numbers = min(_TOGETHER, memory // (2 * _IMAGE_BYTES))
    for places in left.places(max(math.isqrt(num_patches), numbers // (num_images * channels))):
        _merge_places(left, right, index, places, memory, targets)


def _merge_places(
    left: Tile,
    right: Tile,
    index: int,
    places: slice,
    memory: int,
    targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    width = places.stop - places.start
    of_images = memory // (2 * _IMAGE_BYTES * width * left.patches.shape[2])
    at_once = max(1, min(of_images, math.isqrt(memory // (2 * _PAIR_BYTES * width))))
    for first in range(0, len(left.patches), at_once):
        rows = slice(first, min(first + at_once, len(left.patches)))
        x = left.vectors_at(places, rows, index).transpose(0, 1)  # (places, n', C)
        mean = x.mean(dim=1, keepdim=True)
        x = x - mean
        for second in range(first if right is left else 0, len(right.patches), at_once):
            columns, y = slice(second, min(second + at_once, len(right.patches))), x
            if right is not left or second != first:
                y = right.vectors_at(places, columns, index).transpose(0, 1) - mean
            squared = squared_distances(x, y, left.fine(index))
            if y is x:
                squared.diagonal(dim1=1, dim2=2).fill_(float("inf"))
            exact = squared.permute(1, 2, 0)  # (n', m', places)
            _merge(targets[0][index, rows, columns, places], exact, left, rows, index, places)
            if y is not x:
                _merge(targets[1][index, columns, rows, places], exact.transpose(0, 1), right, columns, index, places)


def squared_distances(x: torch.Tensor, y: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """Return squared distances ``(places, n, m)`` of ``(places, n, C)`` and ``(places, m, C)``, exact enough.

    Args:
        x: Some vectors.
        y: Others, or the same.
        fine: Squared norm up to which products of vectors in float32 are precise enough for any distance.
    """
    of_x = torch.linalg.vector_norm(x, dim=-1).square_()
    of_y = of_x if y is x else torch.linalg.vector_norm(y, dim=-1).square_()
    squared = torch.baddbmm(of_x[..., None] + of_y[:, None], x, y.mT, alpha=-2)
    if x.dtype == torch.float64:
        return squared.clamp_min_(0)
    largest = torch.maximum(of_x[..., None], of_y[:, None])
    is_coarse = (largest > fine) & (squared < 2 * CANCELLATION * largest)
    if y is x:
        is_coarse.diagonal(dim1=1, dim2=2).fill_(False)
    limits = torch.finfo(x.dtype)
    if is_coarse.any() or fine < limits.tiny / limits.eps:  # below, squares lose digits
        x64 = in_float64(x)
        return squared_distances(x64, x64 if y is x else in_float64(y), fine).to(x)
    return squared.clamp_min_(0)


def _merge(squared: torch.Tensor, exact: torch.Tensor, tile: Tile, images: slice, index: int, places: slice) -> None:
    """Take the smaller of two squared distances ``(n, m, places)``, where products can tell which it is."""
    resolution = tile.resolution(index, images, places)[:, None]
    is_nearest = exact <= torch.maximum(squared - DOUBT * resolution, tile.negligible(index))
    is_spoilt = (squared < resolution) & ~is_nearest
    torch.minimum(squared, exact, out=squared).masked_fill_(is_spoilt, SPOILT)
