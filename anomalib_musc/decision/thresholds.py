# SPDX-License-Identifier: Apache-2.0
"""Which images of a pool are anomalous, where no labels say it: one robust rule, or the expected share."""

import torch

FACTOR = 3.0
RULE = "times as far above the 45th percentile of the raw scores as the 20th lies below it"
CENTER = "the 45th percentile of the raw scores"
_ROUNDING = 1e-4  # scores are exact to that; less between the percentiles is no difference


def image_threshold(raw_scores: torch.Tensor, class_tokens: torch.Tensor, factor: float = FACTOR) -> float:
    r"""Find the score above which an image is anomalous, from the lower half of a pool.

    Anomalous is what lies more than three times as far above the 45th percentile :math:`q_{45}` of the raw scores as
    the 20th, :math:`q_{20}`, lies below it,

    .. math:: t = q_{45} + 3 \, (q_{45} - q_{20}),

    so that up to half of the pool may be anomalous and none has to be. Copies of an image count once.

    Args:
        raw_scores: Raw image scores, shape ``(N,)``.
        class_tokens: Image features, shape ``(N, D)``, by which copies are known.
        factor: What takes the place of 3; less flags more.

    Returns:
        The threshold, at most 2, which no distance of unit vectors exceeds; above it an image is anomalous.

    Example:
        >>> scores = torch.tensor([0.30, 0.32, 0.31, 0.33, 0.34, 0.80])
        >>> round(image_threshold(scores, torch.eye(6)), 4)
        0.36
    """
    center, spread = _center_and_spread(raw_scores, class_tokens)
    return min(center + factor * spread, 2.0)


def deviations(scores: torch.Tensor, raw_scores: torch.Tensor, class_tokens: torch.Tensor) -> torch.Tensor:
    """Return how far scores lie above the 45th percentile of a pool, in distances of the 20th from there.

    This is what :func:`image_threshold` compares with its factor.

    Args:
        scores: Image scores, shape ``(M,)``, re-scored or not.
        raw_scores: Raw image scores of the pool, shape ``(N,)``.
        class_tokens: Its image features, shape ``(N, D)``.

    Returns:
        Shape ``(M,)``, negative below the 45th percentile.

    Example:
        >>> scores = torch.tensor([0.30, 0.32, 0.31, 0.33, 0.34, 0.80])
        >>> deviations(scores, scores, torch.eye(6))[-1].item() > FACTOR
        True
    """
    center, spread = _center_and_spread(raw_scores, class_tokens)
    return (scores.double().cpu() - center) / spread


def contamination_threshold(scores: torch.Tensor, contamination: float) -> float:
    """Find the score above which the expected share of images lies, midway between the two next to it.

    Args:
        scores: Image scores, shape ``(N,)``.
        contamination: Share of anomalous images, above 0 and at most 0.5; rounded to whole images, which may be none.

    Example:
        >>> round(contamination_threshold(torch.tensor([0.1, 0.2, 0.3, 0.9]), 0.25), 4)
        0.6
    """
    ordered = scores.double().sort(descending=True).values
    count = round(contamination * len(ordered))
    return ordered[max(count - 1, 0) : count + 1].mean().item()


def threshold_above_all(scores: torch.Tensor) -> float:
    """Return a threshold that no score ``(N,)`` exceeds, for a pool that shows nothing."""
    return min(scores.max().item() + FACTOR * max((scores.max() - scores.min()).item(), _ROUNDING), 2.0)


def factor_of(sensitivity: float) -> float:
    """Return the rule's factor for a sensitivity from 0 to 1: 3 at 0.5, less above, infinite at 0.

    Example:
        >>> factor_of(0.5), factor_of(1.0), factor_of(0.25)
        (3.0, 0.0, 9.0)
    """
    return FACTOR * (1 - sensitivity) / sensitivity if sensitivity > 0 else float("inf")


def _center_and_spread(raw_scores: torch.Tensor, class_tokens: torch.Tensor) -> tuple[float, float]:
    """Return the 45th percentile of the raw scores, and how far the 20th lies below it."""
    scores = raw_scores.double().cpu()
    distinct = scores[~_is_copy(scores, class_tokens)]
    low, high = distinct.quantile(distinct.new_tensor([0.2, 0.45])).tolist()
    return high, max(high - low, _ROUNDING)


def _is_copy(scores: torch.Tensor, class_tokens: torch.Tensor) -> torch.Tensor:
    """Return which images have the score and the features of one before them, but for rounding, shape ``(N,)``."""
    tokens = torch.nn.functional.normalize(class_tokens.double().cpu(), dim=-1)
    have_same_features = tokens @ tokens.T > 1 - _ROUNDING**2 / 2  # one less half of the squared distance
    have_same_score = (scores[:, None] - scores).abs() <= _ROUNDING
    return (have_same_features & have_same_score).triu(1).any(dim=0)
