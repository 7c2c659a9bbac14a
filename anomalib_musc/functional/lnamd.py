# SPDX-License-Identifier: Apache-2.0
"""Step 1: Local Neighborhood Aggregation with Multiple Degrees (LNAMD)."""

import torch
from torch.nn import functional as F  # noqa: N812


def lnamd(feature_map: torch.Tensor, degree: int) -> torch.Tensor:
    r"""Aggregate every patch with its :math:`r \times r` neighbourhood (arXiv 2401.16753, section 3.1).

    Each image's whole map is layer-normalised over :math:`(C, H, W)` jointly, without affine. Patch :math:`p`
    becomes the mean over its window :math:`\mathcal{N}_r(p)`, where places outside the map count as zeros
    (the divisor is always :math:`r^2`), scaled to unit length:

    .. math:: \hat f_p = \frac{1}{r^2} \sum_{q \in \mathcal{N}_r(p)} f_q, \qquad
              x_p = \hat f_p / \lVert \hat f_p \rVert_2

    Args:
        feature_map: Patch features of one backbone layer, shape ``(N, C, H, W)``.
        degree: Aggregation degree :math:`r`, the side of the window in patches; odd.

    Returns:
        Unit vectors, shape ``(N, H * W, C)``, row by row; float64 for float64 input, else float32. A patch whose
        aggregated feature is zero stays zero.

    Raises:
        ValueError: If ``feature_map`` is not four-dimensional or ``degree`` is not a positive odd number.

    Example:
        >>> import torch
        >>> tokens = lnamd(torch.randn(2, 8, 5, 6), degree=3)
        >>> tokens.shape
        torch.Size([2, 30, 8])
        >>> torch.allclose(tokens.norm(dim=-1), torch.ones(2, 30))
        True
    """
    if feature_map.ndim != 4:
        msg = f"feature_map must have shape (N, C, H, W), got {tuple(feature_map.shape)}."
        raise ValueError(msg)
    if not isinstance(degree, int) or degree < 1 or degree % 2 == 0:
        msg = f"degree must be a positive odd number, got {degree!r}."
        raise ValueError(msg)
    return aggregate(normalize_map(feature_map), degree)


def normalize_map(feature_map: torch.Tensor) -> torch.Tensor:
    """Layer-normalise maps ``(N, C, H, W)`` over each image's whole map; returns patches ``(N, H, W, C)``."""
    if feature_map.dtype != torch.float64:
        feature_map = feature_map.float()
    return F.layer_norm(feature_map, feature_map.shape[1:]).permute(0, 2, 3, 1).contiguous()


def aggregate(patches: torch.Tensor, degree: int) -> torch.Tensor:
    """Average normalised patches ``(N, H, W, C)`` over their windows; returns unit vectors ``(N, H * W, C)``."""
    return F.normalize(window_sums(patches, degree) / degree**2, dim=-1)


def window_sums(patches: torch.Tensor, degree: int) -> torch.Tensor:
    """Sum patches ``(..., H, W, C)`` over their windows; returns ``(..., H * W, C)``."""
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
