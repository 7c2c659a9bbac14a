# SPDX-License-Identifier: Apache-2.0
"""Step 2: Mutual Scoring Mechanism (MSM)."""

from collections.abc import Callable, Sequence
from numbers import Real

import torch

from anomalib_musc.distances import Precision, nearest_distances


def mutual_scores(
    features: torch.Tensor,
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    precision: Precision = "exact",
    memory_budget: float | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    r"""Score every patch by its distances to all other images of the pool (arXiv 2401.16753, section 3.2).

    The distance of patch :math:`p` of image :math:`i` to image :math:`j` is that to its nearest patch there. The
    patch score is the mean over the images with the smallest distances, the interval :math:`[lo, hi)` of the sorted
    values:

    .. math:: d_{ip}^{(j)} = \min_q \lVert x_{ip} - x_{jq} \rVert_2, \qquad
              a_{ip} = \operatorname{mean} \bigl\{ \operatorname{sort}_j d_{ip}^{(j)} \bigr\}_{lo}^{hi},
              \quad j \ne i

    Args:
        features: Patch features of the pool, shape ``(N, L, C)``, as :func:`lnamd` returns them. They may lie on the
            host, in a memory-mapped file too, while another device computes.
        interval: Which of the N - 1 ascending distances are averaged. A bound below 1 is a fraction, index
            ``int((N - 1) * bound)``; a bound of 1 or more is a count. At least one value is always averaged.
        precision: ``"exact"``: within 1e-4 of float64 for unit vectors; for others see
            :func:`~anomalib_musc.distances.nearest_distances`. ``"fast"``: products of 8-bit integers or 16-bit
            numbers where a trial shows that the device multiplies them faster; elsewhere the same as ``"exact"``.
        memory_budget: GiB that the computation may take, beside ``features``, on the device and on the host. What does
            not fit goes to temporary files; no result depends on it. Defaults to half of what is free.
        device: Where to compute. Defaults to where ``features`` are.
        progress: Called with the number of image pairs that were just compared.

    Returns:
        Patch scores on ``device``, shape ``(N, L)``; higher is more anomalous. float64 for float64 input, else
        float32.

    Raises:
        ValueError: If there are fewer than two images, a feature is not finite, or an argument is out of range.
        OSError: If there is no room for temporary files.

    Example:
        >>> import torch
        >>> pool = torch.nn.functional.normalize(torch.randn(4, 30, 8), dim=-1)
        >>> mutual_scores(pool).shape
        torch.Size([4, 30])
        >>> mutual_scores(torch.ones(3, 5, 8))[0]  # every patch finds its like: nothing is anomalous
        tensor([0., 0., 0., 0., 0.])
    """
    blocks = nearest_distances(
        features, precision=precision, memory_budget=memory_budget, device=device, progress=progress
    )
    check_interval(interval, len(features))
    dtype = torch.promote_types(features.dtype, torch.float32)
    scores = torch.empty(features.shape[:2], dtype=dtype, device=features.device if device is None else device)
    for images, distances in blocks:  # (1, n, N, L): to the nearest patch of each image
        (means,) = interval_means(distances, interval)
        scores[images] = means.mean(dim=0)
    return scores


def interval_means(distances: torch.Tensor, *intervals: tuple[float, float]) -> list[torch.Tensor]:
    """Average intervals of the ascending distances to the other images, which are sorted once.

    Args:
        distances: Distances to N images, infinite to the image itself, shape ``(..., N, L)``.
        *intervals: See :func:`mutual_scores`.

    Returns:
        Means, shape ``(..., L)``, one tensor an interval.
    """
    bounds = [interval_bounds(interval, distances.shape[-2] - 1) for interval in intervals]
    if distances.device.type == "cpu":
        ascending = distances.mT.clone(memory_format=torch.contiguous_format)  # (..., L, N)
        ascending.numpy().sort(axis=-1)  # vectorised: many times as fast as those of torch, which carry indices
    else:
        ascending = distances.topk(max(stop for _, stop in bounds), dim=-2, largest=False).values.mT
    return [ascending[..., start:stop].mean(dim=-1) for start, stop in bounds]


def interval_bounds(interval: tuple[float, float], count: int) -> tuple[int, int]:
    """Resolve fractions and counts to the slice ``[start, stop)`` of ``count`` sorted values, never empty."""
    start, stop = (min(int(bound if bound >= 1 else count * bound), count) for bound in interval)
    start = min(start, count - 1)
    return start, max(stop, start + 1)


def check_interval(interval: tuple[float, float], num_images: int | None = None, name: str = "interval") -> None:
    """Raise a ValueError unless an interval is a pair of bounds ``0 <= lo < hi``, see :func:`mutual_scores`.

    Args:
        interval: The two bounds, fractions below 1 or counts.
        num_images: Size of the pool. A fraction and a count can only be compared where it is known.
        name: What the argument is called.
    """
    is_pair = isinstance(interval, Sequence) and len(interval) == 2 and all(isinstance(b, Real) for b in interval)
    if not is_pair or not (interval[0] >= 0 and 0 < interval[1] < float("inf")):
        msg = f"{name} must be two finite bounds 0 <= lo < hi, got {interval!r}."
        raise ValueError(msg)
    low, high = interval
    if num_images is not None:
        low, high = (bound if bound >= 1 else bound * (num_images - 1) for bound in interval)
    comparable = num_images is not None or (low < 1) == (high < 1)
    if comparable and low >= high:
        pool = "" if num_images is None else f" for {num_images} images"
        msg = f"{name} must begin below its end, got {tuple(interval)}{pool}; a bound of 1 or more is a count."
        raise ValueError(msg)
