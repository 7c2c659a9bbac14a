# SPDX-License-Identifier: Apache-2.0
"""Steps 1 and 2 for one layer: LNAMD and MSM at several degrees, with one product of two images for all of them."""

import functools
from collections.abc import Callable, Sequence

import torch

from anomalib_musc.distances.comparison import Precision, make_comparison
from anomalib_musc.distances.scheduling import Workload
from anomalib_musc.distances.storage import release
from anomalib_musc.distances.tiles import CancellingWindowsError, Tile, tile_of_maps, tile_of_vectors
from anomalib_musc.functional.lnamd import lnamd, normalize_map
from anomalib_musc.functional.mutual_scoring import average_interval, check_pool


def layer_scores(
    feature_map: torch.Tensor,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    images: Sequence[int] | None = None,
    precision: Precision = "exact",
    memory_budget: float | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    r"""Aggregate and score the patches of one layer, averaged over the degrees (arXiv 2401.16753, sections 3.1, 3.2).

    Equal to the mean of ``mutual_scores(lnamd(feature_map, degree), interval)`` over the degrees, with less work:
    the product of two aggregated patches is the sum of the products of the patches in their windows, so that one
    product of two images serves all degrees,

    .. math:: \hat f_p^{(r)} \cdot \hat g_q^{(r)}
              = \frac{1}{r^4} \sum_{u \in \mathcal{N}_r(p)} \sum_{v \in \mathcal{N}_r(q)} f_u \cdot g_v

    Args:
        feature_map: Patch features of one backbone layer, shape ``(N, C, H, W)``.
        degrees: LNAMD's aggregation degrees, odd numbers.
        interval: See :func:`~anomalib_musc.functional.mutual_scores`, as ``precision``, ``memory_budget``, ``device``.
        images: Indices of the images that form the pool, n of them. Defaults to all.
        precision: "exact" or "fast".
        memory_budget: GiB that the computation may take, beside ``feature_map``.
        device: Where to compute. Defaults to where ``feature_map`` is.
        progress: Called with the number of image pairs just compared, each counted once a degree.

    Returns:
        Patch scores of the pool's images on ``device``, shape ``(n, H * W)``.

    Raises:
        ValueError: If there are fewer than two images, a feature is not finite, or an argument is out of range.
        OSError: If there is no room for temporary files.

    Example:
        >>> import torch
        >>> layer_scores(torch.randn(4, 16, 5, 6), degrees=(1, 3)).shape
        torch.Size([4, 30])
    """
    if feature_map.ndim != 4 or 0 in feature_map.shape[1:]:
        msg = f"feature_map must have shape (N, C, H, W), got {tuple(feature_map.shape)}."
        raise ValueError(msg)
    check_degrees(degrees)
    pool = range(len(feature_map)) if images is None else images
    if len(set(pool)) < len(pool) or not set(pool) <= set(range(len(feature_map))):
        msg = f"images must be different indices from 0 to {len(feature_map) - 1}, got {list(pool)[:10]}."
        raise ValueError(msg)
    check_pool("feature_map", feature_map, pool, interval)
    feature_map = feature_map.detach()
    dtype = torch.float64 if feature_map.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=feature_map.device if device is None else device)
    shape = (len(pool), *feature_map.shape[1:])

    def score(workload: Workload) -> torch.Tensor:
        load = functools.partial(_load, feature_map, pool, workload)
        return average_interval(workload, load, interval, memory_budget, progress) * len(workload.degrees)

    try:
        scores = [score(workload) for workload in _workloads(shape, degrees, precision, like)]
    except CancellingWindowsError:  # rare, and found before the first comparison where the pool fits the budget
        scores = [score(workload) for workload in _workloads(shape, degrees, precision, like, may_share=False)]
    return torch.stack(scores).sum(dim=0) / len(degrees)


def least_memory(shape: Sequence[int], degrees: Sequence[int], precision: Precision, device: torch.device) -> int:
    """Return the bytes without which :func:`layer_scores` cannot compare float32 maps of shape ``(N, C, H, W)``."""
    like = torch.empty(0, device=device)
    return max(workload.least_bytes for workload in _workloads(shape, degrees, precision, like))


def _workloads(
    shape: Sequence[int], degrees: Sequence[int], precision: Precision, like: torch.Tensor, *, may_share: bool = True
) -> list[Workload]:
    """Compare all degrees together where that is less work, else one after the other."""
    num_images, channels, height, width = shape
    comparison = make_comparison(precision, like)
    is_shared = may_share and channels >= comparison.channels_to_share
    groups = [tuple(degrees)] if is_shared else [(degree,) for degree in degrees]
    return [Workload((num_images, height * width, channels), group, like, comparison) for group in groups]


def _load(feature_map: torch.Tensor, pool: Sequence[int], workload: Workload, first: int, last: int) -> Tile:
    """Normalise the maps of some images, and aggregate them where there is one degree."""
    _, channels, height, width = feature_map.shape
    patches = workload.like.new_empty(last - first, height, width, channels)
    is_shared, rounding = len(workload.degrees) > 1, workload.comparison.rounding
    for target, image in zip(patches, pool[first:last], strict=True):
        maps = feature_map[image : image + 1].to(workload.like.device)
        vectors = normalize_map(maps).flatten(1, 2) if is_shared else lnamd(maps, workload.degrees[0])
        target.copy_(rounding.prepare(vectors).view_as(target))
        release(feature_map)
    if is_shared:
        return tile_of_maps(patches, workload.degrees, rounding)
    return tile_of_vectors(patches.flatten(1, 2), rounding)


def check_degrees(degrees: Sequence[int], name: str = "degrees") -> None:
    """Raise a ValueError that calls the argument ``name`` unless it is a non-empty sequence of positive odd numbers."""
    is_list = isinstance(degrees, Sequence) and len(degrees) > 0
    if not is_list or not all(isinstance(degree, int) and degree >= 1 and degree % 2 == 1 for degree in degrees):
        msg = f"{name} must be a non-empty sequence of positive odd numbers, got {degrees!r}."
        raise ValueError(msg)
