# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

import math
from collections.abc import Callable

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.recomputing import DOUBT, SPOILT, recompute
from anomalib_musc.distances.tiles import Tile, in_float64

# Bytes of a number of an image that is compared apart, and of a pair of images at a place: copies in both precisions.
_IMAGE_BYTES, _PAIR_BYTES = 32, 32


def compare_tiles(
    left: Tile,
    right: Tile,
    kernel: Kernel,
    chunk: int,
    memory: int,
    targets: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int], object] | None,
) -> None:
    """Compare every image of a tile with every image of another, or of itself; each pair once.

    Args:
        left: n images.
        right: m others, or the same.
        kernel: Compares images.
        chunk: How many pairs at once.
        memory: Bytes for what is compared apart from the products.
        targets: Where the distances go, see :meth:`.Kernel.compare`.
        progress: Likewise.
    """
    is_same = right is left
    if is_same:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    kernel.compare(left, right, chunk, targets, progress)
    for index in range(len(left.degrees)):
        if left.is_static:
            for places in left.places:
                _merge_same_places(left, right, index, places, memory, targets)
        recompute(left, right, index, memory, (targets[0][index], targets[1][index]))
    targets[0].sqrt_()
    if not is_same:
        targets[1].sqrt_()


def _merge_same_places(
    left: Tile,
    right: Tile,
    index: int,
    places: slice,
    memory: int,
    targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add the distances of the patches at the same place, which the products have left out, by products in float64.

    Where neither camera nor background moves, these are too close for products in less; they are few beside those of
    all places.

    Args:
        left: n images.
        right: m others, or the same.
        index: That of the degree.
        places: Some of their places.
        memory: Bytes for a few images at a time.
        targets: Squared distances, see :func:`compare_tiles`; those that are still too small for products become
            ``SPOILT``.
    """
    width = places.stop - places.start
    of_images = memory // (2 * _IMAGE_BYTES * width * left.patches.shape[2])
    at_once = max(1, min(of_images, math.isqrt(memory // (2 * _PAIR_BYTES * width))))
    for first in range(0, len(left.patches), at_once):
        rows = slice(first, min(first + at_once, len(left.patches)))
        x = in_float64(left.vectors_at(places, rows, index)).transpose(0, 1)  # (places, n', C)
        of_x = torch.linalg.vector_norm(x, dim=-1).square_()
        for second in range(first if right is left else 0, len(right.patches), at_once):
            columns, y, of_y = slice(second, min(second + at_once, len(right.patches))), x, of_x
            if right is not left or second != first:
                y = in_float64(right.vectors_at(places, columns, index)).transpose(0, 1)
                of_y = torch.linalg.vector_norm(y, dim=-1).square_()
            squared = torch.baddbmm(of_x[..., None] + of_y[:, None], x, y.mT, alpha=-2).clamp_min_(0)
            if y is x:
                squared.diagonal(dim1=1, dim2=2).fill_(float("inf"))
            exact = squared.permute(1, 2, 0).to(left.half_norms)  # (n', m', places)
            _merge(targets[0][index, rows, columns, places], exact, left, rows, index, places)
            if y is not x:
                _merge(targets[1][index, columns, rows, places], exact.transpose(0, 1), right, columns, index, places)


def _merge(squared: torch.Tensor, exact: torch.Tensor, tile: Tile, images: slice, index: int, places: slice) -> None:
    """Take the smaller of two squared distances ``(n, m, places)``, where products can tell which it is."""
    resolution = tile.resolution(index, images, places)[:, None]
    is_nearest = exact <= torch.maximum(squared - DOUBT * resolution, tile.negligible(index))
    is_spoilt = (squared < resolution) & ~is_nearest
    torch.minimum(squared, exact, out=squared).masked_fill_(is_spoilt, SPOILT)
