# SPDX-License-Identifier: Apache-2.0
"""Images that are held at once, ready to be compared."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from anomalib_musc.functional.lnamd import aggregate, window_sum

# Below this squared distance (relative to the squared norms) the difference |x|² + |y|² - 2xy has lost the digits
# that the result needs in float32, and the distance is computed again in float64.
_CANCELLATION = 1e-4
_TINY_NORM = 1e-12  # as in torch.nn.functional.normalize

Encode = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


class Tile(NamedTuple):
    """Images that are held on the compute device, ready to be compared at D aggregation degrees.

    Attributes:
        patches: Patches of b images, shape ``(b, L, C)``.
        grid: Height and width of their map, where they are still to be aggregated.
        degrees: The D degrees; ``(1,)`` for patches that are compared as they are.
        operands: The patches as the comparison wants them.
        scales: What the product with an aggregated patch is multiplied by, ``(D, b, L)``; ``None`` for ones.
        half_norms: Half the squared norms of the aggregated patches, ``(D, b, L)``.
        resolution: Squared distance below which the products are too coarse.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    degrees: tuple[int, ...]
    operands: tuple[torch.Tensor, ...]
    scales: torch.Tensor | None
    half_norms: torch.Tensor
    resolution: float

    def vectors(self, image: int, index: int) -> torch.Tensor:
        """Return what is compared at the degree of that index, ``(L, C)``."""
        if self.scales is None:
            return self.patches[image]
        return aggregate(self.patches[image].view(1, *self.grid, -1), self.degrees[index])[0]


def tile_of_vectors(vectors: torch.Tensor, encode: Encode) -> Tile:
    """Make a tile of vectors ``(b, L, C)`` that are compared as they are."""
    half_norms = torch.stack([image.square().sum(dim=-1) / 2 for image in vectors])
    grid = (1, vectors.shape[1])
    return Tile(vectors, grid, (1,), encode(vectors), None, half_norms[None], _resolution(half_norms))


def tile_of_maps(patches: torch.Tensor, degrees: tuple[int, ...], encode: Encode) -> Tile:
    """Make a tile of normalised patches ``(b, H, W, C)`` that are compared at several degrees."""
    norms = torch.stack([_norms_of_sums(image, degrees) for image in patches], dim=1)  # (D, b, L)
    smallest = norms.new_tensor([_TINY_NORM * degree**2 for degree in degrees])
    scales = norms.clamp(min=smallest[:, None, None]).reciprocal_()
    vectors = patches.flatten(1, 2)
    grid = (patches.shape[1], patches.shape[2])
    half_norms = (norms * scales).square_() / 2
    return Tile(vectors, grid, degrees, encode(vectors), scales, half_norms, _resolution(half_norms))


def _resolution(half_norms: torch.Tensor) -> float:
    return 0.0 if half_norms.dtype == torch.float64 else 2 * _CANCELLATION * half_norms.max().item()


def _norms_of_sums(image: torch.Tensor, degrees: tuple[int, ...]) -> torch.Tensor:
    sums = (window_sum(window_sum(image, 0, degree // 2), 1, degree // 2) for degree in degrees)
    return torch.stack([patches.flatten(0, 1).norm(dim=-1) for patches in sums])
