# SPDX-License-Identifier: Apache-2.0
"""Which images of a pool become references."""

import torch


def select_coreset(raw_scores: torch.Tensor, class_tokens: torch.Tensor, size: int) -> list[int]:
    """Select images of a pool that look most normal and are diverse, by a greedy farthest-first search.

    From the half of the lowest scores, or more where that is too few, the lowest first, then always the image whose
    feature is farthest from the nearest of those selected (as PatchCore's coreset, arXiv 2106.08265, section 3.2).

    Args:
        raw_scores: Raw scores of the pool, shape ``(N,)``.
        class_tokens: Image features, shape ``(N, D)``.
        size: How many, at most N.

    Returns:
        Their indices, in ascending order.

    Example:
        >>> select_coreset(torch.tensor([0.1, 0.9, 0.2, 0.3]), torch.eye(4), size=2)
        [0, 2]
    """
    candidates = raw_scores.argsort()[: max(size, len(raw_scores) // 2)].cpu()
    tokens = class_tokens.cpu().double()[candidates]
    selected = [0]
    distances = (tokens - tokens[0]).norm(dim=1)
    while len(selected) < size:
        distances[selected] = -1
        selected.append(int(distances.argmax()))
        distances = torch.minimum(distances, (tokens - tokens[selected[-1]]).norm(dim=1))
    return sorted(candidates[selected].tolist())
