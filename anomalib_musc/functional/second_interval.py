# SPDX-License-Identifier: Apache-2.0
"""Repeated defects: the larger of the scores over two intervals. Not of the paper, and off by default."""

import torch

from anomalib_musc.functional.mutual_scoring import check_interval


def larger_score(scores: torch.Tensor, second: torch.Tensor, ratio: torch.Tensor | None = None) -> torch.Tensor:
    r"""Return the larger of two patch scores, the second one scaled by the pool's own median ratio of the two.

    The ascending distances of a normal patch grow smoothly. Those of a defect that many images share stay small until
    its likes are used up, and jump: the mean :math:`s` over the paper's interval is small, the mean :math:`t` over a
    second one, beyond the likes, is not.

    .. math:: \max \bigl( s, \; t / \exp \operatorname{median} \log (t / s) \bigr)

    Args:
        scores: Patch scores of the paper's interval, shape ``(N, L)``.
        second: Those of the second interval, shape ``(N, L)``, not below the first.
        ratio: What the second ones are divided by, shape ``()``; a memory bank's own. Defaults to their
            :func:`median_ratio`.

    Returns:
        Shape ``(N, L)``; ``scores`` where no patch has a score above 0.

    Example:
        >>> import torch
        >>> larger_score(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 8.0]]))
        tensor([[1., 1., 4.]])
    """
    return torch.maximum(scores, second / (median_ratio(scores, second) if ratio is None else ratio))


def median_ratio(scores: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the median ratio of the second scores to the first, by logarithms.

    Args:
        scores: Patch scores of the paper's interval, shape ``(N, L)``.
        second: Those of the second interval, shape ``(N, L)``.

    Returns:
        Shape ``()``; infinite, so that the first scores remain, where no patch has both above 0.

    Example:
        >>> import torch
        >>> median_ratio(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[2.0, 2.0, 8.0]]))
        tensor(2.)
    """
    ratios = (second / scores)[(scores > 0) & (second > 0)]
    return ratios.log().median().exp() if len(ratios) else scores.new_tensor(torch.inf)


def check_second_interval(
    second_interval: tuple[float, float] | None, interval: tuple[float, float], num_images: int | None = None
) -> None:
    """Raise a ValueError unless a second interval is ``None``, or two bounds from the end of the first one on.

    Args:
        second_interval: The two bounds, fractions below 1 or counts.
        interval: The first interval.
        num_images: Size of the pool. A fraction and a count can only be compared where it is known.
    """
    if second_interval is None:
        return
    check_interval(second_interval, num_images, "second_interval")
    end, begin = interval[1], second_interval[0]
    if (end < 1) != (begin < 1):
        if num_images is None:
            return
        end, begin = (bound if bound >= 1 else bound * (num_images - 1) for bound in (end, begin))
    if begin < end:
        msg = (
            f"second_interval must begin where interval ends or later, got {tuple(second_interval)} after "
            f"{tuple(interval)}."
        )
        raise ValueError(msg)
