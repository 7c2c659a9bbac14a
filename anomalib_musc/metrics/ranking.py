# SPDX-License-Identifier: Apache-2.0
r"""AUROC, F1-max, average precision and AUPRO of one ranking: the values are sorted once, for all of them.

All four need only know, for every anomalous value, how many anomalous values are at or above it, :math:`T_i`, and how
many normal ones are at or above it, :math:`F_i`, and above it, :math:`F'_i`. So the P anomalous and the N normal values
are sorted apart, with no labels to carry along, and the counts are looked up.
"""

import warnings
from typing import NamedTuple

import cv2
import numpy as np
import torch

_NUM_THRESHOLDS = 200  # of the official release's AUPRO


class Ranks(NamedTuple):
    """Where the P anomalous values stand among all: ``(P,)`` each, by ascending value; and K equal steps, ``(K,)``."""

    scores: torch.Tensor
    true_positives: torch.Tensor  # anomalous values at or above each, float64
    false_positives: torch.Tensor  # normal values at or above each, float64
    false_positives_above: torch.Tensor  # normal values above each, float64
    num_normal: int
    thresholds: torch.Tensor  # K equal steps from the lowest of all values up to the highest, which is left out
    normal_above: torch.Tensor  # normal values above each threshold, float64
    region_sizes: torch.Tensor | None = None  # size of the region that each is a pixel of


def rank(normal: torch.Tensor, anomalous: torch.Tensor, region_sizes: torch.Tensor | None = None) -> Ranks:
    """Rank anomalous values among normal ones, on their device; a NaN in either makes all counts NaN.

    Args:
        normal: Values of what is normal, ``(N,)``; on the host, they are sorted in place.
        anomalous: Values of what is anomalous, ``(P,)``.
        region_sizes: For AUPRO, the size of the region that each anomalous value is a pixel of, ``(P,)``.

    Example:
        >>> rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.4])).false_positives
        tensor([1., 1.], dtype=torch.float64)
    """
    if normal.device.type == "cpu":
        normal.numpy().sort()  # vectorised; torch.sort, which carries indices, takes many times as long
    else:
        normal = normal.sort().values
    scores, order = anomalous.sort()
    lookups = ((scores, False), (normal, False), (normal, True))
    counts = torch.stack([len(values) - torch.searchsorted(values, scores, right=right) for values, right in lookups])
    counts = counts.double()
    thresholds = _equal_steps(torch.cat([normal[:1], normal[-1:], scores[:1], scores[-1:]]))
    normal_above = (len(normal) - torch.searchsorted(normal, thresholds, right=True)).double()
    if bool(torch.cat([normal[-1:], scores[-1:]]).isnan().any()):  # NaN sorts last
        counts.fill_(torch.nan)
        normal_above.fill_(torch.nan)
    true, false, false_above = counts
    sizes = None if region_sizes is None else region_sizes[order]
    return Ranks(scores, true, false, false_above, len(normal), thresholds, normal_above, sizes)


def _equal_steps(values: torch.Tensor) -> torch.Tensor:
    """Return 200 thresholds from the lowest value on, the highest left out, in the values' precision; none of none."""
    if values.numel() == 0:
        return values
    low, high = values.double().aminmax()
    steps = torch.arange(_NUM_THRESHOLDS, dtype=torch.float64, device=values.device)
    return (low + steps * ((high - low) / _NUM_THRESHOLDS)).to(values.dtype)


def auroc(ranks: Ranks) -> torch.Tensor:
    r"""Area under the ROC curve, :math:`1 - \sum_i (F_i + F'_i) / 2PN`; 0 if there is only one class.

    Example:
        >>> auroc(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8])))
        tensor(0.7500)
    """
    num_pairs = ranks.scores.numel() * ranks.num_normal
    if num_pairs == 0:
        return torch.zeros((), device=ranks.scores.device)
    misranked = (ranks.false_positives + ranks.false_positives_above).sum() / 2  # ties count half
    return (1 - misranked / num_pairs).float()


