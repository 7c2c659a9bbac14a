# SPDX-License-Identifier: Apache-2.0
"""Step 2 against a memory bank of reference images: each image on its own, in operations that can be exported."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import product

import torch

from anomalib_musc.distances import full_precision
from anomalib_musc.distances.same_place import make_places
from anomalib_musc.functional.mutual_scoring import check_interval, interval_bounds

_BLOCK = 2**24  # numbers of a product that are held at once
_COLUMNS = 32


def reference_scores(
    features: torch.Tensor,
    references: torch.Tensor,
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    own_copies: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    search_radius: int | None = None,
) -> torch.Tensor:
    r"""Score every patch by its distances to reference images, as :func:`mutual_scores` does by those to a pool.

    The distance of patch :math:`p` of a query image :math:`i` to reference :math:`j` is that to its nearest patch
    there; the patch score is the mean over an interval of the sorted values:

    .. math:: d_{ip}^{(j)} = \min_q \lVert x_{ip} - y_{jq} \rVert_2, \qquad
              a_{ip} = \operatorname{mean} \bigl\{ \operatorname{sort}_j d_{ip}^{(j)} \bigr\}_{lo}^{hi}

    No query has an influence on another. With a pool as its own references, each image's own copy left out, the scores
    are those of the pool.

    Args:
        features: Unit vectors of the query images, shape ``(B, L, C)``, as :func:`lnamd` returns them.
        references: Unit vectors of the reference images, shape ``(M, L', C)``.
        interval: See :func:`~anomalib_musc.functional.mutual_scores`, with M for N - 1.
        own_copies: Which reference is the image itself and is left out, shape ``(B,)``. Defaults to none.
        grid: Height and width of the map whose rows the patches are, of queries and references.
        search_radius: Within how many rows and columns of its own place a patch is sought, see
            :func:`~anomalib_musc.functional.layer_scores`; needs ``grid``. Defaults to the whole image.

    Returns:
        Patch scores, shape ``(B, L)``.

    Raises:
        ValueError: If the shapes do not agree, ``search_radius`` is given without ``grid``, no reference is left to
            compare with, ``interval`` is not valid, or a value is not finite.

    Example:
        >>> import torch
        >>> query, reference = torch.eye(3)[None, :2], torch.eye(3)[None, [0, 2]]
        >>> reference_scores(query, reference)  # the first patch is there, too, the second at a right angle to all
        tensor([[0.0000, 1.4142]])
    """
    _check(features, references, own_copies)
    if search_radius is not None and grid is None:
        msg = f"search_radius={search_radius} needs grid, the height and width of the map whose rows the patches are."
        raise ValueError(msg)
    count = len(references) - (own_copies is not None)
    check_interval(interval, count + 1)
    bounds = interval_bounds(interval, count)
    return reference_means(
        features, references, [bounds], own_copies=own_copies, grid=grid, search_radius=search_radius
    )[0]


def reference_means(
    features: torch.Tensor,
    references: torch.Tensor,
    slices: Sequence[tuple[int, int]],
    *,
    own_copies: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
    search_radius: int | None = None,
) -> torch.Tensor:
    """Average slices of the ascending distances of every patch to the references; see :func:`reference_scores`.

    Args:
        features: Unit vectors of the query images, shape ``(B, L, C)``.
        references: Those of the reference images, shape ``(M, L', C)``.
        slices: K of them, ``(start, stop)`` with start below stop, which is at most M.
        own_copies: See :func:`reference_scores`, as the others.
        grid: Likewise.
        search_radius: Likewise.

    Returns:
        Means, shape ``(K, B, L)``.
    """
    with nullcontext() if torch.compiler.is_compiling() else full_precision(features.device):
        scores = torch.cat(
            [
                _score(patches, near, slices, own_copies, is_far)
                for block, near, is_far in _search(features, references, grid, search_radius)
                for patches in block
            ],
            dim=2,
        )
    if not torch.compiler.is_compiling() and not scores.isfinite().all():  # an exported model takes what it gets
        msg = f"features and references must be finite, got NaN or infinity: {int((~scores.isfinite()).sum())} scores."
        raise ValueError(msg)
    return scores


def _search(
    features: torch.Tensor, references: torch.Tensor, grid: tuple[int, int] | None, search_radius: int | None
) -> Iterator[tuple[Sequence[torch.Tensor], torch.Tensor, torch.Tensor | None]]:
    """Yield blocks of patches ``(B, l, C)``, and among which patches ``(M, k, C)`` of the references they are sought.

    Of patches of a row, which of those are too far, ``(l, k)``.
    """
    places = None if grid is None else make_places(grid, search_radius)
    if places is None:
        num_columns = references.shape[0] * references.shape[1]
        if not torch.compiler.is_compiling():  # an export must not depend on the size of its example's batch
            num_columns *= len(features)
        yield features.split(max(1, _BLOCK // num_columns), dim=1), references, None
        return
    (height, width), search_radius = places.grid, places.radius
    step = max(_COLUMNS, 2 * search_radius + 1)  # places of a row that share their references
    for row, first in product(range(height), range(0, width, step)):
        last = min(width, first + step)
        rows = torch.arange(max(0, row - search_radius), min(height, row + search_radius + 1), device=features.device)
        columns = torch.arange(max(0, first - search_radius), min(width, last + search_radius), device=features.device)
        near = (rows[:, None] * width + columns).flatten()  # (k,)
        own = torch.arange(first, last, device=features.device)
        is_far = ((own[:, None] - columns).abs() > search_radius).repeat(1, len(rows))
        yield [features[:, row * width + first : row * width + last]], references[:, near], is_far


def _check(features: torch.Tensor, references: torch.Tensor, own_copies: torch.Tensor | None) -> None:
    for name, vectors in (("features", features), ("references", references)):
        if vectors.ndim != 3 or vectors.shape[2] != features.shape[-1]:
            msg = f"{name} must have shape (images, patches, C), C as that of features, got {tuple(vectors.shape)}."
            raise ValueError(msg)
    least = 1 if own_copies is None else 2
    if len(references) < least:
        besides = "" if own_copies is None else ", as each image's own copy is left out"
        msg = f"references must hold at least {least} image{'s' * (least > 1)}{besides}, got {len(references)}."
        raise ValueError(msg)


def _score(
    features: torch.Tensor,
    references: torch.Tensor,
    slices: Sequence[tuple[int, int]],
    own_copies: torch.Tensor | None,
    is_far: torch.Tensor | None,
) -> torch.Tensor:
    """Score patches ``(B, l, C)``, but for references that are too far, ``(l, L')``; returns ``(K, B, l)``."""
    vectors = features.flatten(0, 1)  # (B * l, C)
    products = (vectors @ references.flatten(0, 1).T).unflatten(1, references.shape[:2])  # (B * l, M, L')
    if is_far is not None:
        products = products.unflatten(0, features.shape[:2]).masked_fill(is_far[:, None], -float("inf")).flatten(0, 1)
    # A maximum with its index takes several times as long as one without: it pays where most references are averaged.
    are_few = 2 * sum(stop - start for start, stop in slices) < len(references)
    cosines, nearest = (products.amax(dim=-1), None) if are_few else products.max(dim=-1)  # (B * l, M)
    if own_copies is not None:
        cosines.view(*features.shape[:2], -1)[torch.arange(len(features)), :, own_copies] = -float("inf")
    order = cosines.argsort(dim=1, descending=True)  # from the nearest reference on
    chosen = torch.cat([order[:, start:stop] for start, stop in slices], dim=1)  # (B * l, k), those of all slices
    if nearest is None:
        nearest = products[torch.arange(chosen.shape[0], device=chosen.device)[:, None], chosen].argmax(dim=-1)
    else:
        nearest = nearest.gather(1, chosen)
    neighbours = references.flatten(0, 1)[chosen * references.shape[1] + nearest]  # (B * l, k, C)
    # Not from the cosine, which rounding spoils where patches are nearly the same.
    distances = (neighbours - vectors[:, None]).norm(dim=-1)
    means = [part.mean(dim=1) for part in distances.split([stop - start for start, stop in slices], dim=1)]
    return torch.stack(means).view(-1, *features.shape[:2])
