# SPDX-License-Identifier: Apache-2.0
"""Step 1: Local Neighborhood Aggregation with Multiple Degrees (LNAMD)."""

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.survey import check_values
from anomalib_musc.functional.arguments import check_maps

_EPS = 1e-5  # as in F.layer_norm


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
        ValueError: If ``feature_map`` does not have that shape, holds a number that is not finite or above 1e15
            (float32), or ``degree`` is not a positive odd number.

    Example:
        >>> import torch
        >>> tokens = lnamd(torch.randn(2, 8, 5, 6), degree=3)
        >>> tokens.shape
        torch.Size([2, 30, 8])
        >>> torch.allclose(tokens.norm(dim=-1), torch.ones(2, 30))
        True
    """
    check_maps(feature_map)
    if not isinstance(degree, int) or degree < 1 or degree % 2 == 0:
        msg = f"degree must be a positive odd number, got {degree!r}."
        raise ValueError(msg)
    if not torch.compiler.is_compiling():  # an exported model takes what it gets
        check_values(feature_map, range(len(feature_map)), "feature_map")
    normalized = layer_norm(feature_map).contiguous(memory_format=torch.channels_last)  # averaged faster so
    means = F.avg_pool2d(normalized, degree, stride=1, padding=degree // 2)  # (N, C, H, W)
    return F.normalize(means.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)  # (N, H * W, C)


def layer_norm(feature_map: torch.Tensor) -> torch.Tensor:
    """Normalise each image's whole map ``(N, C, H, W)`` to mean 0 and variance 1, in float32 or float64."""
    feature_map = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
    if not feature_map.is_cuda:
        return F.layer_norm(feature_map, feature_map.shape[1:])
    variances, means = torch.var_mean(feature_map, dim=(1, 2, 3), correction=0, keepdim=True)
    return (feature_map - means) * torch.rsqrt(variances + _EPS)  # F.layer_norm would leave each map to one processor
