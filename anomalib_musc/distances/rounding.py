# SPDX-License-Identifier: Apache-2.0
"""How patches are rounded before they are multiplied."""

from typing import Protocol

import torch

from anomalib_musc.distances.storage import first_bytes

Encoded = tuple[torch.Tensor, ...]


class Rounding(Protocol):
    """How patches are rounded before they are multiplied.

    Attributes:
        number_bytes: Memory of a rounded number, beside the number itself.
        norm_channels: How many channels hold norms beside those of a patch.
        channel_multiple: Zeros are added to the channels of rounded patches up to a multiple of this.
    """

    number_bytes: int
    norm_channels: int
    channel_multiple: int

    def change_basis(self, patches: torch.Tensor) -> None:
        """Turn patches ``(..., L, C)`` to another orthonormal basis of the channels, in place, or leave them."""

    def allocate(self, patches: torch.Tensor, memory: torch.Tensor | None = None) -> Encoded:
        """Return where patches of b images go when they are rounded; each part has b entries.

        Args:
            patches: Shape ``(b, L, C)``, or ``(b, L, C + norm_channels)``; they are not read.
            memory: Bytes where the rounded numbers may be. Defaults to new ones.
        """

    def encode(self, patches: torch.Tensor, out: Encoded) -> None:
        """Round patches of some of these images, in the basis of :meth:`change_basis`; norms are not written yet."""

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor | None:
        """Write the rounded patches of n images to ``out``, ``(n, L, C)``; ``None`` where nothing was rounded."""

    def write_norms(self, encoded: Encoded, half_norms: torch.Tensor) -> None:
        """Fill the channels for norms: the first half with half the squared norms, ``(b, L)``, the others with ones.

        A product of two gives |x - y|² / 2 at once, where one faces the other, see :func:`exchange_norms`.
        """


class NoRounding:
    """Patches are multiplied as they are."""

    number_bytes = 0
    norm_channels = 0
    channel_multiple = 1

    def change_basis(self, patches: torch.Tensor) -> None:
        """See :class:`Rounding`."""

    def allocate(self, patches: torch.Tensor, memory: torch.Tensor | None = None) -> Encoded:
        """See :class:`Rounding`."""
        del memory
        return (patches,)

    def encode(self, patches: torch.Tensor, out: Encoded) -> None:
        """See :class:`Rounding`."""

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Rounding`."""
        del encoded, out
        return None

    def write_norms(self, encoded: Encoded, half_norms: torch.Tensor) -> None:
        """See :class:`Rounding`."""


class ScaledParts(NoRounding):
    """Patches are rounded to float16, or split into the sum of two such numbers, scaled by a power of two an image.

    Two keep 22 bits of each number, as many as matter beside the sums of a GPU.

    Args:
        count: 1 or 2.
    """

    channel_multiple = 64
    _EXPONENT = 15  # of the largest number of an image, just below the largest of float16

    def __init__(self, count: int) -> None:
        self.number_bytes = 2 * count
        self._count = count

    def allocate(self, patches: torch.Tensor, memory: torch.Tensor | None = None) -> Encoded:
        """Return the parts, ``(b, L, count, C)`` with C as a multiple, and what they are multiplied by, ``(b,)``."""
        num_images, num_patches, channels = patches.shape
        shape = num_images, num_patches, self._count, channels + -channels % self.channel_multiple
        if memory is None:
            parts = patches.new_empty(shape, dtype=torch.float16)
        else:
            parts = first_bytes(memory, shape, torch.float16)
        parts[..., channels:] = 0
        return parts, patches.new_empty(num_images)

    def encode(self, patches: torch.Tensor, out: Encoded) -> None:
        """See :class:`Rounding`."""
        parts, scales = out
        low, high = patches.flatten(1).aminmax(dim=1)
        exponents = torch.frexp(torch.maximum(-low, high)).exponent.clamp(min=-100)  # of zeros, too
        bits = (exponents - self._EXPONENT + 127) << 23  # of a power of two: torch.ldexp rounds on a GPU
        scales.copy_(bits.view(torch.float32))
        rest = patches / scales[:, None, None]
        for part in parts[..., : patches.shape[-1]].unbind(dim=2):
            part.copy_(rest)
            rest -= part

    def decode(self, encoded: Encoded, out: torch.Tensor) -> torch.Tensor | None:
        """See :class:`Rounding`."""
        parts, scales = encoded
        if self._count > 1:
            return None
        return torch.mul(parts[:, :, 0, : out.shape[-1]], scales[:, None, None], out=out)


def rounded_numbers(like: torch.Tensor, dtype: torch.dtype, memory: torch.Tensor | None) -> torch.Tensor:
    """Return a tensor of the same shape and order in another type, in the first bytes of some memory or a new one."""
    if memory is None:
        return torch.empty_like(like, dtype=dtype)
    strides = torch.empty_like(like, device="meta").stride()
    return first_bytes(memory, (like.numel(),), dtype).as_strided(like.shape, strides)


def exchange_norms(operand: torch.Tensor, norm_channels: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return an operand with patches negated, norms and ones exchanged; see :meth:`Rounding.write_norms`."""
    facing, half = torch.neg(operand, out=out), norm_channels // 2
    facing[..., -half:] = operand[..., -norm_channels:-half]
    facing[..., -norm_channels:-half] = operand[..., -half:]
    return facing


def smallest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the smallest values along a dimension, of none that is NaN, and of negative 16-bit numbers any."""
    return in_order(values).amin(dim=dim).view(values.dtype)


def in_order(values: torch.Tensor) -> torch.Tensor:
    """Return numbers in the same memory that are ordered like the values: of 16-bit ones the integers of the same bits.

    Processors compare many of those at a time. NaN and negative numbers, which rounding makes of 0, have no order.
    """
    return values.view(torch.int16) if values.element_size() == 2 and values.device.type == "cpu" else values
