# SPDX-License-Identifier: Apache-2.0
"""Groups of images within a pool: those that differ all over, and those that share what most lack. A person judges."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.functional.peaks import Peaks

# Kaufman and Rousseeuw, Finding Groups in Data (1990), section 2.2: a mean silhouette above 0.7 shows a strong
# structure, one above 0.5 a reasonable one; what one of 0.25 or less shows "could be artificial". Values along one axis
# that have no groups, normal or uniform ones, have 0.6 where they are cut in two.
_STRONG, REASONABLE, _ARTIFICIAL = 0.7, 0.5, 0.25
FEWEST = 6  # images, below which no structure is looked for
_SEVERAL = 3  # images of a group
_EQUAL = 1e-4  # of distances, which are exact to that
_VALUES = 2**20  # of distances that are split at once
_ROUNDING = 1e-6  # of distances between unit vectors


@dataclass(frozen=True)
class ImageGroup:
    """Images of a pool that belong together.

    Attributes:
        text: What they have in common, in a sentence with some of their names.
        names: All their names.
    """

    text: str
    names: tuple[str, ...]


def find_groups(
    names: Sequence[str], features: torch.Tensor, peaks: Peaks | None = None, reach: int = 1
) -> list[ImageGroup]:
    """Find groups of a pool's images, see :func:`groups_alike` and :func:`groups_all_over`.

    Args:
        names: One an image.
        features: Median patch features, shape ``(N, C)``.
        peaks: The highest-scoring patches, where a defect of many images has its due by a second interval.
        reach: Within how many rows and columns two places are the same.

    Returns:
        The groups, each set of images once.
    """
    alike = [] if peaks is None else groups_alike(names, peaks, reach)
    known = {group.names for group in alike}
    return [*alike, *(group for group in groups_all_over(names, features) if group.names not in known)]


def groups_all_over(names: Sequence[str], features: torch.Tensor) -> list[ImageGroup]:
    """Find whether a pool falls into two groups that differ all over.

    It is split along the first principal axis of its features. There the split must be a strong structure, as what is
    large in all patches is, and among all features no artificial one.

    Args:
        names: One an image.
        features: Median patch features, shape ``(N, C)``.

    Returns:
        The smaller group, if there are two.
    """
    if len(features) < FEWEST:
        return []
    points = F.normalize(features.double(), dim=-1)
    values, vectors = torch.linalg.eigh((points - points.mean(dim=0)) @ (points - points.mean(dim=0)).T)
    axis = vectors[:, -1] * values[-1].clamp_min(0).sqrt()
    is_high, silhouettes = split_rows((axis / _EQUAL).round()[None])
    among_all = silhouettes_of(features, is_high[0])
    least = min(among_all[is_high[0]].mean().item(), among_all[~is_high[0]].mean().item())
    if not _are_apart(is_high, silhouettes).item() or least <= _ARTIFICIAL:
        return []
    small = is_high[0] if 2 * int(is_high.sum()) <= len(axis) else ~is_high[0]
    members = _named(names, np.flatnonzero(small.numpy()))
    if len(members) < _SEVERAL:
        return []
    return [
        ImageGroup(
            f"Two groups of images that differ all over ({len(names) - len(members)} and {len(members)}): two "
            f"products, variants, lots or cameras, or a defect of the whole image? The smaller one has "
            f"{some(members)}. Where both are good, score each on its own.",
            members,
        )
    ]


def groups_alike(names: Sequence[str], peaks: Peaks, reach: int) -> list[ImageGroup]:
    """Find images whose highest-scoring patches are like each other's and unlike those of most images.

    The other images are split in two by their distance from such a patch. Where the split is a clear one and the nearer
    ones are not the majority, these are its likes. Images that are each other's likes form a group, and whoever is
    linked to one of them.

    Args:
        names: One an image.
        peaks: Their highest-scoring patches.
        reach: Within how many rows and columns two places are the same.
    """
    if len(names) < FEWEST:
        return []
    likes = find_likes(peaks.distances)
    are_likes = likes & likes.T
    number, labels = connected_components(are_likes.numpy(), directed=False)
    groups = []
    for label in range(number):
        found = np.flatnonzero(labels == label)
        if len(found) < _SEVERAL:
            continue
        linked = are_likes[found][:, found]
        is_same = peaks.steps[found][:, found][linked].float().median().item() <= reach
        members = _named(names, found)
        groups.append(
            ImageGroup(
                f"{len(members)} images share {'at the same place' if is_same else 'at various places'} what most "
                f"others lack: {some(members)}. A defect that repeats, or a variant?",
                members,
            )
        )
    return sorted(groups, key=lambda group: -len(group.names))


def find_likes(distances: torch.Tensor) -> torch.Tensor:
    """Return which images are the likes of each, by their distances ``(N, N)``; bool ``(N, N)``."""
    num_images = len(distances)
    likes = torch.zeros(num_images, num_images, dtype=torch.bool)
    for rows in torch.arange(num_images).split(max(1, _VALUES // num_images)):
        is_other = rows[:, None] != torch.arange(num_images)
        others = (distances[rows].double() / _EQUAL).round()[is_other].view(len(rows), num_images - 1)
        is_far, silhouettes = split_rows(others)
        are_few = 2 * (~is_far).sum(dim=1) <= num_images - 1
        of_rows = torch.zeros_like(is_other)
        of_rows[is_other] = (~is_far & (_are_apart(is_far, silhouettes) & are_few)[:, None]).flatten()
        likes[rows] = of_rows
    return likes


def split_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split each row of values in two so that the squared deviations from both means are least (k-means, exactly).

    Args:
        values: Shape ``(R, n)``, n of at least 2.

    Returns:
        Which are of the higher part, bool, and their silhouettes (Rousseeuw 1987), 0 of one alone; shapes ``(R, n)``.
    """
    ascending, order = values.double().sort(dim=1)
    num_values = values.shape[1]
    sums = F.pad(ascending.cumsum(dim=1), (1, 0))  # of the lowest k, (R, n + 1)
    counts = torch.arange(1, num_values, dtype=torch.float64)
    low_means, high_means = sums[:, 1:-1] / counts, (sums[:, -1:] - sums[:, 1:-1]) / (num_values - counts)
    split = (counts * (num_values - counts) * (high_means - low_means) ** 2).argmax(dim=1)[:, None] + 1
    places = torch.arange(num_values).expand_as(ascending)
    is_high = places >= split
    start, stop = torch.where(is_high, split, 0), torch.where(is_high, num_values, split)  # of a value's own part

    def between(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return sums.gather(1, end) - sums.gather(1, begin)

    below = ascending * (places - start) - between(start, places)
    above = between(places, stop) - ascending * (stop - places)
    own = (below + above) / (stop - start - 1).clamp_min(1)
    other_sums = sums[:, -1:] - between(start, stop)
    others = num_values - (stop - start)
    other = (other_sums - ascending * others).abs() / others
    found = (other - own) / torch.maximum(own, other).clamp_min(1e-12)
    found = torch.where(stop - start > 1, found, 0.0)
    return (
        torch.zeros_like(is_high).scatter(1, order, is_high),
        torch.zeros_like(found).scatter(1, order, found),
    )


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


def some(names: Sequence[str]) -> str:
    """Return up to three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _are_apart(is_high: torch.Tensor, silhouettes: torch.Tensor) -> torch.Tensor:
    """Return whether each row's two parts are a strong structure, and each of them a reasonable one; ``(R,)``."""
    high = (silhouettes * is_high).sum(dim=1) / is_high.sum(dim=1)
    low = (silhouettes * ~is_high).sum(dim=1) / (~is_high).sum(dim=1)
    return (silhouettes.mean(dim=1) > _STRONG) & (torch.minimum(high, low) > REASONABLE)


def _named(names: Sequence[str], indices: np.ndarray) -> tuple[str, ...]:
    return tuple(names[index] for index in indices)
