# SPDX-License-Identifier: Apache-2.0
"""Images that are held at once, ready to be compared."""

from typing import NamedTuple

import torch

from anomalib_musc.distances.rounding import Encoded, Rounding
from anomalib_musc.distances.windows import unit_vectors, window_sums

# Below this squared distance (relative to the squared norms) the difference |x|² + |y|² - 2xy has lost the digits
# that the result needs in float32, and the distance is computed again in float64.
_CANCELLATION = 1e-4
# How much longer the terms of a window may be than their sum; the error of a product grows with the square of it.
_CONDITION = 10
_TINY_NORM = 1e-12  # as in torch.nn.functional.normalize


class Tile(NamedTuple):
    """Images that are held on the compute device, ready to be compared at D degrees.

    Attributes:
        patches: Patches of b images, shape ``(b, L, C)``.
        grid: Height and width of their map, where windows are still to be summed.
        degrees: The D degrees; ``(1,)`` for patches that are compared as they are.
        operands: The patches as the kernel takes them.
        scales: What the product with a window's sum is multiplied by, ``(D, b, L)``; ``None`` for ones.
        half_norms: Half the squared norms of what is compared, ``(D, b, L)``, see :func:`_half_norms`.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    degrees: tuple[int, ...]
    operands: Encoded
    scales: torch.Tensor | None
    half_norms: torch.Tensor

    @property
    def resolution(self) -> float:
        """Squared distance below which the products are too coarse."""
        is_double = self.half_norms.dtype == torch.float64
        return 0.0 if is_double else 2 * _CANCELLATION * self.half_norms.max().item()

    def vectors(self, image: int, index: int) -> torch.Tensor:
        """Return what is compared at the degree of that index, ``(L, C)``."""
        if self.scales is None:
            return self.patches[image]
        return unit_vectors(self.patches[image].view(1, *self.grid, -1), self.degrees[index])[0]


def tile_of_vectors(vectors: torch.Tensor, rounding: Rounding) -> Tile:
    """Make a tile of prepared vectors ``(b, L, C)`` that are compared as they are."""
    operands = rounding.encode(vectors)
    half_norms = [_half_norms(image, rounding.decode(operands, index)) for index, image in enumerate(vectors)]
    return Tile(vectors, (1, vectors.shape[1]), (1,), operands, None, torch.stack(half_norms)[None])


class CancellingWindowsError(ArithmeticError):
    """The patches of a window cancel each other, so that sums of their products would lose too many digits."""


def tile_of_maps(patches: torch.Tensor, degrees: tuple[int, ...], rounding: Rounding) -> Tile:
    """Make a tile of prepared patches ``(b, H, W, C)`` that are compared at several degrees.

    Raises:
        CancellingWindowsError: If the sum of a window is much smaller than its terms.
    """
    vectors = patches.flatten(1, 2)
    operands = rounding.encode(vectors)
    scales = patches.new_empty(len(degrees), *vectors.shape[:2])
    half_norms = torch.empty_like(scales)
    for image, patch_map in enumerate(patches):
        terms = torch.linalg.vector_norm(patch_map, dim=-1, keepdim=True)  # (H, W, 1)
        rounded = rounding.decode(operands, image)
        for index, degree in enumerate(degrees):
            sums = window_sums(patch_map, degree)
            norms = torch.linalg.vector_norm(sums, dim=-1)
            if bool((window_sums(terms, degree)[:, 0] > _CONDITION * norms).any()):
                raise CancellingWindowsError
            scale = norms.clamp_min_(_TINY_NORM * degree**2).reciprocal_()
            rounded_sums = None if rounded is None else window_sums(rounded.view_as(patch_map), degree)
            scales[index, image] = scale
            half_norms[index, image] = _half_norms(sums, rounded_sums) * scale.square()
    grid = (patches.shape[1], patches.shape[2])
    return Tile(vectors, grid, degrees, operands, scales, half_norms)


def _half_norms(exact: torch.Tensor, rounded: torch.Tensor | None) -> torch.Tensor:
    r"""Return half the squared norms of ``(L, C)``, as they have to be where products are those of rounded vectors.

    With the errors :math:`e = x - \tilde x`, which are as good as orthogonal to each other, it is

    .. math:: \lVert x - y \rVert^2 \approx \lVert \tilde x - \tilde y \rVert^2 - \lVert e_x \rVert^2
              - \lVert e_y \rVert^2, \qquad
              \lVert \tilde x \rVert^2 - \lVert e_x \rVert^2 = 2 x \cdot \tilde x - \lVert x \rVert^2

    Its error does not grow where the distance is small; with the true norms it would.
    """
    squared = torch.linalg.vector_norm(exact, dim=-1).square_()
    return squared / 2 if rounded is None else (exact * rounded).sum(dim=-1) - squared / 2
