# SPDX-License-Identifier: Apache-2.0
"""The distance of every patch to the nearest patch of another image; each pair of images is multiplied once."""

import math
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import torch

from anomalib_musc.distances.products import (
    EightBitProduct,
    ExactProduct,
    HalfRounding,
    NoRounding,
    Product,
    Rounding,
    grown,
)
from anomalib_musc.distances.tiles import Tile
from anomalib_musc.functional.lnamd import window_sum

try:
    from anomalib_musc.distances import triton_kernel
except ImportError:  # Triton comes with PyTorch for NVIDIA's GPUs
    HAS_TRITON = False
else:
    HAS_TRITON = True

# Products in a block: what stays in a processor's cache, and what fills a GPU.
_CPU_BLOCK = 2**20
_GPU_BLOCK = 2**27
_ROUNDING = 2.5  # units in the last place of the squared norm of a unit vector

Precision = Literal["exact", "fast"]


class Comparison(Protocol):
    """How one image is compared with several.

    Attributes:
        rounding: How patches are rounded before.
        channels_to_share: From so many channels on, one comparison at all degrees is less work than one at each.
        block: Products that are best computed at once.
    """

    rounding: Rounding
    channels_to_share: float
    block: int

    def bytes_of_pair(self, num_patches: int) -> int:
        """Return the working memory of comparing an image with one other."""

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare the image of one tile with c images of another.

        Returns:
            Squared distances ``(D, c, L)``: of the image's patches to each of the others, and of theirs to it.
        """


class PlainComparison:
    """Compares images in plain torch, on any device.

    The product with an aggregated patch is the sum of the products with the patches of its window. So the product of
    two images is computed once, summed over the windows of both, and scaled by the norms, for every degree.

    Args:
        product: Multiplies the patches.
        block: Products that are computed at once.
    """

    def __init__(self, product: Product, block: int) -> None:
        self.block = block
        self.rounding: Rounding = product
        self.channels_to_share: float = product.channels_to_share
        self._product = product
        self._memory = torch.empty(0)

    def bytes_of_pair(self, num_patches: int) -> int:
        """See :class:`Comparison`."""
        return num_patches**2 * (self._product.bytes_of_result + 2 * 8)

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Comparison`."""
        products = self._product(left.operands, image, right.operands, images)  # (c, L, L)
        spare = self._spare(products)
        distances = products.new_empty(2, len(left.degrees), *products.shape[:2])
        for index, degree in enumerate(left.degrees):
            similarities = _sum_windows(products, left.grid, degree // 2, spare)
            if left.scales is not None and right.scales is not None:
                similarities = torch.mul(similarities, left.scales[index, image], out=spare[0])
                similarities *= right.scales[index, images, :, None]
            of_left, of_right = left.half_norms[index, image], right.half_norms[index, images]  # (L,), (c, L)
            largest = _largest(similarities, of_right[:, :, None], dim=1, out=spare[1])  # (c, L)
            torch.sub(of_left, largest, out=distances[0, index])
            largest = _largest(similarities, of_left, dim=2, out=spare[1])
            torch.sub(of_right, largest, out=distances[1, index])
        to_right, to_left = distances.mul_(2).clamp_min_(0)
        return to_right, to_left

    def _spare(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Return two more blocks of memory, which stay in a processor's cache and are never cleared."""
        size = like.numel()
        self._memory = grown(self._memory, 2 * size, like)
        return [block.view(like.shape) for block in self._memory[: 2 * size].split(size)]


def _sum_windows(products: torch.Tensor, grid: tuple[int, int], radius: int, spare: list[torch.Tensor]) -> torch.Tensor:
    """Sum products ``(c, L, L)`` over the windows of both sides; the result is in the second spare block."""
    if radius == 0:
        return products
    of_right, of_left = (len(products), *grid, -1), (-1, *grid)
    for shape, dim, target in ((of_right, 1, 0), (of_right, 2, 1), (of_left, 1, 0), (of_left, 2, 1)):
        window_sum(products.view(shape), dim, radius, out=spare[target].view(shape))
        products = spare[target]
    return products


def _largest(similarities: torch.Tensor, half_norms: torch.Tensor, dim: int, out: torch.Tensor) -> torch.Tensor:
    """Return the largest ``similarities - half_norms`` along a dimension, without the difference for unit vectors."""
    low, high = half_norms.aminmax()
    if high - low <= _ROUNDING * torch.finfo(high.dtype).eps * high:
        return similarities.amax(dim=dim) - high
    return torch.sub(similarities, half_norms, out=out).amax(dim=dim)


class TritonComparison:
    """Compares images in one GPU kernel, which never writes the products to memory.

    Args:
        is_half: Whether 16-bit numbers are multiplied; their products are added in float32.
    """

    channels_to_share = math.inf
    block = 2**31

    def __init__(self, is_half: bool) -> None:
        self.rounding: Rounding = HalfRounding() if is_half else NoRounding()

    def bytes_of_pair(self, num_patches: int) -> int:
        """See :class:`Comparison`."""
        return 4 * (triton_kernel.num_partials(num_patches) + 4 * num_patches)

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Comparison`."""
        (x,), (y,), (of_left,), (of_right,) = left.operands, right.operands, left.half_norms, right.half_norms
        second = torch.arange(images.start, images.stop, device=of_left.device)
        first = torch.full_like(second, image)
        rows, columns = triton_kernel.nearest_pairs(x, of_left, y, of_right, first, second)
        to_right, to_left = of_left[image] - rows, of_right[images] - columns
        return to_right.mul_(2).clamp_min_(0)[None], to_left.mul_(2).clamp_min_(0)[None]


def check_precision(precision: str) -> None:
    """Raise a ValueError unless ``precision`` is ``"exact"`` or ``"fast"``."""
    if precision not in get_args(Precision):
        msg = f"precision must be one of {get_args(Precision)}, got {precision!r}."
        raise ValueError(msg)


def make_comparison(precision: Precision, like: torch.Tensor) -> Comparison:
    """Choose how images are compared on the device of a tensor, and in its type."""
    check_precision(precision)
    is_fast = precision == "fast"
    if like.dtype == torch.float32 and HAS_TRITON and triton_kernel.is_usable(like.device):
        return TritonComparison(is_half=is_fast)
    if like.dtype == torch.float32 and is_fast and EightBitProduct.is_supported(like.device):
        return PlainComparison(EightBitProduct(), _CPU_BLOCK)
    return PlainComparison(ExactProduct(), _CPU_BLOCK if like.device.type == "cpu" else _GPU_BLOCK)


def compare_tiles(
    left: Tile,
    right: Tile,
    compare: Comparison,
    chunk: int,
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """Compare every image of a tile with every image of another, or of itself; each pair once.

    Yields:
        The image on the left, the c images on the right, and both distances ``(D, c, L)``, as ``compare`` does.
    """
    resolution = max(left.resolution, right.resolution)
    for image in range(len(left.patches)):
        start = image + 1 if right is left else 0
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            to_right, to_left = compare(left, image, right, images)
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
            judged, judge = left[0].vectors(left[1], degree), right[0].vectors(right[1] + other, degree)
            if is_mirrored:
                judged, judge = judge, judged
            patches = is_spoilt[degree, other]
            exact = torch.cdist(_in_float64(judged[patches]), _in_float64(judge)).amin(dim=1)
            distances[degree, other, patches] = exact.square().to(distances)


def _in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # which has no float64
