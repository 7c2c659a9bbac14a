# SPDX-License-Identifier: Apache-2.0
"""Sums over the square windows of maps, by shifted additions."""

import torch
from torch.nn import functional as F  # noqa: N812


def unit_vectors(patches: torch.Tensor, degree: int) -> torch.Tensor:
    """Return the window sums of patches ``(..., H, W, C)``, scaled to unit length: ``(..., H * W, C)``."""
    return F.normalize(window_sums(patches, degree) / degree**2, dim=-1)


def window_sums(patches: torch.Tensor, degree: int) -> torch.Tensor:
    """Sum patches ``(..., H, W, C)`` over windows of side ``degree``; returns ``(..., H * W, C)``."""
    for dim in (-3, -2):
        patches = window_sum(patches, dim, degree // 2)
    return patches.flatten(-3, -2)


def window_sum(values: torch.Tensor, dim: int, radius: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum ``2 * radius + 1`` neighbours along a dimension; places outside count as zeros.

    Args:
        values: Any shape.
        dim: Along which.
        radius: Number of neighbours on each side; at least 1 where ``out`` is given.
        out: Where to put the sums.
    """
    if radius == 0 and out is None:
        return values
    size = values.shape[dim]
    if out is None or size == 1:
        total, first = values.clone() if out is None else out.copy_(values), 1
    else:  # the first sum takes the place of a copy
        total, first = out, 2
        later, earlier = values.narrow(dim, 1, size - 1), values.narrow(dim, 0, size - 1)
        torch.add(later, earlier, out=total.narrow(dim, 1, size - 1))
        total.select(dim, 0).copy_(values.select(dim, 0))
        total.narrow(dim, 0, size - 1).add_(later)
    for shift in range(first, min(radius, size - 1) + 1):
        total.narrow(dim, shift, size - shift).add_(values.narrow(dim, 0, size - shift))
        total.narrow(dim, 0, size - shift).add_(values.narrow(dim, shift, size - shift))
    return total
