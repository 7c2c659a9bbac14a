# SPDX-License-Identifier: Apache-2.0
"""Which images of a pool are anomalous, where no labels say it: one robust rule, and the expected share."""

import torch

FACTOR = 3.0
UPPER, LOWER = 0.45, 0.2  # quantiles of which neither is reached by anomalous images up to one half
RULE = "three times as far above the 45 % quantile as the 20 % quantile lies below it"
_ROUNDING = 1e-4  # scores are exact to that; less between the quantiles is no difference


def image_threshold(scores: torch.Tensor, class_tokens: torch.Tensor, factor: float = FACTOR) -> float:
    r"""Find the score above which an image is anomalous, from the lower half of the pool.

    Anomalous is what lies more than three times as far above the 45 % quantile as the 20 % quantile lies below it,

    .. math:: t = q_{45} + 3 \, (q_{45} - q_{20}),

    so that half of the pool may be anomalous and none has to be. Of normally distributed scores it is mean + 2 standard
    deviations, as with median and lower quartile in place of the two, which fail where half of the pool is anomalous.
    Copies of an image count once.

    Args:
        scores: Image scores, shape ``(N,)``.
        class_tokens: Image features, shape ``(N, D)``, by which copies are known.
        factor: What takes the place of 3; less flags more.

    Returns:
        The threshold; an image with a score above it is anomalous.

    Example:
        >>> scores = torch.tensor([0.30, 0.32, 0.31, 0.33, 0.34, 0.80])
        >>> round(image_threshold(scores, torch.eye(6)), 4)
        0.36
    """
    distinct = scores[_first_of_copies(class_tokens)].double().cpu()
    lower, upper = distinct.quantile(torch.tensor([LOWER, UPPER], dtype=torch.float64)).tolist()
    return upper + factor * max(upper - lower, _ROUNDING)


def contamination_threshold(scores: torch.Tensor, contamination: float) -> float:
    """Find the score above which the expected share of images lies, midway between the two next to it.

    Args:
        scores: Image scores, shape ``(N,)``.
        contamination: Share of anomalous images, from 0 to 0.5; rounded to whole images.

    Example:
        >>> round(contamination_threshold(torch.tensor([0.1, 0.2, 0.3, 0.9]), 0.25), 4)
        0.6
    """
    ordered = scores.double().sort(descending=True).values
    count = round(contamination * len(ordered))
    if count == 0:
        return ordered[0].item()
    return (ordered[count - 1 : count + 1].mean() if count < len(ordered) else ordered[-1] - _ROUNDING).item()


def factor_of(sensitivity: float) -> float:
    """Return the rule's factor for a sensitivity from 0 to 1: 3 at 0.5, less above, infinite at 0.

    Example:
        >>> factor_of(0.5), factor_of(0.75), factor_of(0.25)
        (3.0, 1.0, 9.0)
    """
    return FACTOR * (1 - sensitivity) / sensitivity if sensitivity > 0 else float("inf")


def _first_of_copies(class_tokens: torch.Tensor) -> torch.Tensor:
    """Return the indices of the images of which no copy stands before them, but for rounding."""
    tokens = torch.nn.functional.normalize(class_tokens.double().cpu(), dim=-1)
    groups = tokens.mul(1 / _ROUNDING).round().unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(groups.max()) + 1,), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)), reduce="amin"
    )
    return first.sort().values
