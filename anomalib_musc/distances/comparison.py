# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

from collections.abc import Callable

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.tiles import Tile


def compare_tiles(
    left: Tile,
    right: Tile,
    kernel: Kernel,
    chunk: int,
    targets: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int], object] | None,
) -> None:
    """Compare every image of a tile with every image of another, or of itself; each pair once.

    Args:
        left: n images.
        right: m others, or the same.
        kernel: Compares an image with several.
        chunk: With how many at once.
        targets: Where the distances go, ``(D, n, m, L)`` to the right and ``(D, m, n, L)`` to the left; one and the
            same where the tiles are.
        progress: Called with the number of image pairs just compared, each counted once a degree.
    """
    is_same = right is left
    if is_same:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    at_once = kernel.block // left.patches.shape[1] ** 2  # to wait for a device seldom
    done = pending = 0
    for image in range(len(left.patches)):
        start, query = image + 1 if is_same else 0, kernel.query(left, image)
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            targets[0][:, image, images], targets[1][:, images, image] = query(right, images)
        pending += len(right.patches) - start
        if pending < at_once and image < len(left.patches) - 1:
            continue
        rows = slice(done, image + 1)
        first, second = (rows.start, rows.stop) if is_same else (0, 0)
        _complete(targets[0][:, rows, first:], (left, rows.start), (right, first))
        _complete(targets[1][:, second:, rows], (right, second), (left, rows.start))
        if progress is not None:
            progress(len(left.degrees) * pending)
        done, pending = rows.stop, 0


def _complete(squared: torch.Tensor, query: tuple[Tile, int], reference: tuple[Tile, int]) -> None:
    """Turn squared distances ``(D, n, m, L)`` into distances, in place; what is too small for products is recomputed.

    Args:
        squared: Those of the patches of n images to m others.
        query: A tile, and the position of the first of the n.
        reference: Another tile, and the position of the first of the m.
    """
    (tile, first), (_, other) = query, reference
    is_spoilt = squared < tile.resolution[:, first : first + squared.shape[1], None]
    if is_spoilt.any():
        for index, image, offset in is_spoilt.any(dim=-1).nonzero().tolist():
            where = index, image, offset
            _restore(squared[where], is_spoilt[where], (tile, first + image), (reference[0], other + offset), index)
    squared.sqrt_()


def _restore(
    squared: torch.Tensor, is_spoilt: torch.Tensor, query: tuple[Tile, int], reference: tuple[Tile, int], index: int
) -> None:
    """Recompute in float64, in place, the squared distances that are too small for the products.

    Of equal patches, as those of a plain background, one is compared.

    Args:
        squared: Distances of the query's patches to the reference, ``(L,)``.
        is_spoilt: Which are too small.
        query: A tile and the position of an image.
        reference: Another tile and position.
        index: That of the degree.
    """
    (tile, image), (other_tile, other) = query, reference
    patches = is_spoilt.nonzero().flatten()
    positions, equals = tile.distinct(image, index)
    chosen, of_patches = equals[patches].unique(return_inverse=True)
    others = other_tile.distinct(other, index)[0]
    nearest = torch.cdist(
        in_float64(tile.vectors(image, index)[positions[chosen]]),
        in_float64(other_tile.vectors(other, index)[others]),
    ).amin(dim=1)
    squared[patches] = nearest.square().to(squared)[of_patches]


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the host where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
