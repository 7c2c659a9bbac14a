# SPDX-License-Identifier: Apache-2.0
"""Step 2: Mutual Scoring Mechanism (MSM)."""

from collections.abc import Callable, Sequence

import torch

# Products of one block that stay in a processor's cache, and that fill a GPU; in numbers, not bytes.
_CPU_BLOCK = 2**20
_GPU_BLOCK = 2**27
# Below this squared distance (relative to the squared norms) the difference |x|² + |y|² - 2xy has lost the digits
# that the result needs in float32, and the distance is computed again in float64.
_CANCELLATION = 1e-4


def mutual_scores(
    features: torch.Tensor,
    interval: tuple[float, float] = (0.0, 0.3),
    *,
    chunk_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    r"""Score every patch by its distance to all other images of the pool (arXiv 2401.16753, section 3.2).

    Image :math:`j` gives patch :math:`p` of image :math:`i` the distance to its own nearest patch; the patch score
    is the mean over the images with the smallest distances, the interval :math:`[lo, hi)` of the sorted values:

    .. math:: d_{ip}^{(j)} = \min_q \lVert x_{ip} - x_{jq} \rVert_2, \qquad
              a_{ip} = \operatorname{mean} \bigl\{ \operatorname{sort}_j d_{ip}^{(j)} \bigr\}_{lo}^{hi},
              \quad j \ne i

    Every unordered pair of images is multiplied once: the row minima of the product judge one image, the column
    minima the other.

    Args:
        features: Patch features of the pool, shape ``(N, L, C)``, as :func:`lnamd` returns them.
        interval: Which of the N - 1 ascending distances are averaged. A bound below 1 is a fraction, index
            ``int((N - 1) * bound)``; a bound of 1 or more is a count. At least one value is always averaged.
        chunk_size: Images that are compared with an image at once; bounds the working memory at
            ``chunk_size * L * L`` numbers and changes no result. Defaults to what suits the device.
        progress: Called with the number of image pairs that were just compared.

    Returns:
        Patch scores, shape ``(N, L)``; higher is more anomalous. float64 for float64 input, else float32.

    Raises:
        ValueError: If there are fewer than two images, a feature is not finite, or an argument is out of range.

    Example:
        >>> import torch
        >>> pool = torch.nn.functional.normalize(torch.randn(4, 30, 8), dim=-1)
        >>> mutual_scores(pool).shape
        torch.Size([4, 30])
        >>> mutual_scores(torch.ones(3, 5, 8))[0]  # every patch finds its like: nothing is anomalous
        tensor([0., 0., 0., 0., 0.])
    """
    _check(features, chunk_size)
    check_interval(interval, len(features))
    features = features.detach()
    if features.dtype != torch.float64:
        features = features.float()
    with torch.autocast(features.device.type, enabled=False):
        distances = _nearest_patch_distances(features, chunk_size or _default_chunk(features), progress)
    start, stop = _interval_bounds(interval, len(features) - 1)
    smallest = distances.topk(stop, dim=1, largest=False).values  # (N, stop, L), ascending
    return smallest[:, start:].mean(dim=1)


def check_interval(interval: tuple[float, float], num_images: int | None = None) -> None:
    """Raise a ValueError unless ``interval`` is a pair of bounds ``0 <= lo < hi``, see :func:`mutual_scores`.

    Args:
        interval: The two bounds, fractions below 1 or counts.
        num_images: Size of the pool. A fraction and a count can only be compared where it is known.
    """
    is_pair = isinstance(interval, Sequence) and len(interval) == 2
    if not is_pair or not (interval[0] >= 0 and 0 < interval[1] < float("inf")):
        msg = f"interval must be two finite bounds 0 <= lo < hi, got {interval!r}."
        raise ValueError(msg)
    low, high = interval
    if num_images is not None:
        low, high = (bound if bound >= 1 else bound * (num_images - 1) for bound in interval)
    comparable = num_images is not None or (low < 1) == (high < 1)
    if comparable and low >= high:
        pool = "" if num_images is None else f" for {num_images} images"
        msg = f"interval must begin below its end, got {tuple(interval)}{pool}; a bound of 1 or more is a count."
        raise ValueError(msg)


def _check(features: torch.Tensor, chunk_size: int | None) -> None:
    if features.ndim != 3 or 0 in features.shape[1:]:
        msg = f"features must have shape (N, L, C), L and C at least 1, got {tuple(features.shape)}."
        raise ValueError(msg)
    if len(features) < 2:
        msg = f"features must hold at least 2 images, which judge each other; got {len(features)}."
        raise ValueError(msg)
    if not torch.isfinite(features).all():
        bad = (~torch.isfinite(features)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        msg = f"features must be finite, got NaN or infinity in images {bad[:10]} of the pool."
        raise ValueError(msg)
    if chunk_size is not None and chunk_size < 1:
        msg = f"chunk_size must be at least 1 image, got {chunk_size}."
        raise ValueError(msg)


def _default_chunk(features: torch.Tensor) -> int:
    block = _CPU_BLOCK if features.device.type == "cpu" else _GPU_BLOCK
    return max(1, block // features.shape[1] ** 2)


def _interval_bounds(interval: tuple[float, float], count: int) -> tuple[int, int]:
    """Resolve fractions and counts to the slice ``[start, stop)`` of ``count`` sorted values, never empty."""
    start, stop = (min(int(bound if bound >= 1 else count * bound), count) for bound in interval)
    start = min(start, count - 1)
    return start, max(stop, start + 1)


def _nearest_patch_distances(
    features: torch.Tensor, chunk_size: int, progress: Callable[[int], object] | None
) -> torch.Tensor:
    """Return ``(N, N, L)``: entry ``[i, j, p]`` is the distance from patch p of image i to image j; infinite at i = j.

    Appending two columns to each side makes the product itself ``-|x - y|² / 2``, so that both directions are
    plain maxima of one matrix.
    """
    num_images, num_patches, _ = features.shape
    half_norm = features.square().sum(dim=-1, keepdim=True) / 2  # (N, L, 1)
    ones = torch.ones_like(half_norm)
    left = torch.cat([features, -half_norm, -ones], dim=-1)  # (N, L, C + 2)
    right = torch.cat([features, ones, half_norm], dim=-1)

    distances = features.new_full((num_images, num_images, num_patches), float("-inf"))
    memory = features.new_empty(min(chunk_size, num_images) * num_patches**2)  # stays in cache, is never cleared
    for i in range(num_images - 1):
        for first in range(i + 1, num_images, chunk_size):
            last = min(first + chunk_size, num_images)
            block = memory[: (last - first) * num_patches**2].view(num_patches, last - first, num_patches)
            torch.mm(left[i], right[first:last].flatten(0, 1).T, out=block.flatten(1))
            distances[i, first:last] = block.amax(dim=2).T
            distances[first:last, i] = block.amax(dim=0)
            if progress is not None:
                progress(last - first)
    distances.mul_(-2).clamp_min_(0)
    _restore_small_distances(distances, features, half_norm.max())
    return distances.sqrt_()


def _restore_small_distances(squared: torch.Tensor, features: torch.Tensor, half_norm: torch.Tensor) -> None:
    """Recompute in float64, in place, the squared distances that cancellation has spoilt."""
    if features.dtype == torch.float64:
        return
    spoilt = squared < _CANCELLATION * 2 * half_norm  # (N, N, L)
    for i, j in spoilt.any(dim=-1).nonzero().tolist():
        patches = spoilt[i, j]
        exact = torch.cdist(features[i, patches].double(), features[j].double()).amin(dim=1)
        squared[i, j, patches] = exact.square().to(squared.dtype)
