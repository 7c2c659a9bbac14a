# SPDX-License-Identifier: Apache-2.0
"""How patches are rounded before they are multiplied."""

from typing import Protocol

import torch

Encoded = tuple[torch.Tensor, ...]


class Rounding(Protocol):
    """How patches are rounded before they are multiplied.

    Attributes:
        number_bytes: Memory of a rounded number, beside the number itself.
    """

    number_bytes: int

    def prepare(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches ``(b, L, C)`` in another orthonormal basis of the channels, or as they are."""

    def encode(self, patches: torch.Tensor) -> Encoded:
        """Round the prepared patches ``(b, L, C)`` of b images; what is returned has b entries too."""

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor | None:
        """Return the rounded patches ``(L, C)`` of an image; ``None`` where nothing was rounded."""


class NoRounding:
    """Patches are multiplied as they are."""

    number_bytes = 0

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

    number_bytes = 2

    def encode(self, patches: torch.Tensor) -> Encoded:
        """See :class:`Rounding`."""
        rounded = patches.half()
        if not rounded.isfinite().all():
            msg = (
                "features must be finite, and small enough for 16-bit numbers; scale them to unit length, or use "
                "precision='exact'."
            )
            raise ValueError(msg)
        return (rounded,)

    def decode(self, encoded: Encoded, image: int) -> torch.Tensor:  # type: ignore[override]
        """See :class:`Rounding`."""
        return encoded[0][image].float()
