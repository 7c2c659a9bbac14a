# SPDX-License-Identifier: Apache-2.0
"""Signs that a pool is not what its user thinks it is: sentences, no refusals, from what scoring gives anyway."""

from collections.abc import Mapping, Sequence

import torch

from anomalib_musc.pool.groups import FEWEST, REASONABLE, silhouettes_of, some
from anomalib_musc.pool.looks import LEVEL, Look

_SIGN_TEST = 1.645  # standard deviations, one-sided at 5 %
SAME_SCORE = 1e-4  # scores are exact to that


def warn_of_pool(
    looks: Mapping[str, Look],
    features: torch.Tensor,
    references: torch.Tensor | None,
    raw_scores: torch.Tensor,
) -> list[str]:
    """Say all that is odd about a pool before it has labels.

    Args:
        looks: What a glance at them showed, by name, as far as they were looked at.
        features: Median patch features of the images, shape ``(N, C)``.
        references: Likewise of the references, shape ``(M, C)``, if there are any.
        raw_scores: Raw image scores, shape ``(N,)``.
    """
    warnings = warn_of_looks(looks)
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
    return [f"Grey and coloured images are mixed ({len(grey)} and {len(coloured)}), such as {some(few)}."]


def shows_nothing(looks: Mapping[str, Look], raw_scores: torch.Tensor) -> bool:
    """Whether images are blank, or their raw scores ``(N,)`` equal, so that none of a pool can be called anomalous."""
    return _are_blank(looks) or _are_equal(raw_scores)


def _are_blank(looks: Mapping[str, Look]) -> bool:
    return bool(looks) and all(look.contrast <= LEVEL for look in looks.values())


def _are_equal(raw_scores: torch.Tensor) -> bool:
    return len(raw_scores) > 1 and (raw_scores.max() - raw_scores.min()).item() <= SAME_SCORE


def warn_of_references(features: torch.Tensor, references: torch.Tensor) -> list[str]:
    """Say where images differ all over from the references.

    Args:
        features: Median patch features of the images, shape ``(N, C)``.
        references: Those of the references, shape ``(M, C)``.
    """
    if len(features) + len(references) < FEWEST or not len(references):
        return []
    is_image = torch.arange(len(features) + len(references)) >= len(references)
    silhouettes = silhouettes_of(torch.cat([references, features]), is_image)
    of_both = (silhouettes[is_image].mean() + silhouettes[~is_image].mean()) / 2  # however many there are of either
    if of_both <= REASONABLE:
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
