# SPDX-License-Identifier: Apache-2.0
"""Thresholds for a pool of which nobody has said what is normal.

The assumption is that of the method: every place is normal in most images, at least a quarter of the images is normal,
and a defect is confined to a part of its image. Where defects look like ordinary variation, they are missed rather than
all images flagged.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# All constants were chosen on pools with 0 to 60 % defects of two real, two procedural and some forty drawn products,
# see benchmarks/README.md. Rounding and copies:
_FLOOR = 0.02  # of the scores' 0.99 quantile; less is rounding between equal patches, such as a black background's
_COPY = 2.5  # times the floor, below which all scores of an image that has a copy in the pool lie
_ALIKE, _FEW_UNLIKE = 0.02, 0.25  # height below which an image has a copy in the pool, and share that may lack one
# Outliers:
_CONTRAST = 0.8  # beyond which an image has a clear defect and is an outlier
_FAR, _NEAR = 3.2, 1.6  # times the lower quartile of the heights, beyond which an image is an outlier, or may be one
_MOST_NEAR = 0.05  # share of the pool that may be flagged as "may be one"
# Two groups:
_FEWEST_OF_TWO, _MOST_HIGH = 8, 0.75  # images, of which fewer are not parted, and share of the higher group at most
_TOP = 0.99  # quantile of an image's patches
_USUAL = 0.4  # quantile of the images that gives what is usual
_TOPS, _TOPS_OF_FEW = 1.35, 2.2  # spread of the tops beyond which there are two groups, and with few images or patches
_FEW_IMAGES, _FEW_PATCHES = 20, 100  # fewer are few
_HEIGHTS, _HEIGHTS_OF_FEW = 0.4, 1.6  # deviation of the heights, likewise, and what is added over the number of images
_APART, _APART_OF_FEW = 0.8, 1.0  # share of the tops' variance that lies between the groups, likewise
_FEWEST_APART = 0.2  # share of the pool that the higher one of such groups has at least
_POWER = -0.25  # of the product of top and peak, which Otsu's criterion parts
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


def deviations(patch_scores: Array) -> Array:
    r"""Return how far each patch stands out, :math:`\log a_{ip} - m_p - m_i`.

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
    return logarithms


def count_anomalous(patch_scores: Array) -> int:
    """Estimate how many images of a pool are anomalous: the outliers, or the higher of two groups; never all of them.

    Args:
        patch_scores: Shape ``(N, L)``.

    Example:
        >>> patch_scores = np.random.default_rng(0).uniform(0.2, 0.3, (20, 50))
        >>> patch_scores[:3, :2] = 0.9
        >>> count_anomalous(patch_scores)
        3
    """
    heights, contrast = deviations(patch_scores).max(axis=1), contrasts(patch_scores)
    count = count_outliers(heights, contrast)
    unlike = ~_has_copy(patch_scores)
    logarithms = np.log(np.maximum(patch_scores[unlike], _floor(patch_scores)))
    if are_two_groups(logarithms, heights[unlike & (contrast <= _CONTRAST)]):
        tops, peaks = np.quantile(logarithms, (_TOP, 1.0), axis=1)
        upper = upper_group(-np.exp(_POWER * (tops + peaks)))
        count = max(count, min(upper, int(_MOST_HIGH * len(heights))))
    return min(count, len(heights) - 1)


def count_outliers(heights: Array, contrast: Array) -> int:
    """Return how many images stand out far or have a far contrast; where none does, how many nearly do, of few.

    Args:
        heights: Each image's largest deviation, shape ``(N,)``.
        contrast: Each image's contrast, shape ``(N,)``.
    """
    unlike = heights[heights > _ALIKE]
    unlike = unlike if len(unlike) > _FEW_UNLIKE * len(heights) else heights
    quarter = max(float(np.quantile(unlike, 0.25)), _ALIKE)
    far = (contrast > _CONTRAST) | (heights > _FAR * quarter)
    near = heights > _NEAR * quarter
    return int(far.sum()) or min(int(near.sum()), int(_MOST_NEAR * len(heights)))


def are_two_groups(logarithms: Array, heights: Array) -> bool:
    """Return whether images differ by more than good ones do: in their tops, or in how far they stand out.

    An image's top is its 0.99 quantile. Between good images, from the tenth to the ninetieth percent, tops differ about
    as much as within an image the highest patch is above nine tenths of the others, and they do not fall apart. Either
    counts with and without each image's median taken out first, or several shots of one thing would be a group. The
    standard deviation of the heights is less than half (with few images, 0.6) of what the highest patch is above the
    image's median.

    Args:
        logarithms: Those of the patch scores, shape ``(N, L)``, without images that have a copy in the pool.
        heights: The largest deviation of each of these images but those with a clear defect, which are outliers.
    """
    count, num_patches = logarithms.shape
    if count < _FEWEST_OF_TWO:
        return False
    middles, nine_tenths, tops, peaks = np.quantile(logarithms, (0.5, 0.9, _TOP, 1.0), axis=1)
    both = tops, tops - middles
    widest_tops = _TOPS if count >= _FEW_IMAGES and num_patches >= _FEW_PATCHES else _TOPS_OF_FEW
    widest_heights = _HEIGHTS + _HEIGHTS_OF_FEW / count
    return bool(
        min(map(_span, both)) > widest_tops * _usual(peaks - nine_tenths)
        or (len(heights) >= _FEWEST_OF_TWO and heights.std() > widest_heights * _usual(peaks - middles))
        or min(map(_separability, both)) > _APART + _APART_OF_FEW / count
    )


def _span(values: Array) -> float:
    """Return the distance from the tenth to the ninetieth percent."""
    low, high = np.quantile(values, (0.1, 0.9))
    return float(high - low)


def _usual(values: Array) -> float:
    """Return what is usual for good images, of which there may be less than half."""
    return max(float(np.quantile(values, _USUAL)), _ALIKE)


def _separability(values: Array) -> float:
    """Return the share of the variance that lies between Otsu's two groups; 0 where the upper one, or any, is small."""
    count = upper_group(values)
    if count < _FEWEST_APART * len(values) or np.ptp(values) < _ALIKE:
        return 0.0
    lower, upper = np.split(np.sort(values), [len(values) - count])
    within = (len(lower) * lower.var() + len(upper) * upper.var()) / len(values)
    return float(1 - within / values.var())


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
    """Return the threshold that so many of the scores ``(N,)`` exceed; of equal ones all or none do, for 0 none.

    Example:
        >>> image_threshold(np.array([0.1, 0.5, 0.9]), 1)
        0.7
    """
    descending = np.sort(scores)[::-1]
    if num_anomalous == 0:
        return float(descending[0])
    return float((descending[num_anomalous - 1] + descending[num_anomalous]) / 2)


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
