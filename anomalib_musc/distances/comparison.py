# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

import math
from collections.abc import Callable

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.tiles import Tile

# Bytes of a number of an image that is compared apart, and of a pair of images at a place: copies in both precisions.
_IMAGE_BYTES, _PAIR_BYTES = 32, 32
_DOUBT = 1 / 20  # of the distance that is too small for products: by so much they may err
_SPOILT = -1.0  # in place of a squared distance that is to be recomputed


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
        if left.is_static:
            for places in left.places:
                _merge_same_places(left, right, index, places, memory, targets)
        _complete(targets[0][index], left, right, index)
        if not is_same:
            _complete(targets[1][index], right, left, index)


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
            ``_SPOILT``.
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
    is_nearest = exact <= torch.maximum(squared - _DOUBT * resolution, tile.negligible(index))
    is_spoilt = (squared < resolution) & ~is_nearest
    torch.minimum(squared, exact, out=squared).masked_fill_(is_spoilt, _SPOILT)


def _complete(squared: torch.Tensor, tile: Tile, reference: Tile, index: int) -> None:
    """Turn squared distances ``(n, m, L)`` into distances, in place; those too small for products are recomputed.

    Args:
        squared: Those of a tile's n images to the m of another, or the same.
        tile: The n images.
        reference: The m images.
        index: That of the degree.
    """
    resolution = tile.resolution(index)
    for image, row in enumerate(squared):  # (m, L)
        is_spoilt = row < (0 if tile.is_static else resolution[image])
        others = is_spoilt.any(dim=1).nonzero().flatten().tolist()
        if others:
            vectors = tile.vectors(image, index)
        for other in others:
            patches = is_spoilt[other].nonzero().flatten()
            row[other, patches] = _nearest(patches, vectors, (tile, image), (reference, other), index).to(row)
        row.sqrt_()


def _nearest(
    patches: torch.Tensor,
    vectors: torch.Tensor,
    query: tuple[Tile, int],
    reference: tuple[Tile, int],
    index: int,
) -> torch.Tensor:
    """Return the squared distances of some patches to the nearest ones, in float64.

    Of equal patches, as those of a plain background, one is compared.

    Args:
        patches: Places of patches of the query.
        vectors: All of its patches, ``(L, C)``.
        query: A tile and the position of an image.
        reference: Another tile and position.
        index: That of the degree.
    """
    (tile, image), (other_tile, other) = query, reference
    positions, equals = tile.distinct(image, index)
    chosen, of_patches = equals[patches].unique(return_inverse=True)
    others = other_tile.vectors(other, index)[other_tile.distinct(other, index)[0]]
    nearest = torch.cdist(in_float64(vectors[positions[chosen]]), in_float64(others)).amin(dim=1)
    return nearest.square_()[of_patches]


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the host where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
