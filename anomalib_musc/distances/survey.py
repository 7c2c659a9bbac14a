# SPDX-License-Identifier: Apache-2.0
"""A look at the features before the long work: can they be compared, and around what do most of them lie."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from anomalib_musc.distances.storage import BUSY_NUMBERS, release

_SHARE = 0.39  # of the exponent: 1e15 in float32, whose squares can still be added over channels and windows
_IMAGES, _PATCHES = 8, 64  # that are looked at: enough to find a twentieth of all, few beside the pairs of a pool
_CLOSEST = 20
_CENTRES = 4  # one of so many is tried as the middle: of the 512, six lie where a twentieth of all does
_STATIC = 1 / 8  # of the places: distances of fewer are cheaper to recompute


def largest_value(dtype: torch.dtype) -> float:
    """Return the largest number whose squares can be added in a type without overflow: 1e15 in float32."""
    return float(f"{torch.finfo(torch.promote_types(dtype, torch.float32)).max ** _SHARE:.0e}")


def check_values(
    features: torch.Tensor, images: Sequence[int], name: str = "features"
) -> dict[int, tuple[float, float]]:
    """Return the least and the largest number of each image; finite ones, and not so large that squares overflow.

    Args:
        features: Features of N images, shape ``(N, ...)``, on any device.
        images: Indices of those that are compared.
        name: What the argument is called.

    Raises:
        ValueError: If there are others; it names their images.
    """
    most, bounds = largest_value(features.dtype), []
    is_on_host = features.device.type == "cpu"
    at_once = 1 if is_on_host else max(1, BUSY_NUMBERS // math.prod(features.shape[1:]))
    for first in range(0, len(images), at_once):
        some = images[first : first + at_once]
        if is_on_host:
            bounds.append(torch.stack(features[some[0]].aminmax())[None])
            release(features)
        else:
            bounds.append(torch.stack(features[list(some)].flatten(1).aminmax(dim=1), dim=1))
    # a device is waited for once
    found = dict(zip(images, map(tuple, torch.cat(bounds).tolist()), strict=True)) if bounds else {}
    bad = [image for image, (low, high) in found.items() if not (-low <= most and high <= most)]  # NaN is neither
    if bad:
        msg = (
            f"{name} must be finite, got NaN or infinity in images {bad[:10]}, or numbers above {most:.0e}, whose "
            "squares overflow."
        )
        raise ValueError(msg)
    return found


def some_of(shares: Sequence[Mapping[int, tuple[float, float]]]) -> list[tuple[int, int]]:
    """Return a few images, the same in whatever order they come and however they are shared out.

    Args:
        shares: The least and the largest number of each image, see :func:`check_values`, of each process.

    Returns:
        The process and the image.
    """
    images = [(values[image], rank, image) for rank, values in enumerate(shares) for image in values]
    ordered = [(rank, image) for _, rank, image in sorted(images)]
    return ordered[:: max(1, len(ordered) // _IMAGES)][:_IMAGES]


def some_places(num_patches: int, position: int) -> torch.Tensor:
    """Return a few places ``(n,)`` of an image's L, which is at a position among the images looked at."""
    return torch.randperm(num_patches, generator=torch.Generator().manual_seed(position))[:_PATCHES]


def is_static(patches: torch.Tensor, least_share: float, counted: Literal["all", "kinds", "single"]) -> bool:
    """Whether two of a few images are all but equal at an eighth of some places, as where no background moves.

    Args:
        patches: Patches of a few images at the same places, ``(I, n, C)``.
        least_share: Of their squared norm, below which their squared distance is too small for products.
        counted: Which of these places: all; one of each kind, as in the whole search distances of few kinds are cheap
            to recompute; or those alone that are like no other. Likes are sought in the first image.
    """
    vectors = patches.transpose(0, 1)  # (n, I, C)
    squared = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist").square()
    squared.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    sizes = vectors.square().sum(dim=-1)
    is_far = sizes > least_share * sizes.max()
    is_counted = (is_far[..., None] & (squared < least_share * sizes[..., None])).flatten(1).any(dim=1)  # (n,)
    if counted != "all":
        points = vectors[:, 0]
        is_like = torch.cdist(points, points).square() < least_share * sizes[:, :1]
        others = is_like.tril(-1) if counted == "kinds" else is_like.fill_diagonal_(False)
        is_counted &= ~others.any(dim=1)
    return bool(is_counted.double().mean() >= _STATIC)


def densest_place(points: torch.Tensor) -> tuple[torch.Tensor, float]:
    r"""Return the mean ``(C,)`` of the twentieth of patches that lie closest together, as those of a background do.

    Beside it the distance within which they lie.

    Distances do not change where it is subtracted, but products lose the digits that patches have in common: the error
    of :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 x \cdot y` is of the size of the norms. So it is small where
    distances are, whatever offset all patches share.

    Args:
        points: Some patches of a few images, ``(n, C)``.
    """
    is_finite = points.sum(dim=1).isfinite()
    if not is_finite.all():
        points = points[is_finite]  # who loads the others will say so
    if not len(points):
        return torch.zeros_like(points.sum(dim=0)), float("inf")
    centred = points - points.mean(dim=0)
    nearest = torch.cdist(centred[::_CENTRES], centred).topk(max(1, len(points) // _CLOSEST), largest=False)
    densest = nearest.values[:, -1].argmin()
    return points[nearest.indices[densest]].mean(dim=0), nearest.values[densest, -1].item()
