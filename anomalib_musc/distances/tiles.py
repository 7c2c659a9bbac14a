# SPDX-License-Identifier: Apache-2.0
"""Images that are held at once, ready to be compared."""

from dataclasses import dataclass, field

import torch

from anomalib_musc.distances.rounding import Encoded, Rounding
from anomalib_musc.distances.windows import unit_vectors, window_sums

# Below this squared distance (relative to the squared norm) the difference |x|² + |y|² - 2xy has lost the digits
# that the result needs in float32, and the distance is computed again in float64.
CANCELLATION = 1e-4
# How much longer the terms of a window may be than their sum; the error of a product grows with the square of it.
_CONDITION = 10
_TINY_NORM = 1e-12  # as in torch.nn.functional.normalize
# Patches are taken for equal whose coordinates on so many random axes are, in units of a tenth of the bound of 1e-4.
_AXES, _EQUAL = 16, 1e-5


@dataclass
class Tile:
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
    _distinct: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def resolution(self) -> torch.Tensor:
        """Squared distances below which the products are too coarse, ``(D, b, L)``."""
        is_double = self.half_norms.dtype == torch.float64
        return self.half_norms * (0.0 if is_double else 2 * CANCELLATION)

    def vectors(self, image: int, index: int) -> torch.Tensor:
        """Return what is compared at the degree of that index, ``(L, C)``."""
        if self.scales is None:
            return self.patches[image]
        return unit_vectors(self.patches[image].view(1, *self.grid, -1), self.degrees[index])[0]

    def distinct(self, image: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell the equal patches of an image, as those of a plain background, at the degree of that index.

        Returns:
            Positions ``(K,)`` of patches that differ, and for each patch which of them it equals, ``(L,)``.
        """
        if (image, index) not in self._distinct:
            self._distinct[image, index] = _distinct(self.vectors(image, index), self.half_norms[index].max())
        return self._distinct[image, index]


def tile_of_vectors(storage: torch.Tensor, channels: int, rounding: Rounding) -> Tile:
    """Make a tile of prepared vectors that are compared as they are.

    Args:
        storage: Vectors ``(b, L, C)``, and the rounding's channels for norms after theirs.
        channels: C.
        rounding: How they are rounded.
    """
    vectors = storage[..., :channels]
    encoded = rounding.encode(vectors)
    norms = [_half_norms(image, rounding.decode(encoded, index)) for index, image in enumerate(vectors)]
    half_norms = torch.stack(norms)
    operands = rounding.with_norms(storage, encoded, half_norms)
    return Tile(vectors, (1, vectors.shape[1]), (1,), operands, None, half_norms[None])


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


def _distinct(vectors: torch.Tensor, largest_half_norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell equal vectors ``(L, C)`` by their coordinates on random axes, see :meth:`Tile.distinct`."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(vectors.shape[1], _AXES, generator=generator).to(vectors)
    unit = (2 * largest_half_norm).sqrt() * _EQUAL
    cells = (vectors @ axes / unit.clamp_min(torch.finfo(unit.dtype).tiny)).round().nan_to_num(0.0).cpu().long()
    odd = torch.randint(2**62, (_AXES,), generator=generator) * 2 + 1
    _, equals = (cells * odd).sum(dim=1).unique(return_inverse=True)  # hashed, modulo 2**64
    positions = torch.empty(int(equals.max()) + 1, dtype=torch.long)
    positions[equals] = torch.arange(len(equals))
    return positions.to(vectors.device), equals.to(vectors.device)
