# SPDX-License-Identifier: Apache-2.0
"""Images are compared in plain torch, on any device."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from anomalib_musc.distances.rounding import Encoded, Rounding, exchange_norms, smallest
from anomalib_musc.distances.tiles import Tile
from anomalib_musc.distances.windows import window_sum

# Compares an image with c images of a tile, and returns squared distances ``(D, c, L)``: of the image's patches to each
# of the others, and of theirs to it.
_Query = Callable[[Tile, slice], tuple[torch.Tensor, torch.Tensor]]

_ROWS = 256  # of one image that are multiplied at least: fewer take the time of more
_ROUNDING = 2.5  # units in the last place of the squared norm of a unit vector


class Product(Rounding, Protocol):
    """How two images are multiplied.

    Attributes:
        name: In words, such as "float32 (BLAS)".
        item_bytes: Size of one product of two patches.
        result_bytes: Working memory of one, its size included.
        can_share: Whether products are precise enough to be summed over windows, whose terms may cancel.
    """

    name: str
    item_bytes: int
    result_bytes: int
    can_share: bool

    def __call__(self, x: Encoded, y: Encoded) -> torch.Tensor:
        """Multiply patches p of an image, ``(l, C)``, with those q of c others: ``(c, L, l)``, over q then p.

        The next call may overwrite the result.
        """


class PlainKernel:
    """Compares images in plain torch, on any device.

    The product with a window's sum is the sum of the products with the patches of the window. So the product of two
    images is computed once, summed over the windows of both, and scaled by the norms, for every degree.

    Args:
        product: Multiplies the patches.
        block_bytes: Size of the products that are best computed at once.
    """

    mixes_pairs = False

    def __init__(self, product: Product, block_bytes: int) -> None:
        self.block = block_bytes // product.item_bytes
        self.can_share = product.can_share
        self.name = product.name
        self.rounding: Rounding = product
        self._product = product
        self._buffer = torch.empty(0)

    def pair_bytes(self, num_patches: int, *, is_shared: bool) -> int:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        if is_shared:
            return num_patches**2 * (self._product.result_bytes + 2 * 8)
        numbers = min(num_patches**2, max(self.block, _ROWS * num_patches))
        return numbers * (self._product.result_bytes + (0 if self._product.norm_channels else 8))

    def compare(
        self,
        left: Tile,
        right: Tile,
        at_once: int,
        targets: tuple[torch.Tensor, torch.Tensor],
        progress: Callable[[int], object] | None,
    ) -> None:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        for image in range(len(left.patches)):
            query = self._query(left, image)
            for first in range(image + 1 if right is left else 0, len(right.patches), at_once):
                images = slice(first, min(first + at_once, len(right.patches)))
                targets[0][:, image, images], targets[1][:, images, image] = query(right, images)
                if progress is not None:
                    progress(len(left.degrees) * (images.stop - first))

    def _query(self, left: Tile, image: int) -> _Query:
        """Return what compares an image with some of another tile."""
        operands = tuple(part[image] for part in left.operands)
        if left.scales is not None:
            return partial(self._compare_windows, operands, left, image)
        if self._product.norm_channels:
            operands = (exchange_norms(operands[0], self._product.norm_channels),)
        return partial(self._compare_vectors, operands, left.half_norms[0, image])

    def _compare_vectors(
        self, x: Encoded, half_norms: torch.Tensor, right: Tile, images: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare vectors p of an image ``(L, C)`` with those q of c others, some rows of p at a time."""
        y, right_half_norms = tuple(part[images] for part in right.operands), right.half_norms[0, images]
        rows = max(_ROWS, self.block // right_half_norms.numel())
        to_right = torch.empty_like(right_half_norms)
        to_left = torch.full_like(right_half_norms, float("inf"))
        for first in range(0, len(half_norms), rows):
            some, norms = tuple(part[first : first + rows] for part in x), half_norms[first : first + rows]
            products = self._product(some, y)  # (c, L, rows)
            if right.is_static:
                worst = float("inf") if self._product.norm_channels else float("-inf")
                products.diagonal(-first, dim1=1, dim2=2).fill_(worst)
            if self._product.norm_channels:  # |x - y|² / 2
                to_right[:, first : first + rows] = smallest(products, dim=1)
                to_left = torch.minimum(to_left, smallest(products, dim=2))
                continue
            spare = self._spare(products)[0]
            to_right[:, first : first + rows] = norms - _largest(products, right_half_norms[..., None], 1, spare)
            to_left = torch.minimum(to_left, right_half_norms - _largest(products, norms, 2, spare))
        return to_right.mul_(2).clamp_min_(0)[None], to_left.mul_(2).clamp_min_(0)[None]

    def _compare_windows(
        self, x: Encoded, left: Tile, image: int, right: Tile, images: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum products ``(c, L, L)`` over windows, for every degree."""
        products = self._product(x, tuple(part[images] for part in right.operands))
        distances = products.new_empty(2, len(left.degrees), *products.shape[:2])
        spare = self._spare(products)
        for index, degree in enumerate(left.degrees):
            similarities = _sum_windows(products, left.grid, degree // 2, spare)
            if left.scales is not None and right.scales is not None:
                similarities = torch.mul(similarities, left.scales[index, image], out=spare[0])
                similarities *= right.scales[index, images, :, None]
            if right.is_static:
                similarities.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
            if left.origin is not None and right.origin is not None:
                similarities = left.origin.complete(index, image, right.origin, images, similarities)
                distances[0, index], distances[1, index] = -similarities.amax(dim=1), -similarities.amax(dim=2)
                continue
            left_half_norms = left.half_norms[index, image]  # (L,)
            right_half_norms = right.half_norms[index, images]  # (c, L)
            largest = _largest(similarities, right_half_norms[:, :, None], dim=1, out=spare[1])  # (c, L)
            torch.sub(left_half_norms, largest, out=distances[0, index])
            largest = _largest(similarities, left_half_norms, dim=2, out=spare[1])
            torch.sub(right_half_norms, largest, out=distances[1, index])
        to_right, to_left = distances.mul_(2).clamp_min_(0)
        return to_right, to_left

    def _spare(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Return two more blocks of memory, which stay in a processor's cache and are never cleared."""
        size = like.numel()
        self._buffer = reuse_buffer(self._buffer, 2 * size, like)
        return [block.view(like.shape) for block in self._buffer[: 2 * size].split(size)]


def _sum_windows(products: torch.Tensor, grid: tuple[int, int], radius: int, spare: list[torch.Tensor]) -> torch.Tensor:
    """Sum products ``(c, L, L)`` over the windows of both sides; the result is in the second spare block."""
    if radius == 0:
        return products
    right_maps, left_maps = (len(products), *grid, -1), (-1, *grid)
    for shape, dim, target in ((right_maps, 1, 0), (right_maps, 2, 1), (left_maps, 1, 0), (left_maps, 2, 1)):
        window_sum(products.view(shape), dim, radius, out=spare[target].view(shape))
        products = spare[target]
    return products


def _largest(similarities: torch.Tensor, half_norms: torch.Tensor, dim: int, out: torch.Tensor) -> torch.Tensor:
    """Return the largest ``similarities - half_norms`` along a dimension, without the difference for unit vectors."""
    low, high = half_norms.aminmax()
    if high - low <= _ROUNDING * torch.finfo(high.dtype).eps * high:
        return similarities.amax(dim=dim) - high
    return torch.sub(similarities, half_norms, out=out).amax(dim=dim)


def reuse_buffer(buffer: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    """Return a buffer of at least so many numbers: the same, which stays in a processor's cache, if it suffices."""
    suffices = buffer.numel() >= size and buffer.dtype == like.dtype and buffer.device == like.device
    return buffer if suffices else like.new_empty(size)
