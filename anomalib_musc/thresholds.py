# SPDX-License-Identifier: Apache-2.0
"""Thresholds for a pool of which nobody has said what is normal.

The assumption is that of the method: every place is normal in most images, at least a quarter of the images is normal,
and a defect is confined to a part of its image. Where defects look like ordinary variation, they are missed rather than
all images flagged.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# All constants were chosen on pools with 0 to 50 % defects of two real and two procedural products, see
# benchmarks/README.md. Rounding and copies:
_FLOOR = 0.02  # of the scores' 0.99 quantile; less is rounding between equal patches, such as a black background's
_COPY = 2.5  # times the floor, below which all scores of an image that has a copy in the pool lie
_ALIKE, _FEW_UNLIKE = 0.02, 0.25  # height below which an image has a copy in the pool, and share that may lack one
# Two groups, by levels or by spread:
_FEWEST_OF_TWO = 8  # images, of which fewer are not parted
_FEWEST_HIGH, _MOST_HIGH = 0.2, 0.75  # shares of the pool that the higher group may have; by spread no fewest
# Levels:
_LEVELS = 0.6  # by how much the logarithms of the highest scores differ between two groups of images, on average
_CLEAR, _CLEAR_OF_FEW = 2.4, 5.0  # times the deviation within two groups that they lie apart; and what few images add
# Clear defects:
_CONTRAST = 0.8  # beyond which an image has a clear defect
_FAR_BESIDE = 2.6  # times the lower quartile of the heights, beyond which another one is beside it
# A wide spread:
_SPREAD, _SPREAD_OF_FEW = 0.8, 2.0  # of the heights, (q90 - q10) / median, of two groups; and what few images add
_TAIL, _HIGHEST = 3.5, 0.1  # q999 / q90 of the patches, of two groups, without this share of images, the highest
_POWER = -0.1  # of the heights, which Otsu's criterion parts: nearly their logarithms
# Outliers:
_FAR, _NEAR = 3.2, 1.6  # times the lower quartile of the heights, beyond which an image is an outlier, or may be one
_MOST_NEAR = 0.05  # share of the pool that may be flagged as "may be one"
# Images:
_NEARBY = 3  # of those counted, the part that may be fewer or more: a third
_WIDER = 3.0  # times wider than the gap at the count is the one that overrules it
# Pixels:
_NORMAL_PEAKS = 0.75  # quantile of the normal images' highest patches that an anomalous pixel exceeds
_PEAKS, _OF_PEAKS = 0.25, 0.8  # quantile of the anomalous images' highest patches, and share of their median: likewise


def _floor(patch_scores: Array) -> float:
    """Return the score below which there is only rounding."""
    return float(max(_FLOOR * np.quantile(patch_scores, 0.99), np.finfo(np.float32).eps))


def _has_copy(patch_scores: Array) -> NDArray[np.bool_]:
    """Return which images have a copy in the pool, or nearly so: they score low all over, and not the others."""
    found: NDArray[np.bool_] = patch_scores.max(axis=1) <= _COPY * _floor(patch_scores)
    if found.all():
        return ~found
    medians = np.median(patch_scores, axis=1)
    return found & (medians < 0.5 * np.median(medians[~found]))  # else the others' defects are that clear


def deviations(patch_scores: Array) -> tuple[Array, NDArray[np.bool_]]:
    r"""Return how far each patch stands out, :math:`\log a_{ip} - m_p - m_i`, and at which places images differ.

    :math:`m_p` is the median of the logarithms over the images at a place, :math:`m_i` then that of an image over its
    places: neither an edge that is rare everywhere nor an image that is a little different all over stands out. Where
    most images are equal, as in a black background, :math:`m_i` is left out.

    Args:
        patch_scores: The scores a, shape ``(N, L)``; an image that has a copy in the pool does not stand out.
    """
    floor = _floor(patch_scores)
    logarithms = np.log(np.maximum(patch_scores, floor))
    has_copy = _has_copy(patch_scores)
    at_place = np.median(logarithms[~has_copy], axis=0)
    logarithms -= at_place
    differs = at_place > np.log(floor)
    if not differs.any():
        differs[:] = True
    logarithms[:, differs] -= np.median(logarithms[:, differs], axis=1, keepdims=True)
    logarithms[has_copy] = 0
    return logarithms, differs


def count_anomalous(patch_scores: Array) -> int:
    """Estimate how many images of a pool are anomalous; never all of them.

    The first case that applies decides: two levels, clear defects, a wide spread; else there are only outliers.

    Args:
        patch_scores: Shape ``(N, L)``.

    Example:
        >>> patch_scores = np.random.default_rng(0).uniform(0.2, 0.3, (20, 50))
        >>> patch_scores[:3, :2] = 0.9
        >>> count_anomalous(patch_scores)
        3
    """
    if on_higher_level := count_on_higher_level(patch_scores):
        return on_higher_level
    patches, differs = deviations(patch_scores)
    heights = patches.max(axis=1)
    unlike = heights[heights > _ALIKE]
    unlike = unlike if len(unlike) > _FEW_UNLIKE * len(heights) else heights
    quarter = max(float(np.quantile(unlike, 0.25)), _ALIKE)
    if num_clear := int((contrasts(patch_scores) > _CONTRAST).sum()):  # beside which milder ones may be missed
        count = max(num_clear, int((heights > _FAR_BESIDE * quarter).sum()))
    else:
        count = count_outliers(heights, quarter)
        if _is_wide(unlike, len(heights)) and _has_tail(patches, differs):
            above_zero = np.maximum(unlike, max(float(np.median(unlike)), _ALIKE) / 10)
            upper = upper_group(-(above_zero**_POWER))
            count = max(count, min(upper, int(_MOST_HIGH * len(heights))))
    return min(count, len(heights) - 1)


def count_outliers(heights: Array, quarter: float) -> int:
    """Return how many images stand out far, or nearly as far where they are few.

    Args:
        heights: Each image's largest deviation, shape ``(N,)``.
        quarter: Their lower quartile.
    """
    most_near = int(_MOST_NEAR * len(heights))
    return int(max((heights > _FAR * quarter).sum(), min(most_near, (heights > _NEAR * quarter).sum())))


def _is_wide(heights: Array, num_images: int) -> bool:
    """Return whether the images stand out by widely different amounts."""
    low, median, high = np.maximum(np.quantile(heights, (0.1, 0.5, 0.9)), _ALIKE)
    wide = _SPREAD + _SPREAD_OF_FEW / math.sqrt(num_images)
    return num_images >= _FEWEST_OF_TWO and bool(high - low > wide * median)


def _has_tail(patches: Array, differs: NDArray[np.bool_]) -> bool:
    """Return whether the highest patches are far from the rest, for all that a few images are left out."""
    ascending = np.argsort(patches.max(axis=1))
    rest = patches[ascending[: -math.ceil(_HIGHEST * len(patches))]]
    return bool(np.quantile(rest, 0.999) > _TAIL * np.quantile(rest[:, differs], 0.9))


def contrasts(patch_scores: Array) -> Array:
    """Return by how much the logarithm of each image's highest score is beyond the usual, shape ``(N,)``.

    Beyond the median of all images, with and without each image's own median taken out first, whichever is less: an
    image that is different all over has no contrast.

    Args:
        patch_scores: Shape ``(N, L)``; images that have a copy in the pool have no contrast.
    """
    logarithms = np.log(np.maximum(patch_scores, _floor(patch_scores)))
    has_copy, peaks = _has_copy(patch_scores), logarithms.max(axis=1)
    within = peaks - np.median(logarithms, axis=1)
    beyond = [values - np.median(values[~has_copy]) for values in (peaks, within)]
    return np.where(has_copy, 0.0, np.min(beyond, axis=0))


def count_on_higher_level(patch_scores: Array) -> int:
    """Return how many images have their highest score on the higher of two levels; 0 where there are not two.

    Where Otsu's criterion parts the images' highest scores, the means of the groups' logarithms must lie apart: by more
    than those of the images' medians do, or the images of the higher group differ all over, as all others do from
    several shots of one thing; and by more than one group that is cut in two.

    Args:
        patch_scores: Shape ``(N, L)``; images that have a copy in the pool are on no level.
    """
    floor = _floor(patch_scores)
    unlike = patch_scores[~_has_copy(patch_scores)]
    if len(unlike) < _FEWEST_OF_TWO:
        return 0
    logarithms = np.log(np.maximum(unlike, floor))
    peaks, medians = logarithms.max(axis=1), np.median(logarithms, axis=1)
    count = upper_group(-np.exp(-peaks))  # by reciprocals, or few very high ones would be a group of their own
    order = np.argsort(peaks)
    low, high = order[:-count], order[-count:]
    apart = peaks[high].mean() - peaks[low].mean()
    within = math.sqrt((len(low) * peaks[low].var() + len(high) * peaks[high].var()) / len(order))
    are_levels = (
        apart - (medians[high].mean() - medians[low].mean()) > _LEVELS
        and apart > (_CLEAR + _CLEAR_OF_FEW / math.sqrt(len(order))) * within
        and _FEWEST_HIGH <= count / len(patch_scores) <= _MOST_HIGH
    )
    return count if are_levels else 0


def upper_group(values: Array) -> int:
    """Return how many of the values are in the upper group, where two groups differ most (Otsu, 1979).

    Example:
        >>> upper_group(np.array([1.0, 9.0, 1.5, 8.0, 2.0]))
        2
    """
    ascending = np.sort(values)
    sizes = np.arange(1, len(ascending))
    sums = np.cumsum(ascending)
    lower_means = sums[:-1] / sizes
    upper_means = (sums[-1] - sums[:-1]) / (len(ascending) - sizes)
    between = sizes * (len(ascending) - sizes) * (upper_means - lower_means) ** 2
    return len(ascending) - int(sizes[between.argmax()])


def image_threshold(scores: Array, num_anomalous: int) -> float:
    """Return the threshold that about so many of the scores ``(N,)`` exceed; none exceeds it for 0.

    The number is an estimate: it lies in the widest gap between the scores that leaves at most a third fewer or more
    above, and at most three quarters of all, if that is more than three times as wide as the gap at the number itself.
    A number of at most 5 % of the pool is kept. Of equal scores all or none exceed it.

    Example:
        >>> image_threshold(np.array([0.1, 0.5, 0.9]), 1)
        0.7
        >>> image_threshold(np.array([0.1, 0.25, 0.3, 0.7, 0.8, 0.9]), 4)
        0.5
    """
    descending = np.sort(scores)[::-1]
    if num_anomalous == 0:
        return float(descending[0])
    gaps = descending[:-1] - descending[1:]
    last = num_anomalous - 1  # of those above
    if num_anomalous > _MOST_NEAR * len(scores):
        fewest = num_anomalous - num_anomalous // _NEARBY
        most = min(num_anomalous + num_anomalous // _NEARBY, int(_MOST_HIGH * len(scores)))
        widest = fewest - 1 + int(gaps[fewest - 1 : max(most, num_anomalous)].argmax())
        last = widest if gaps[widest] > _WIDER * gaps[last] else last
    return float((descending[last] + descending[last + 1]) / 2)


def pixel_threshold(patch_scores: Array, is_anomalous: NDArray[np.bool_]) -> float:
    """Return a threshold that three of four normal images stay below everywhere, near what anomalous images reach.

    Near is four fifths of what half of the anomalous images reach somewhere, or what three of four do, if that is less.

    Args:
        patch_scores: Shape ``(N, L)``.
        is_anomalous: Which images are, shape ``(N,)``; where none is, no patch exceeds the threshold.
    """
    peaks = patch_scores.max(axis=1)
    if not is_anomalous.any():
        return float(peaks.max())
    normal_peaks = peaks[~is_anomalous]
    reached = np.quantile(normal_peaks, _NORMAL_PEAKS) if len(normal_peaks) else 0.0
    three_of_four, half = np.quantile(peaks[is_anomalous], (_PEAKS, 0.5))
    return float(max(reached, min(three_of_four, _OF_PEAKS * half)))
