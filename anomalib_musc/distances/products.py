# SPDX-License-Identifier: Apache-2.0
"""Products of the patches of one image with those of several others: in float32, or in 8-bit integers."""

import functools
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F  # noqa: N812

Encoded = tuple[torch.Tensor, ...]

_LARGEST = 127
_SPREAD = 64


class Rounding(Protocol):
    """How patches are rounded before they are multiplied.

    Attributes:
        bytes_of_number: Memory of a rounded number, beside the number itself.
    """

    bytes_of_number: int

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches ``(b, L, C)`` in another orthonormal basis of the channels, or as they are."""

    def encode(self, patches: torch.Tensor) -> Encoded:
        """Round the prepared patches ``(b, L, C)`` of b images; what is returned has b entries too."""

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor | None:
        """Return the rounded patches ``(L, C)`` of an image; ``None`` where nothing was rounded."""


class Product(Rounding, Protocol):
    """How two images are multiplied.

    Attributes:
        bytes_of_result: Working memory of one product of two patches.
        channels_to_share: From so many channels on, summing a product over windows costs less than another product.
    """

    bytes_of_result: int
    channels_to_share: int

    def __call__(self, left: Encoded, image: int, right: Encoded, images: slice) -> torch.Tensor:
        """Multiply an image p on the left with c images q on the right: ``(c, L, L)``, over q then p.

        The next call may overwrite the result.
        """


class NoRounding:
    """Patches are multiplied as they are."""

    bytes_of_number = 0

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`Rounding`."""
        return patches

    def encode(self, patches: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        return (patches,)

    def decode(self, encoded: Encoded, image: int) -> None:
        """See :class:`Rounding`."""


class HalfRounding(NoRounding):
    """Patches are rounded to float16."""

    bytes_of_number = 2

    def encode(self, patches: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        rounded = patches.half()
        if not rounded.isfinite().all():
            msg = "features are too large for 16-bit numbers; scale them to unit length, or use precision='exact'."
            raise ValueError(msg)
        return (rounded,)

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor:  # type: ignore[override]
        """See :class:`Rounding`."""
        return encoded[0][image].float()


class ExactProduct(NoRounding):
    """The products in the precision of the patches."""

    bytes_of_result = 8
    channels_to_share = 256

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, left: Encoded, image: int, right: Encoded, images: slice) -> torch.Tensor:
        """See :class:`Product`."""
        x, y = left[0][image], right[0][images]
        num_patches, channels = x.shape
        if is_convolution_faster(x.device, x.dtype, torch.get_num_threads()):
            return _convolve(x, y.reshape(-1, channels)).view(-1, num_patches, num_patches)
        size = len(y) * num_patches**2
        self._memory = grown(self._memory, size, x)
        products = self._memory[:size].view(-1, num_patches)
        torch.mm(y.reshape(-1, channels), x.T, out=products)
        return products.view(-1, num_patches, num_patches)


def grown(memory: torch.Tensor, size: int, like: torch.Tensor) -> torch.Tensor:
    """Return memory of at least so many numbers: the same again, which stays in a processor's cache, if it suffices."""
    suffices = memory.numel() >= size and memory.dtype == like.dtype and memory.device == like.device
    return memory if suffices else like.new_empty(size)


def _convolve(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``y @ x.T`` as a 1 x 1 convolution, for oneDNN."""
    pixels = y.view(1, -1, 1, y.shape[-1]).permute(0, 3, 1, 2)  # (1, C, rows of y, 1), channels last
    return F.conv2d(pixels, x[:, :, None, None])[0, :, :, 0].T


@functools.lru_cache
def is_convolution_faster(device: torch.device, dtype: torch.dtype, num_threads: int) -> bool:
    """Try whether oneDNN multiplies faster than the BLAS of this torch, which is twice as slow on some processors."""
    # With one thread, torch does not give such convolutions to oneDNN.
    if device.type != "cpu" or dtype != torch.float32 or num_threads == 1 or not _has_onednn():
        return False
    x, y = torch.rand(2, 512, 512)
    return _seconds(lambda: _convolve(x, y)) < _seconds(lambda: y @ x.T)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest of a few times."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class EightBitProduct:
    """Products of 8-bit integers, on a processor that has those; the largest number of a patch is 127.

    Before, the channels are mixed by an orthogonal matrix, which changes no distance but spreads single large numbers,
    as transformers have them, over 64 channels: the largest number decides the error of all others.
    """

    bytes_of_number = 1
    bytes_of_result = 8
    channels_to_share = 640

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.int32)

    @staticmethod
    def is_supported(device: torch.device) -> bool:
        """Whether the processor multiplies 8-bit integers fast and without saturation."""
        return device.type == "cpu" and _has_onednn() and torch.cpu._is_vnni_supported()

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """Multiply the channels, as far as a power of two divides C, with signs and a Hadamard matrix."""
        channels = patches.shape[-1]
        size = min(channels & -channels, _SPREAD)
        hadamard = patches.new_ones(1, 1)
        while len(hadamard) < size:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(0)) * 2 - 1
        mixed = torch.empty_like(patches)
        for source, target in zip(patches, mixed, strict=True):
            groups = (source * signs).reshape(-1, size, channels // size).transpose(1, 2)
            target.copy_((groups @ hadamard / size**0.5).reshape(source.shape))
        return mixed

    def encode(self, patches: torch.Tensor) -> Encoded:
        """Return the integers ``(b, L, C)`` and what they are multiplied by, ``(b, L)``."""
        integers = torch.empty(patches.shape, dtype=torch.int8)
        scales = patches.new_empty(patches.shape[:2])
        for index, image in enumerate(patches):
            largest = image.abs().amax(dim=-1).clamp_min_(torch.finfo(image.dtype).tiny * _LARGEST)
            scales[index] = largest / _LARGEST
            integers[index] = (image / scales[index, :, None]).round_()
        return integers, scales

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor:
        """See :class:`Product`."""
        integers, scales = encoded
        return integers[image] * scales[image, :, None]

    def __call__(self, left: Encoded, image: int, right: Encoded, images: slice) -> torch.Tensor:
        """See :class:`Product`."""
        (x, scales_x), (y, scales_y) = left, right
        num_patches, count = x.shape[1], images.stop - images.start
        size = count * num_patches**2
        self._memory = grown(self._memory, 2 * size, self._memory)
        integers, products = self._memory[: 2 * size].view(2, count, num_patches, num_patches)
        torch._int_mm(y[images].flatten(0, 1), x[image].T, out=integers.flatten(0, 1))
        torch.mul(integers, scales_x[image], out=products.view(torch.float32))
        return products.view(torch.float32).mul_(scales_y[images, :, None])
