# SPDX-License-Identifier: Apache-2.0
"""How patches are rounded before they are multiplied."""

from typing import Protocol

import torch

Encoded = tuple[torch.Tensor, ...]


class Rounding(Protocol):
    """How patches are rounded before they are multiplied.

    Attributes:
        number_bytes: Memory of a rounded number, beside the number itself.
        norm_channels: How many channels hold norms beside those of a patch.
    """

    number_bytes: int
    norm_channels: int

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches ``(b, L, C)`` in another orthonormal basis of the channels, or as they are."""

    def encode(self, patches: torch.Tensor) -> Encoded:
        """Round the prepared patches ``(b, L, C)`` of b images; what is returned has b entries too."""

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor | None:
        """Return the rounded patches ``(L, C)`` of an image; ``None`` where nothing was rounded."""

    def with_norms(self, storage: torch.Tensor, encoded: Encoded, half_norms: torch.Tensor) -> Encoded:
        """Return operands whose last channels hold half the squared norms, then ones, in as many channels.

        A product of two of them gives -|x - y|² / 2 at once, where one has them exchanged and negated.

        Args:
            storage: Patches before they were rounded, with room for norms, ``(b, L, C + norm_channels)``.
            encoded: The rounded patches.
            half_norms: Half the squared norms, ``(b, L)``.
        """


class NoRounding:
    """Patches are multiplied as they are."""

    number_bytes = 0
    norm_channels = 0

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`Rounding`."""
        return patches

    def encode(self, patches: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        return (patches,)

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor | None:
        """See :class:`Rounding`."""
        del encoded, image
        return None

    def with_norms(self, storage: torch.Tensor, encoded: Encoded, half_norms: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        del storage, half_norms
        return encoded


class SixteenBitRounding(NoRounding):
    """Patches are rounded to 16-bit numbers.

    Args:
        dtype: float16 or bfloat16.
    """

    number_bytes = 2

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype = dtype

    def encode(self, patches: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        return (self._round(patches),)

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor:
        """See :class:`Rounding`."""
        return encoded[0][image].float()

    def _round(self, numbers: torch.Tensor) -> torch.Tensor:
        (low, high), most = numbers.aminmax(), torch.finfo(self.dtype).max
        if not (low >= -most and high <= most):  # nor is NaN
            msg = (
                "features must be finite, and small enough for 16-bit numbers; scale them to unit length, or use "
                "precision='exact'."
            )
            raise ValueError(msg)
        return numbers.to(self.dtype)


def exchange_norms(operand: torch.Tensor, norm_channels: int) -> torch.Tensor:
    """Return an operand ``(..., C + norm_channels)`` with norms and ones exchanged, and negated; see ``with_norms``."""
    facing = operand.clone()
    facing[..., -norm_channels:] = -operand[..., -norm_channels:].roll(norm_channels // 2, dims=-1)
    return facing
