# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

from collections.abc import Iterator

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.tiles import Tile


def compare_tiles(
    left: Tile, right: Tile, kernel: Kernel, chunk: int
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Compare every image of a tile with every image of another, or of itself; each pair once.

    Args:
        left: A tile.
        right: Another one, or the same.
        kernel: Compares an image with several.
        chunk: With how many at once.

    Yields:
        The image on the left, the c images on the right, and both distances ``(D, c, L)``, as the kernel's.
    """
    resolution = max(left.resolution, right.resolution)
    for image in range(len(left.patches)):
        start = image + 1 if right is left else 0
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            to_right, to_left = kernel(left, image, right, images)
            if min(to_right.min(), to_left.min()) < resolution:
                _restore_small_distances((to_right, to_left), (left, image), (right, images.start), resolution)
            yield image, images, to_right.sqrt_(), to_left.sqrt_()


def _restore_small_distances(
    squared: tuple[torch.Tensor, torch.Tensor], left: tuple[Tile, int], right: tuple[Tile, int], resolution: float
) -> None:
    """Recompute in float64, in place, the squared distances ``(D, c, L)`` that are too small for the products.

    Args:
        squared: Distances of the image to each of c others, and of theirs to it.
        left: A tile and the position of the image.
        right: A tile and the position of the first of the others.
        resolution: What is too small.
    """
    for distances, is_mirrored in zip(squared, (False, True), strict=True):
        is_spoilt = distances < resolution
        for degree, other in is_spoilt.any(dim=-1).nonzero().tolist():
            query, reference = left[0].vectors(left[1], degree), right[0].vectors(right[1] + other, degree)
            if is_mirrored:
                query, reference = reference, query
            patches = is_spoilt[degree, other]
            exact = torch.cdist(_in_float64(query[patches]), _in_float64(reference)).amin(dim=1)
            distances[degree, other, patches] = exact.square().to(distances)


def _in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # which has no float64