def f1_max(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Largest F1 of all thresholds, :math:`\max_i 2 T_i / (T_i + F_i + P)`, and the lowest threshold that has it.

    Thresholds between anomalous values cannot be better, as they only add false positives. Without anomalous values F1
    is 0 and the threshold NaN.

    Example:
        >>> f1_max(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8])))
        (tensor(0.8000), tensor(0.3500))
    """
    scores = ranks.scores.flatten()
    if len(scores) == 0:
        return torch.zeros((), device=scores.device), torch.full((), torch.nan, device=scores.device)
    f1 = 2 * ranks.true_positives / (ranks.true_positives + ranks.false_positives + len(scores))
    return f1.max().float(), scores[f1.argmax()]


def average_precision(ranks: Ranks) -> torch.Tensor:
    r"""Average precision, :math:`\frac{1}{P} \sum_i T_i / (T_i + F_i)`; 0 without anomalous values.

    This is :math:`\sum_n (R_n - R_{n-1}) P_n` over the distinct thresholds, as each value adds 1/P to the recall.

    Example:
        >>> average_precision(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8])))
        tensor(0.8333)
    """
    if ranks.scores.numel() == 0:
        return torch.zeros((), device=ranks.scores.device)
    return (ranks.true_positives / (ranks.true_positives + ranks.false_positives)).mean().float()


def aupro(ranks: Ranks, fpr_limit: float = 0.3) -> torch.Tensor:
    r"""Area under the mean overlap of the regions against the false positive rate, up to a limit, divided by it.

    A pixel of a region of size A adds :math:`1 / A` to that region's overlap, on a straight line from the rate
    :math:`F'_i / N` to :math:`F_i / N`; what lies under it up to the limit is summed. 0 without anomalous values or
    without normal ones.

    Args:
        ranks: A ranking with the sizes of regions.
        fpr_limit: False positive rate at which the area ends.

    Example:
        >>> sizes = torch.tensor([1, 1])  # of two regions, each a pixel
        >>> aupro(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]), sizes), fpr_limit=0.75)
        tensor(0.6667)
    """
    weights = _region_weights(ranks)
    if ranks.scores.numel() * ranks.num_normal == 0:
        return torch.zeros((), device=ranks.scores.device)
    limit = min(fpr_limit, 1.0)
    start = ranks.false_positives_above / ranks.num_normal
    end = ranks.false_positives / ranks.num_normal
    width = end - start
    ramp = torch.minimum((limit - start).clamp(min=0), width)  # the part of the line that is below the limit
    under_ramp = torch.where(width == 0, 0, ramp**2 / (2 * width))
    areas = under_ramp + (limit - end).clamp(min=0)
    return ((weights * areas).sum() / weights.sum() / limit).float()


def official_aupro(ranks: Ranks, fpr_limit: float = 0.3) -> torch.Tensor:
    r"""AUPRO as MuSc's official release computes it, and those of APRIL-GAN and AnomalyCLIP.

    At the thresholds :math:`t_k = a + k (b - a) / 200`, :math:`0 \le k < 200`, from the lowest of all values a to the
    highest b, let :math:`F_k` be the share of normal values above, and :math:`O_k` the mean over the regions of the
    share of their pixels above. Of the points with :math:`F_k` below the limit the area is taken by trapezoids, the
    rates rescaled by their own extremes:

    .. math:: \frac{1}{\max F - \min F} \sum_k (F_k - F_{k+1}) \frac{O_k + O_{k+1}}{2}

    :func:`aupro` is the area itself, from 0 to the limit.

    0 without anomalous values or without normal ones. Where the rates below the limit are all the same, which the
    official release answers with NaN or an error, a warning comes with the largest of their overlaps, or with 0 where
    no rate is below the limit.

    Args:
        ranks: A ranking with the sizes of regions.
        fpr_limit: False positive rate that those of the points taken are below.

    Example:
        >>> sizes = torch.tensor([1, 1])  # of two regions, each a pixel
        >>> official_aupro(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]), sizes), fpr_limit=0.75)
        tensor(0.5000)
    """
    weights = _region_weights(ranks)
    if ranks.scores.numel() * ranks.num_normal == 0:
        return torch.zeros((), device=ranks.scores.device)
    first_above = torch.searchsorted(ranks.scores, ranks.thresholds, right=True)
    below = torch.cat([weights.new_zeros(1), weights.cumsum(0)])[first_above]  # regions' share at or below, summed
    overlaps = 1 - below / weights.sum()
    rates = ranks.normal_above / ranks.num_normal
    is_kept = ~(rates >= fpr_limit)  # NaN is kept, and makes the result NaN
    rates, overlaps = rates[is_kept], overlaps[is_kept]
    if len(rates) == 0 or bool(rates[0] == rates[-1]):  # by descending rate
        msg = (
            f"Fewer than two false positive rates at the {_NUM_THRESHOLDS} thresholds lie below fpr_limit={fpr_limit}: "
            "the official AUPRO has no area, and the largest overlap there is reported. Take the exact one."
        )
        warnings.warn(msg, UserWarning, stacklevel=2)
        return (overlaps[0] if len(overlaps) else rates.new_zeros(())).float()
    return (torch.trapezoid(overlaps, rates) / (rates[-1] - rates[0])).float()


def _region_weights(ranks: Ranks) -> torch.Tensor:
    """Return what each anomalous pixel adds to the overlap of its region, ``(P,)``; those of one region sum to 1."""
    if ranks.region_sizes is None:
        msg = "ranks has no region_sizes, which AUPRO needs."
        raise ValueError(msg)
    return 1 / ranks.region_sizes.double()


def region_sizes(masks: torch.Tensor) -> torch.Tensor:
    """Return the size in pixels of the 8-connected region of every anomalous pixel, in reading order.

    Args:
        masks: True where anomalous, ``(..., H, W)``.

    Example:
        >>> region_sizes(torch.tensor([[[1, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0], [1, 0, 0]]]).bool())
        tensor([2, 2, 1, 1], dtype=torch.int32)
    """
    sizes = [np.empty(0, dtype=np.int32)]
    for mask in masks.reshape(-1, *masks.shape[-2:]).cpu().numpy():
        if mask.any():
            _, regions, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
            sizes.append(statistics[regions[mask], cv2.CC_STAT_AREA])
    return torch.from_numpy(np.concatenate(sizes))


def pro_curve(ranks: Ranks, fpr_limit: float = 0.3, num_points: int = 200) -> torch.Tensor:
    """Return the curve whose area is :func:`aupro`'s, at equal steps of the false positive rate.

    Args:
        ranks: A ranking with the sizes of regions.
        fpr_limit: False positive rate at which the curve ends.
        num_points: Number of points K.

    Returns:
        False positive rates and mean overlaps, shape ``(2, K)``, float32.

    Example:
        >>> sizes = torch.tensor([1, 1])
        >>> pro_curve(rank(torch.tensor([0.1, 0.4]), torch.tensor([0.35, 0.8]), sizes), fpr_limit=1.0, num_points=3)
        tensor([[0.0000, 0.5000, 1.0000],
                [0.5000, 1.0000, 1.0000]])
    """
    if ranks.region_sizes is None or ranks.scores.numel() * ranks.num_normal == 0:
        msg = "A curve needs regions, and normal and anomalous values."
        raise ValueError(msg)
    weights = 1 / ranks.region_sizes.double()
    overlaps = weights.flip(0).cumsum(0) / weights.sum()  # by descending value
    rates = (ranks.false_positives / ranks.num_normal).flip(0)
    points = torch.linspace(0, fpr_limit, num_points, dtype=torch.float64, device=rates.device)
    reached = torch.searchsorted(rates, points, right=True)  # values whose rate is at most a point's
    curve = torch.cat([overlaps.new_zeros(1), overlaps])[reached]
    return torch.stack([points, curve]).float()
