# SPDX-License-Identifier: Apache-2.0
"""The distance of every patch to the nearest patch of another image; each pair of images is multiplied once."""

import math
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import torch

from anomalib_musc.functional.lnamd import window_sum
from anomalib_musc.functional.products import EightBitProduct, ExactProduct, Product
from anomalib_musc.functional.tiles import Tile

try:
    from anomalib_musc.functional import triton_kernel
except ImportError:  # Triton comes with PyTorch for NVIDIA's GPUs
    HAS_TRITON = False
else:
    HAS_TRITON = True

Precision = Literal["exact", "fast"]


class Comparison(Protocol):
    """How one image is compared with several."""

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Prepare the patches ``(b, L, C)`` of b images for products; what is returned has b entries too."""

    def bytes_of_image(self, num_patches: int, channels: int) -> int:
        """Return the memory of one encoded image, beside its patches."""

    def bytes_of_pair(self, num_patches: int, num_degrees: int) -> int:
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
    """

    def __init__(self, product: Product, like: torch.Tensor) -> None:
        self._product = product
        self._memory = like.new_empty(0)

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See :class:`Comparison`."""
        return self._product.encode(patches)

    def bytes_of_image(self, num_patches: int, channels: int) -> int:
        """See :class:`Comparison`."""
        return num_patches * channels * self._product.bytes_of_number

    def bytes_of_pair(self, num_patches: int, num_degrees: int) -> int:
        """See :class:`Comparison`."""
        itemsize = self._memory.dtype.itemsize
        return num_patches**2 * (_num_blocks(num_degrees) * itemsize + self._product.bytes_of_result)

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Comparison`."""
        num_patches, count = left.patches.shape[1], images.stop - images.start
        blocks = self._blocks(_num_blocks(len(left.degrees)), (num_patches, count, num_patches))
        self._product(left.operands, image, right.operands, images, out=blocks[0].flatten(1))
        distances = left.patches.new_empty(2, len(left.degrees), count, num_patches)
        for index, degree in enumerate(left.degrees):
            products = _sum_windows(blocks, left.grid, degree // 2)
            if left.scales is not None and right.scales is not None:
                products = torch.mul(products, right.scales[index, images], out=blocks[1])
                products.mul_(left.scales[index, image, :, None, None])
            of_left, of_right = left.half_norms[index, image], right.half_norms[index, images]  # (L,), (c, L)
            largest = torch.sub(products, of_right, out=blocks[-1]).amax(dim=2)  # (L, c)
            distances[0, index] = (of_left[:, None] - largest).T
            largest = torch.sub(products, of_left[:, None, None], out=blocks[-1]).amax(dim=0)  # (c, L)
            distances[1, index] = of_right - largest
        to_right, to_left = distances.mul_(2).clamp_min_(0)
        return to_right, to_left

    def _blocks(self, number: int, shape: tuple[int, int, int]) -> list[torch.Tensor]:
        """Return memory that stays in a processor's cache, as it is used again and never cleared."""
        size = math.prod(shape)
        if self._memory.numel() < number * size:
            self._memory = self._memory.new_empty(number * size)
        return [block.view(shape) for block in self._memory[: number * size].split(size)]


def _num_blocks(num_degrees: int) -> int:
    return 2 if num_degrees == 1 else 3


def _sum_windows(blocks: list[torch.Tensor], grid: tuple[int, int], radius: int) -> torch.Tensor:
    """Sum the products ``(L, c, L)`` of the first block over the windows of both sides, in the other blocks."""
    source = blocks[0]
    if radius == 0:
        return source
    left, right = (*grid, -1), (-1, *grid)
    for shape, dim, target in ((left, 0, 1), (left, 1, 2), (right, 1, 1), (right, 2, 2)):
        window_sum(source.view(shape), dim, radius, out=blocks[target].view(shape))
        source = blocks[target]
    return source


class TritonComparison:
    """Compares images in one GPU kernel, which never writes the products to memory.

    Args:
        dtype: Type of the numbers that are multiplied; their products are added in float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the rounded patches and half their squared norms, ``(b, L)``."""
        rounded = patches.to(self._dtype).contiguous()
        half_norms = torch.stack([image.float().square().sum(dim=-1) / 2 for image in rounded])
        if not half_norms.isfinite().all():
            msg = "features are too large for 16-bit numbers; scale them to unit length, or use precision='exact'."
            raise ValueError(msg)
        return rounded, half_norms

    def bytes_of_image(self, num_patches: int, channels: int) -> int:
        """See :class:`Comparison`."""
        return num_patches * (channels * self._dtype.itemsize + 4)

    def bytes_of_pair(self, num_patches: int, num_degrees: int) -> int:
        """See :class:`Comparison`."""
        del num_degrees
        return 4 * (triton_kernel.num_partials(num_patches) + 4 * num_patches)

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Comparison`."""
        (x, of_left), (y, of_right) = left.operands, right.operands
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
        return TritonComparison(torch.float16 if is_fast else torch.float32)
    if like.dtype == torch.float32 and is_fast and EightBitProduct.is_supported(like.device):
        return PlainComparison(EightBitProduct(), like)
    return PlainComparison(ExactProduct(), like)


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
    for image in range(len(left.patches)):
        start = image + 1 if right is left else 0
        for first in range(start, len(right.patches), chunk):
            images = slice(first, min(first + chunk, len(right.patches)))
            to_right, to_left = compare(left, image, right, images)
            _restore_small_distances(to_right, to_left, left, image, right, images)
            yield image, images, to_right.sqrt_(), to_left.sqrt_()


def _restore_small_distances(
    to_right: torch.Tensor, to_left: torch.Tensor, left: Tile, image: int, right: Tile, images: slice
) -> None:
    """Recompute in float64, in place, the squared distances that cancellation has spoilt."""
    resolution = max(left.resolution, right.resolution)
    if min(to_right.min(), to_left.min()) >= resolution:
        return
    for distances, is_mirrored in ((to_right, False), (to_left, True)):
        spoilt = distances < resolution  # (D, c, L)
        for index, other in spoilt.any(dim=-1).nonzero().tolist():
            judged, judge = left.vectors(image, index), right.vectors(images.start + other, index)
            if is_mirrored:
                judged, judge = judge, judged
            patches = spoilt[index, other]
            exact = torch.cdist(_in_float64(judged[patches]), _in_float64(judge)).amin(dim=1)
            distances[index, other, patches] = exact.square().to(distances)


def _in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()  # which has no float64
