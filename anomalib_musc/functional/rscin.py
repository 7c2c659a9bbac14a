# SPDX-License-Identifier: Apache-2.0
"""Step 3: Re-scoring with Constrained Image-level Neighborhood (RsCIN)."""

from collections.abc import Sequence

import torch

_FLOOR = 0.1  # of the highest raw score, below which a range of references is taken for chance
_EQUAL = 1e-3  # raw score up to which references are copies of each other, but for rounding


def rscin(scores: torch.Tensor, class_tokens: torch.Tensor, windows: Sequence[int] = (1, 2, 3)) -> torch.Tensor:
    r"""Re-score each image with the scores of the images most like it (arXiv 2401.16753, section 3.3).

    The raw scores :math:`s` are scaled to [0, 1] over the pool. With :math:`W = c c^\top` and :math:`W^{(k)}` its
    copy in which every row keeps only its :math:`k` largest entries,

    .. math:: \hat s = \frac{1}{|K|} \sum_{k \in K} D_k^{-1} W^{(k)} s, \qquad
              D_k = \operatorname{diag}\Bigl(\sum_j W^{(k)}_{ij}\Bigr)

    Negative similarities count as zero; an image without any positive one keeps its own score.

    Args:
        scores: Raw image scores of the pool, shape ``(N,)``.
        class_tokens: Image features of the same images, shape ``(N, D)``.
        windows: Neighbourhood sizes :math:`k`, the image itself included; ``(1, 2, 3)`` for MVTec AD and BTAD,
            ``(1, 8, 9)`` for VisA. A window larger than the pool means the whole pool.

    Returns:
        Scores in [0, 1], shape ``(N,)``, all zero where the raw scores are all equal; float64 for float64 input, else
        float32. They are computed in float64 on the CPU.

    Raises:
        ValueError: If the shapes do not agree, a value is not finite, or ``windows`` is empty or holds a number
            below 1.

    Example:
        >>> import torch
        >>> tokens = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), dim=-1)
        >>> rscin(torch.tensor([0.2, 0.4, 0.6]), tokens, windows=(1, 2)).round(decimals=2)
        tensor([0.1200, 0.3800, 0.9800])
    """
    check_windows(windows)
    _check_pool(scores, class_tokens)
    device, dtype = scores.device, torch.promote_types(scores.dtype, torch.float32)
    # Image features of one product are nearly alike: in float32, rounding would choose between neighbours.
    scores, class_tokens = scores.cpu().double(), class_tokens.cpu().double()

    spread = scores.max() - scores.min()
    scores = (scores - scores.min()) / torch.where(spread > 0, spread, 1)
    similarity = class_tokens @ class_tokens.T  # (N, N)
    return _window_means(similarity, scores.expand_as(similarity), scores, windows).to(device, dtype)


def rscin_by_references(
    scores: torch.Tensor,
    class_tokens: torch.Tensor,
    reference_scores: torch.Tensor,
    reference_tokens: torch.Tensor,
    windows: Sequence[int] = (1, 2, 3),
) -> torch.Tensor:
    r"""Re-score images with the references most like them, each image on its own.

    As :func:`rscin`, but an image's neighbours are itself and the references. Raw scores :math:`s` are scaled by those
    of the references, :math:`(s - \min_j s_j) / \text{scale}`, see :func:`reference_scale`, so that an image more
    anomalous than all of them scores above 1. Where there is no scale, the scores stay as they are.

    Args:
        scores: Raw scores of the images, shape ``(B,)``.
        class_tokens: Their image features, shape ``(B, D)``.
        reference_scores: Raw scores of the references against each other, shape ``(M,)``.
        reference_tokens: Their image features, shape ``(M, D)``.
        windows: See :func:`rscin`.

    Returns:
        Scores, shape ``(B,)``.

    Raises:
        ValueError: If the shapes do not agree, there is no reference, or ``windows`` is not valid.

    Example:
        >>> import torch
        >>> tokens = torch.eye(2)
        >>> rscin_by_references(torch.tensor([0.9]), tokens[:1], torch.tensor([0.1, 0.5]), tokens, windows=(1, 2))
        tensor([1.5000])
    """
    check_windows(windows)
    for name, values, tokens in (("", scores, class_tokens), ("reference_", reference_scores, reference_tokens)):
        if values.ndim != 1 or tokens.ndim != 2 or tokens.shape[1] != class_tokens.shape[1]:
            shapes = tuple(values.shape), tuple(tokens.shape)
            msg = f"{name}scores and {name or 'class_'}tokens must have shapes (N,) and (N, D), got {shapes}."
            raise ValueError(msg)
    found, lowest = reference_scale(reference_scores), reference_scores.min()
    scale = torch.where(found > 0, found, torch.ones_like(found))
    scaled, scaled_references = (scores - lowest) / scale, (reference_scores - lowest) / scale  # (B,), (M,)
    candidates = torch.cat([scaled[:, None], scaled_references.expand(scores.shape[0], -1)], dim=1)  # (B, 1 + M)
    similarity = torch.cat([(class_tokens**2).sum(dim=1, keepdim=True), class_tokens @ reference_tokens.T], dim=1)
    return torch.where(found > 0, _window_means(similarity, candidates, scaled, windows), scores)


