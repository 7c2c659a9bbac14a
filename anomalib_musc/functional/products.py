# SPDX-License-Identifier: Apache-2.0
"""Products of the patches of one image with those of several others: as they are, or in 8-bit integers."""

from typing import Protocol

import torch

# Two 8-bit numbers stand for one: x = scale * (high + low / _STEPS), where low fills the gap between two highs.
_LARGEST = 127
_STEPS = 254
_SPREAD = 64


class Product(Protocol):
    """How two images are multiplied.

    Attributes:
        bytes_of_number: Memory of an encoded number, beside the number itself.
        bytes_of_result: Working memory of one product.
    """

    bytes_of_number: int
    bytes_of_result: int

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Prepare the patches ``(b, L, C)`` of b images; what is returned has b entries too."""

    def __call__(
        self,
        left: tuple[torch.Tensor, ...],
        image: int,
        right: tuple[torch.Tensor, ...],
        images: slice,
        out: torch.Tensor,
    ) -> None:
        """Write the products of one image on the left with c on the right to ``out (L, c * L)``."""


class ExactProduct:
    """The products in the precision of the features."""

    bytes_of_number = 0
    bytes_of_result = 0

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Take the patches as they are."""
        return (patches,)

    def __call__(
        self,
        left: tuple[torch.Tensor, ...],
        image: int,
        right: tuple[torch.Tensor, ...],
        images: slice,
        out: torch.Tensor,
    ) -> None:
        """Multiply."""
        torch.mm(left[0][image], right[0][images].flatten(0, 1).T, out=out)


class EightBitProduct:
    r"""Products of numbers of 15 bits in three products of 8-bit integers, on a processor that has those.

    With the largest number of a patch as its scale, :math:`x = s (h + l / 254)` and

    .. math:: x y \approx s_x s_y \left( h_x h_y + (h_x l_y + l_x h_y) / 254 \right)

    Before, the channels are mixed by an orthogonal matrix, which changes no product but spreads single large
    numbers, as transformers have them, over 64 channels: the largest number decides the error of all others.
    """

    bytes_of_number = 2
    bytes_of_result = 8

    def __init__(self) -> None:
        self._integers = torch.empty(0, dtype=torch.int32)

    @staticmethod
    def is_supported(device: torch.device) -> bool:
        """Whether the processor multiplies 8-bit integers fast and without saturation."""
        return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the high and the low parts ``(b, L, C)`` and the scale ``(b, L)``."""
        high = torch.empty(patches.shape, dtype=torch.int8)
        low = torch.empty_like(high)
        scale = patches.new_empty(patches.shape[:2])
        for index, image in enumerate(patches):
            mixed = _mix(image)
            largest = mixed.abs().amax(dim=-1).clamp_min_(torch.finfo(mixed.dtype).tiny * _LARGEST)
            scale[index] = largest / _LARGEST
            mixed /= scale[index, :, None]
            high[index] = mixed.round()
            low[index] = mixed.sub_(high[index]).mul_(_STEPS).round_()
        return high, low, scale

    def __call__(
        self,
        left: tuple[torch.Tensor, ...],
        image: int,
        right: tuple[torch.Tensor, ...],
        images: slice,
        out: torch.Tensor,
    ) -> None:
        """Multiply."""
        (high_x, low_x, scale_x), (high_y, low_y, scale_y) = (
            [part[image] for part in left],
            [part[images].flatten(0, 1) for part in right],
        )
        if self._integers.numel() < 2 * out.numel():
            self._integers = torch.empty(2 * out.numel(), dtype=torch.int32)
        first, second = self._integers[: 2 * out.numel()].view(2, *out.shape)
        torch._int_mm(high_x, low_y.T, out=first)
        torch._int_mm(low_x, high_y.T, out=second)
        out.copy_(first.add_(second)).div_(_STEPS)
        torch._int_mm(high_x, high_y.T, out=first)
        out.add_(first).mul_(scale_y).mul_(scale_x[:, None])


def _mix(patches: torch.Tensor) -> torch.Tensor:
    """Multiply the channels of ``(L, C)``, as far as a power of two divides C, with signs and a Hadamard matrix."""
    channels = patches.shape[-1]
    size = min(channels & -channels, _SPREAD)
    hadamard = patches.new_ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (channels,), generator=generator) * 2 - 1
    groups = (patches * signs).view(-1, size, channels // size).transpose(1, 2)
    return (groups @ hadamard / size**0.5).reshape(patches.shape)
