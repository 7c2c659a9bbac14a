# SPDX-License-Identifier: Apache-2.0
"""Step 2 against a bank of reference images: every image on its own, in operations that can be exported."""

import torch

from anomalib_musc.functional.mutual_scoring import interval_bounds

_BLOCK = 2**24  # numbers of a product that are held at once


def reference_scores(
    features: torch.Tensor,
    references: torch.Tensor,
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    own_copies: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Score every patch by its distance to reference images, as mutual scoring does by its distance to a pool.

    With the distances :math:`d_{ip}^{(j)}` of :func:`~anomalib_musc.functional.mutual_scores`, now to the M images
    :math:`j` of a bank, a patch's score is the mean of the smallest ones, the interval :math:`[lo, hi)` of M. No image
    has an influence on the score of another. With a pool as its own bank, each image's own copy left out, the scores
    are those of the pool.

    Args:
        features: Unit vectors of the images to judge, shape ``(B, L, C)``, as :func:`lnamd` returns them.
        references: Unit vectors of the bank, shape ``(M, L', C)``.
        interval: See :func:`~anomalib_musc.functional.mutual_scores`, with M for N - 1.
        own_copies: Which reference is the image itself and is left out, shape ``(B,)``. Defaults to none.

    Returns:
        Patch scores, shape ``(B, L)``.

    Example:
        >>> import torch
        >>> image, bank = torch.eye(3)[None, :2], torch.eye(3)[None, [0, 2]]
        >>> reference_scores(image, bank)  # the first patch is in the bank, the second at a right angle to all
        tensor([[0.0000, 1.4142]])
    """
    at_once = max(1, _BLOCK // (features.shape[1] * references.shape[1]))
    distances = torch.cat([_nearest(features, chunk) for chunk in references.split(at_once)])  # (M, B, L)
    count = len(references)
    if own_copies is not None:
        count -= 1
        distances[own_copies, torch.arange(len(features), device=features.device)] = float("inf")
    start, stop = interval_bounds(interval, count)
    return distances.sort(dim=0).values[start:stop].mean(dim=0)


def _nearest(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the distances ``(m, B, L)`` of patches ``(B, L, C)`` to their nearest in each reference ``(m, L', C)``."""
    products = torch.einsum("blc,mkc->mblk", features, references)
    nearest = products.argmax(dim=-1).flatten(1)  # (m, B * L)
    channels = features.shape[-1]
    neighbours = references.gather(1, nearest[..., None].expand(-1, -1, channels))  # (m, B * L, C)
    # Not from the product, whose rounding is all there is where patches are nearly the same.
    return (neighbours - features.reshape(1, -1, channels)).norm(dim=-1).view(len(references), *features.shape[:2])