def _window_means(
    similarity: torch.Tensor, scores: torch.Tensor, own_scores: torch.Tensor, windows: Sequence[int]
) -> torch.Tensor:
    """Average the scores of the most similar images, weighted by similarity, for each window; then over the windows.

    Args:
        similarity: Of B images to M candidates, shape ``(B, M)``.
        scores: Those of the candidates, shape ``(B, M)``.
        own_scores: Those of the images, which they keep where no similarity is positive, shape ``(B,)``.
        windows: How many candidates count, see :func:`rscin`.

    Returns:
        Means, shape ``(B,)``.
    """
    means = []
    for window in windows:
        weights, neighbours = similarity.topk(min(window, similarity.shape[1]), dim=1)  # (B, k)
        weights = weights.clamp_min(0)
        total = weights.sum(dim=1)
        mean = (weights * scores.gather(1, neighbours)).sum(dim=1) / torch.where(total > 0, total, 1)
        means.append(torch.where(total > 0, mean, own_scores))
    return torch.stack(means).mean(dim=0)


def reference_scale(reference_scores: torch.Tensor) -> torch.Tensor:
    """Return the range of references' raw scores against each other, but at least a tenth of the highest one.

    Few references may happen to score alike, which says nothing about how much other images will differ.

    Args:
        reference_scores: Shape ``(M,)``.

    Returns:
        Shape ``()``; 0 where there is no scale, with fewer than two references or equal ones.

    Raises:
        ValueError: If there is no reference.
    """
    if reference_scores.ndim != 1 or len(reference_scores) == 0:
        msg = f"reference_scores must have shape (M,) with M >= 1, got {tuple(reference_scores.shape)}."
        raise ValueError(msg)
    highest = reference_scores.max()
    scale = torch.maximum(highest - reference_scores.min(), _FLOOR * highest)
    has_scale = (highest > _EQUAL) & (len(reference_scores) > 1)
    return torch.where(has_scale, scale, torch.zeros_like(scale))


def _check_pool(scores: torch.Tensor, class_tokens: torch.Tensor) -> None:
    if scores.ndim != 1 or len(scores) == 0:
        msg = f"scores must have shape (N,) with N >= 1, got {tuple(scores.shape)}."
        raise ValueError(msg)
    if class_tokens.ndim != 2 or len(class_tokens) != len(scores):
        msg = f"class_tokens must have shape ({len(scores)}, D) like scores, got {tuple(class_tokens.shape)}."
        raise ValueError(msg)
    for name, values in (("scores", scores), ("class_tokens", class_tokens)):
        if not torch.isfinite(values).all():
            msg = f"{name} must be finite, got NaN or infinity for {int((~torch.isfinite(values)).sum())} values."
            raise ValueError(msg)


def check_windows(windows: Sequence[int]) -> None:
    """Raise a ValueError unless ``windows`` is a non-empty sequence of numbers of at least 1."""
    if not isinstance(windows, Sequence) or not windows or not all(isinstance(k, int) and k >= 1 for k in windows):
        msg = f"windows must be a non-empty sequence of whole numbers >= 1, got {windows!r}."
        raise ValueError(msg)
