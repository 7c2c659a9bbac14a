# SPDX-License-Identifier: Apache-2.0
"""Large pools in subsets, each scored on its own (arXiv 2401.16753, section 4.3)."""

import logging

import torch

logger = logging.getLogger(__name__)

MIN_SUBSET = 5  # below it, a fraction of 0.3 of the others is no image
_SIGNS = 20


def count_subsets(number: int, num_images: int) -> int:
    """Return into how many subsets a pool is split: ``number``, or fewer where one would hold less than 5 images."""
    return max(1, min(number, num_images // MIN_SUBSET))


def split_into_subsets(class_tokens: torch.Tensor, number: int) -> list[list[int]]:
    """Split a pool at random into subsets of equal size, give or take one.

    The split is the same each time and does not depend on the order of the images: they are ordered by a hash of the
    signs of random projections of their image features.

    Args:
        class_tokens: Image features, shape ``(N, D)``.
        number: How many subsets; fewer where one would hold less than 5 images.

    Returns:
        The indices of each subset's images, in ascending order.

    Example:
        >>> [len(subset) for subset in split_into_subsets(torch.eye(17), 3)]
        [6, 6, 5]
    """
    tokens = class_tokens.cpu().double()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(tokens.shape[1], _SIGNS, generator=generator, dtype=torch.float64)
    projections = (tokens - tokens.mean(dim=0)) @ directions  # (N, signs)
    codes = ((projections > 0) * 2 ** torch.arange(_SIGNS)).sum(dim=1)
    hashes = torch.randperm(2**_SIGNS, generator=generator)[codes]
    by_projection = projections[:, 0].argsort(stable=True)  # decides between images of equal signs
    order = by_projection[hashes[by_projection].argsort(stable=True)]
    count = count_subsets(number, len(tokens))
    if count < number:
        logger.warning(
            "num_subsets=%d would leave a pool of %d images fewer than %d a subset; using %d.",
            *(number, len(tokens), MIN_SUBSET, count),
        )
    return [part.sort().values.tolist() for part in order.tensor_split(count)]
