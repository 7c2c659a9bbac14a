# SPDX-License-Identifier: Apache-2.0
"""Steps 1 and 2 for one layer: LNAMD and MSM at several degrees, with one product of two images for all of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from anomalib_musc.distances import Precision, Processes, gathered, nearest_distances
from anomalib_musc.functional.arguments import check_maps
from anomalib_musc.functional.lnamd import layer_norm
from anomalib_musc.functional.mutual_scoring import check_interval, interval_means
from anomalib_musc.functional.second_interval import check_second_interval, larger_score, median_ratio


def layer_scores(
    feature_map: torch.Tensor,
    degrees: Sequence[int] = (1, 3, 5),
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    second_interval: tuple[float, float] | None = None,
    search_radius: int | None = None,
    images: Sequence[int] | None = None,
    precision: Precision = "exact",
    memory_budget: float | None = None,
    device: torch.device | str | None = None,
    processes: Processes | None = None,
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
        second_interval: Another one beyond it, for defects that many images share: the larger score counts, see
            :func:`~anomalib_musc.functional.larger_score`, of the averages over the degrees. Defaults to none.
        search_radius: Within how many rows and columns of its own place a patch is sought in the other images, where
            camera and product do not move; the time falls with the number of places. Defaults to the whole image.
        images: Indices of the images that form the pool, n of them. Defaults to all.
        precision: "exact" or "fast".
        memory_budget: GiB that the computation may take, beside ``feature_map``.
        device: Where to compute. Defaults to where ``feature_map`` is.
        processes: Those that hold the other images of the pool, each its share, see
            :func:`~anomalib_musc.distances.nearest_distances`. Defaults to none: all images are here.
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
    means = interval_scores(
        feature_map,
        degrees,
        [interval] if second_interval is None else [interval, second_interval],
        search_radius=search_radius,
        images=images,
        precision=precision,
        memory_budget=memory_budget,
        device=device,
        processes=processes,
        progress=progress,
    )
    return larger_of(means, processes)[0]


def interval_scores(
    feature_map: torch.Tensor,
    degrees: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    *,
    images: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    processes: Processes | None = None,
    **how: Any,
) -> torch.Tensor:
    """Score the patches of one layer by one or two intervals, from the same distances; see :func:`layer_scores`.

    Args:
        feature_map: Shape ``(N, C, H, W)``.
        degrees: LNAMD's.
        intervals: The paper's and, where it is wanted, the second one.
        images: Indices of the images that form the pool. Defaults to all.
        device: Where to compute. Defaults to where ``feature_map`` is.
        processes: See :func:`layer_scores`.
        **how: ``search_radius``, ``precision``, ``memory_budget`` and ``progress``.

    Returns:
        Patch scores by each interval, shape ``(K, n, H * W)``.
    """
    check_maps(feature_map)
    num_images = len(feature_map if images is None else images)
    size_of_pool = sum(gathered(processes, num_images))
    if size_of_pool < 2:
        msg = f"feature_map must hold at least 2 images to compare, got {size_of_pool}."
        raise ValueError(msg)
    check_interval(intervals[0], size_of_pool)
    for second_interval in intervals[1:]:
        check_second_interval(second_interval, intervals[0], size_of_pool)
    blocks = nearest_distances(
        feature_map, degrees, images=images, prepare=layer_norm, device=device, processes=processes, **how
    )
    dtype, num_patches = torch.promote_types(feature_map.dtype, torch.float32), math.prod(feature_map.shape[2:])
    device = feature_map.device if device is None else device
    scores = torch.zeros(len(intervals), num_images, num_patches, dtype=dtype, device=device)
    for block, distances in blocks:  # (D, n, N, L): of all degrees, or of one after the other
        for total, means in zip(scores, interval_means(distances, *intervals), strict=True):
            total[block] += means.sum(dim=0)
    return scores / len(degrees)


def larger_of(means: torch.Tensor, processes: Processes | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the larger of the scores by two intervals, by their median ratio over all processes; of one the scores.

    Args:
        means: Patch scores of this process's images by each interval, shape ``(K, n, L)``.
        processes: Those that hold the other images of the pool.

    Returns:
        Patch scores, shape ``(n, L)``, and the ratio, shape ``()``; infinite of one interval.
    """
    if len(means) == 1:
        return means[0], means.new_tensor(torch.inf)
    first, second = means
    of_all = means if processes is None else torch.cat(processes.gather(means.cpu()), dim=1)
    ratio = median_ratio(of_all[0], of_all[1]).to(means.device)
    return larger_score(first, second, ratio), ratio
