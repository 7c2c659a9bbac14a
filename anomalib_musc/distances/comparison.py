# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

from collections.abc import Callable

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.tiles import Tile

_IMAGE_BYTES = 32  # of a number of an image whose places are compared apart: twice in float32, in float64, both sides
_SURE = 20  # by which part of the distance that is too small for products they may err


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
        kernel: Compares an image with several.
        chunk: With how many at once.
        memory: Bytes for what is compared apart from the products.
        targets: Where the distances go, ``(D, n, m, L)`` to the right and ``(D, m, n, L)`` to the left; one and the
            same where the tiles are.
        progress: Called with the number of image pairs just compared, each counted once a degree.
    """
    is_same = right is left
    if is_same:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    for image in range(len(left.patches)):
        start, query = image + 1 if is_same else 0, kernel.query(left, image)
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            targets[0][:, image, images], targets[1][:, images, image] = query(right, images)
            if progress is not None:
                progress(len(left.degrees) * (images.stop - first))
    for index in range(len(left.degrees)):
        for places in left.places:
            exact = _same_places(left, right, index, places, memory) if left.is_static else None  # (n, m, places)
            _complete(targets[0][index, ..., places], left, right, index, places.start, exact)
            if not is_same:
                backward = None if exact is None else exact.transpose(0, 1)
                _complete(targets[1][index, ..., places], right, left, index, places.start, backward)


def _same_places(left: Tile, right: Tile, index: int, places: slice, memory: int) -> torch.Tensor:
    """Return squared distances of the patches at the same place of two images, by products in float64.

    Where neither camera nor background moves, these are too close for products in less; they are few beside those of
    all places.

    Args:
        left: n images.
        right: m others, or the same.
        index: That of the degree.
        places: Some of their places.
        memory: Bytes for a few images' vectors.

    Returns:
        Shape ``(n, m, places)``; infinite where an image meets itself.
    """
    num_numbers = (places.stop - places.start) * left.patches.shape[2]
    at_once = max(1, memory // (_IMAGE_BYTES * num_numbers))
    exact = left.half_norms.new_empty(len(left.patches), len(right.patches), places.stop - places.start)
    for first in range(0, len(exact), at_once):
        rows = slice(first, min(first + at_once, len(left.patches)))
        x = in_float64(left.vectors_at(places, rows, index)).transpose(0, 1)  # (places, n', C)
        of_x = torch.linalg.vector_norm(x, dim=-1).square_()
        for second in range(0, len(right.patches), at_once):
            columns = slice(second, min(second + at_once, len(right.patches)))
            y, of_y = x, of_x
            if right is not left or second != first:
                y = in_float64(right.vectors_at(places, columns, index)).transpose(0, 1)
                of_y = torch.linalg.vector_norm(y, dim=-1).square_()
            squared = torch.baddbmm(of_x[..., None] + of_y[:, None], x, y.mT, alpha=-2)  # (places, n', m')
            exact[rows, columns] = squared.clamp_min_(0).permute(1, 2, 0).to(exact)
    if right is left:
        exact.diagonal().fill_(float("inf"))
    return exact


def _complete(
    squared: torch.Tensor, tile: Tile, reference: Tile, index: int, start: int, exact: torch.Tensor | None
) -> None:
    """Turn squared distances ``(n, m, places)`` into distances, in place; those too small for products are recomputed.

    Args:
        squared: Those of a tile's n images to the m of another, or the same, at the places that begin with ``start``.
        tile: The n images.
        reference: The m images.
        index: That of the degree.
        start: The first place.
        exact: Those at the same place, where the others leave them out.
    """
    resolution = tile.resolution[index, :, None, start : start + squared.shape[2]]
    is_spoilt = squared < resolution
    if exact is not None:
        is_nearest = exact <= torch.maximum(squared - resolution / _SURE, tile.negligible[index])
        is_spoilt &= ~is_nearest
        torch.minimum(squared, exact, out=squared)
    if is_spoilt.any():
        for image, other in is_spoilt.any(dim=-1).nonzero().tolist():
            patches = is_spoilt[image, other].nonzero().flatten()
            nearest = _nearest(start + patches, (tile, image), (reference, other), index)
            squared[image, other, patches] = nearest.to(squared)
    squared.sqrt_()


def _nearest(patches: torch.Tensor, query: tuple[Tile, int], reference: tuple[Tile, int], index: int) -> torch.Tensor:
    """Return the squared distances of some patches to the nearest ones, in float64.

    Of equal patches, as those of a plain background, one is compared. The nearest one is nominated by products, and the
    distance to it computed as a difference; to all others in float64 only where a second one is as near.

    Args:
        patches: Places of patches of the query.
        query: A tile and the position of an image.
        reference: Another tile and position.
        index: That of the degree.
    """
    (tile, image), (other_tile, other) = query, reference
    positions, equals = tile.distinct(image, index)
    chosen, of_patches = equals[patches].unique(return_inverse=True)
    x = tile.vectors(image, index)[positions[chosen]]
    y = other_tile.vectors(other, index)[other_tile.distinct(other, index)[0]]
    norms_x, norms_y = (torch.linalg.vector_norm(vectors, dim=-1).square_() for vectors in (x, y))
    products = torch.addmm(norms_y, x, y.T, alpha=-2)
    nominated = products.topk(min(2, len(y)), largest=False)
    squared = (in_float64(x) - in_float64(y[nominated.indices[:, 0]])).square_().sum(dim=1)
    if len(y) > 1:
        second = nominated.values[:, 1] + norms_x - tile.resolution[index, image, positions[chosen]] / _SURE
        is_unsure = second < squared
        if is_unsure.any():
            squared[is_unsure] = torch.cdist(in_float64(x[is_unsure]), in_float64(y)).amin(dim=1).square_()
    return squared[of_patches]


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the host where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
