# SPDX-License-Identifier: Apache-2.0
"""Signs that a pool is not what its user thinks it is: sentences, no refusals, from what scoring gives anyway."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.pool.looks import LEVEL, Look

# Kaufman and Rousseeuw, Finding Groups in Data (1990), section 2.2: the mean silhouette of a structure that is
# "reasonable" is above 0.5; what one of 0.25 or less shows "could be artificial".
_REASONABLE, _ARTIFICIAL = 0.5, 0.25
_SIGN_TEST = 1.645  # standard deviations, one-sided at 5 %
_FEWEST = 6  # images, below which no structure is looked for
SAME_SCORE = 1e-4  # scores are exact to that
_ROUNDING = 1e-6  # of distances between unit vectors


def warn_of_pool(
    names: Sequence[str],
    looks: Mapping[str, Look],
    features: torch.Tensor,
    references: torch.Tensor | None,
    raw_scores: torch.Tensor,
) -> list[str]:
    """Say all that is odd about a pool before it has labels.

    Args:
        names: One an image.
        looks: What a glance at them showed, by name, as far as they were looked at.
        features: Median patch features of the images, shape ``(N, C)``.
        references: Likewise of the references, shape ``(M, C)``, if there are any.
        raw_scores: Raw image scores, shape ``(N,)``.
    """
    warnings = [*warn_of_looks(looks), *warn_of_groups(names, features)]
    if references is not None:
        warnings += warn_of_references(features, references)
    if _are_equal(raw_scores):
        warnings.append("The scores of all images are equal: nothing tells one from another.")
    return warnings


def warn_of_looks(looks: Mapping[str, Look]) -> list[str]:
    """Say where images show nothing, or grey ones lie among coloured ones."""
    if _are_blank(looks):
        return ["No image shows any contrast, each is of one grey or colour all over."]
    grey = [name for name, look in looks.items() if look.is_grey]
    coloured = [name for name, look in looks.items() if look.is_coloured]
    if not grey or not coloured:
        return []
    few = min(grey, coloured, key=len)
    return [f"Grey and coloured images are mixed ({len(grey)} and {len(coloured)}), such as {_some(few)}."]


def shows_nothing(looks: Mapping[str, Look], raw_scores: torch.Tensor) -> bool:
    """Whether images are blank, or their raw scores ``(N,)`` equal, so that none of a pool can be called anomalous."""
    return _are_blank(looks) or _are_equal(raw_scores)


def _are_blank(looks: Mapping[str, Look]) -> bool:
    return bool(looks) and all(look.contrast <= LEVEL for look in looks.values())


def _are_equal(raw_scores: torch.Tensor) -> bool:
    return len(raw_scores) > 1 and (raw_scores.max() - raw_scores.min()).item() <= SAME_SCORE


def warn_of_groups(names: Sequence[str], features: torch.Tensor) -> list[str]:
    """Say where a pool falls into two groups that differ all over.

    Args:
        names: One an image.
        features: Median patch features, shape ``(N, C)``.
    """
    if len(features) < _FEWEST:
        return []
    is_second = split_in_two(features)
    silhouettes = silhouettes_of(features, is_second)
    groups = [silhouettes[is_second].mean(), silhouettes[~is_second].mean()]
    if silhouettes.mean() <= _REASONABLE or min(groups) <= _ARTIFICIAL:
        return []
    second = [name for name, is_of_it in zip(names, is_second.tolist(), strict=True) if is_of_it]
    first = [name for name, is_of_it in zip(names, is_second.tolist(), strict=True) if not is_of_it]
    few, many = sorted((first, second), key=len)
    return [
        f"Two groups of images that differ all over ({len(many)} and {len(few)}): two products, lots or cameras? The "
        f"smaller one has {_some(few)}. Score each group on its own."
    ]


def warn_of_references(features: torch.Tensor, references: torch.Tensor) -> list[str]:
    """Say where images differ all over from the references.

    Args:
        features: Median patch features of the images, shape ``(N, C)``.
        references: Those of the references, shape ``(M, C)``.
    """
    if len(features) + len(references) < _FEWEST or not len(references):
        return []
    is_image = torch.arange(len(features) + len(references)) >= len(references)
    silhouettes = silhouettes_of(torch.cat([references, features]), is_image)
    of_both = (silhouettes[is_image].mean() + silhouettes[~is_image].mean()) / 2  # however many there are of either
    if of_both <= _REASONABLE:
        return []
    return [
        f"The references look like another product: the images ({len(features)}) differ from them ({len(references)}) "
        "all over. Take references of the same product, camera and light."
    ]


def warn_of_labels(scores: torch.Tensor, threshold: float) -> list[str]:
    """Say where more than half of the scores ``(N,)`` are above a threshold, by a sign test."""
    flagged = int((scores > threshold).sum())
    if 2 * flagged - len(scores) - 1 <= _SIGN_TEST * len(scores) ** 0.5:
        return []
    return [
        f"Most images are flagged ({flagged} of {len(scores)}). Where most are defective, what is normal cannot be "
        "found among them: look at the images, the references, and any threshold by hand."
    ]


def median_features(feature_maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return median patch features ``(B, C)`` of all layers' maps ``(B, C, h, w)``, which no local defect moves far."""
    return torch.cat([maps.flatten(2).median(dim=2).values for maps in feature_maps], dim=1).cpu()


def split_in_two(features: torch.Tensor) -> torch.Tensor:
    """Split unit features into two clusters by k-means from their first principal axis.

    Args:
        features: Shape ``(N, C)``, of at least two images.

    Returns:
        Which images are of the second cluster, bool ``(N,)``.
    """
    points = F.normalize(features.double(), dim=-1)
    points = points - points.mean(dim=0)
    values, vectors = torch.linalg.eigh(points @ points.T)
    is_second = vectors[:, values.argmax()] > 0
    for _ in range(50):
        if is_second.all() or not is_second.any():
            break
        centres = torch.stack([points[~is_second].mean(dim=0), points[is_second].mean(dim=0)])
        moved = torch.cdist(points, centres).argmin(dim=1).bool()
        if (moved == is_second).all():
            break
        is_second = moved
    return is_second


def silhouettes_of(features: torch.Tensor, is_second: torch.Tensor) -> torch.Tensor:
    """Return the silhouettes of two clusters of unit features (Rousseeuw 1987), from -1 to 1; 0 of one alone.

    Args:
        features: Shape ``(N, C)``.
        is_second: Which are of the second cluster, bool ``(N,)``.

    Returns:
        Shape ``(N,)``.
    """
    points = F.normalize(features.double(), dim=-1)
    distances = torch.cdist(points, points)
    distances[distances < _ROUNDING] = 0.0  # of copies, by products of float64
    sums = torch.stack([distances[:, ~is_second].sum(dim=1), distances[:, is_second].sum(dim=1)])
    sizes = torch.stack([(~is_second).sum(), is_second.sum()])
    own, other = is_second.long(), 1 - is_second.long()
    images = torch.arange(len(points))
    within = sums[own, images] / (sizes[own] - 1).clamp_min(1)
    between = sums[other, images] / sizes[other].clamp_min(1)
    found = (between - within) / torch.maximum(within, between).clamp_min(1e-12)
    return torch.where((sizes[own] > 1) & (sizes[other] > 0), found, torch.zeros_like(found))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
