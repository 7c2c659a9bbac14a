# SPDX-License-Identifier: Apache-2.0
"""Images are compared in plain torch, on any device."""

import functools
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.rounding import Encoded, NoRounding, Rounding
from anomalib_musc.distances.tiles import Tile
from anomalib_musc.distances.windows import window_sum

_ROUNDING = 2.5  # units in the last place of the squared norm of a unit vector


class Product(Rounding, Protocol):
    """How two images are multiplied.

    Attributes:
        result_bytes: Working memory of one product of two patches.
        channels_to_share: From so many channels on, summing a product over windows costs less than another product.
    """

    result_bytes: int
    channels_to_share: int

    def __call__(self, left: Encoded, image: int, right: Encoded, images: slice) -> torch.Tensor:
        """Multiply an image p on the left with c images q on the right: ``(c, L, L)``, over q then p.

        The next call may overwrite the result.
        """


class PlainKernel:
    """Compares images in plain torch, on any device.

    The product with a window's sum is the sum of the products with the patches of the window. So the product of two
    images is computed once, summed over the windows of both, and scaled by the norms, for every degree.

    Args:
        product: Multiplies the patches.
        block: Products that are computed at once.
    """

    def __init__(self, product: Product, block: int) -> None:
        self.block = block
        self.rounding: Rounding = product
        self.channels_to_share: float = product.channels_to_share
        self._product = product
        self._buffer = torch.empty(0)

    def pair_bytes(self, num_patches: int) -> int:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        return num_patches**2 * (self._product.result_bytes + 2 * 8)

    def __call__(self, left: Tile, image: int, right: Tile, images: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`~anomalib_musc.distances.kernels.Kernel`."""
        products = self._product(left.operands, image, right.operands, images)  # (c, L, L)
        spare = self._spare(products)
        distances = products.new_empty(2, len(left.degrees), *products.shape[:2])
        for index, degree in enumerate(left.degrees):
            similarities = _sum_windows(products, left.grid, degree // 2, spare)
            if left.scales is not None and right.scales is not None:
                similarities = torch.mul(similarities, left.scales[index, image], out=spare[0])
                similarities *= right.scales[index, images, :, None]
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


class FloatProduct(NoRounding):
    """The products in the precision of the patches."""

    result_bytes = 8
    channels_to_share = 256

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, left: Encoded, image: int, right: Encoded, images: slice) -> torch.Tensor:
        """See :class:`Product`."""
        x, y = left[0][image], right[0][images]
        num_patches, channels = x.shape
        if is_convolution_faster(x.device, x.dtype, torch.get_num_threads()):
            return _convolve(x, y.reshape(-1, channels)).view(-1, num_patches, num_patches)
        size = len(y) * num_patches**2
        self._buffer = reuse_buffer(self._buffer, size, x)
        products = self._buffer[:size].view(-1, num_patches)
        torch.mm(y.reshape(-1, channels), x.T, out=products)
        return products.view(-1, num_patches, num_patches)


def reuse_buffer(buffer: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    """Return a buffer of at least so many numbers: the same, which stays in a processor's cache, if it suffices."""
    suffices = buffer.numel() >= size and buffer.dtype == like.dtype and buffer.device == like.device
    return buffer if suffices else like.new_empty(size)


def _convolve(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``y @ x.T`` as a 1 x 1 convolution, for oneDNN."""
    pixels = y.view(1, -1, 1, y.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows of y, 1), channels last
    return F.conv2d(pixels, x[:, :, None, None])[0, :, :, 0].T


@functools.lru_cache
def is_convolution_faster(device: torch.device, dtype: torch.dtype, num_threads: int) -> bool:
    """Try whether oneDNN multiplies faster than the BLAS of this torch, which is twice as slow on some processors."""
    # With one thread, torch does not give such convolutions to oneDNN.
    if device.type != "cpu" or dtype != torch.float32 or num_threads == 1 or not has_onednn():
        return False
    x, y = torch.rand(2, 512, 512)
    return _seconds(lambda: _convolve(x, y)) < _seconds(lambda: y @ x.T)


def has_onednn() -> bool:
    """Whether this torch has oneDNN, and may use it."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest of a few times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
