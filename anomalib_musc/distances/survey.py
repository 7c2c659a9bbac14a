# SPDX-License-Identifier: Apache-2.0
"""One look at all features before the long work: can they be compared, and what have all patches in common."""

from collections.abc import Callable, Sequence

import torch

from anomalib_musc.distances.storage import release

_SHARE = 0.39  # of the exponent: 1e15 in float32, whose squares can still be added over channels and windows


def largest_value(dtype: torch.dtype) -> float:
    """Return the largest number whose squares can be added in a type without overflow: 1e15 in float32."""
    return float(f"{torch.finfo(torch.promote_types(dtype, torch.float32)).max ** _SHARE:.0e}")


def check_values(features: torch.Tensor, images: Sequence[int], name: str = "features") -> None:
    """Raise a ValueError that names the images with NaN, infinity, or numbers whose squares would overflow.

    Args:
        features: Features of N images, shape ``(N, ...)``, on any device.
        images: Indices of those that are compared.
        name: What the argument is called.
    """
    most, bad = largest_value(features.dtype), []
    for image in images:
        low, high = features[image].aminmax()
        if not (-low <= most and high <= most):  # NaN is neither
            bad.append(image)
        release(features)
    if bad:
        msg = (
            f"{name} must be finite, got NaN or infinity in images {bad[:10]}, or numbers above {most:.0e}, whose "
            "squares overflow."
        )
        raise ValueError(msg)


def common_offset(
    patches: torch.Tensor, images: Sequence[int], prepare: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor | None:
    r"""Return the mean patch ``(C,)`` where it is longer than patches differ from it, else ``None``.

    Distances do not change where it is subtracted, but products lose the digits that all patches have in common:
    with an offset c the error of :math:`\lVert x \rVert^2 + \lVert y \rVert^2 - 2 x \cdot y` is of the size of
    :math:`\lVert c \rVert^2`. Unit vectors are left as they are, unless they are much alike.

    Args:
        patches: Patches of N images, shape ``(N, L, C)``.
        images: Indices of those that are compared.
        prepare: Changes the patches of one image, ``(1, L, C)``.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    mean, squares = torch.zeros(patches.shape[2], dtype=torch.float64), 0.0
    for image in images:
        found = patches[image : image + 1].to(dtype)
        found = found if prepare is None else prepare(found)
        mean += found.mean(dim=(0, 1)).double().cpu() / len(images)
        squares += found.square().mean().item() * patches.shape[2] / len(images)
        release(patches)
    return mean.to(dtype) if mean.square().sum().item() > squares / 2 else None
