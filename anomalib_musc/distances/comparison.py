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
    if right is left:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    left_resolution, right_resolution = left.resolution, right.resolution
    for image in range(len(left.patches)):
        start, query = image + 1 if right is left else 0, kernel.query(left, image)
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            to_right, to_left = query(right, images)
            spoilt_right = to_right < left_resolution[:, image, None]
            spoilt_left = to_left < right_resolution[:, images]
            if spoilt_right.any() or spoilt_left.any():
                for index in range(len(left.degrees)):
                    for offset in range(images.stop - first):
                        one, other = (left, image), (right, first + offset)
                        _restore(to_right[index, offset], spoilt_right[index, offset], one, other, index)
                        _restore(to_left[index, offset], spoilt_left[index, offset], other, one, index)
            targets[0][:, image, images] = to_right.sqrt_()
            targets[1][:, images, image] = to_left.sqrt_()
            if progress is not None:
                progress(to_right.shape[0] * to_right.shape[1])


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
    patches = is_spoilt.nonzero().flatten()
    if not len(patches):
        return
    (tile, image), (other_tile, other) = query, reference
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
