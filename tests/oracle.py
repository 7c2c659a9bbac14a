# SPDX-License-Identifier: Apache-2.0
"""MuSc by its equations: slow, obvious float64 numpy, with which the fast code is compared.

Loops run over images, patches, windows and pixels as the method's text does, and nothing is shared with the package.

    N images, L = H * W patches, C channels, D the size of the image feature
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EPS_LAYER_NORM = 1e-5  # added to the variance
EPS_UNIT = 1e-12  # least norm that is divided by: a zero vector stays zero


class AnomalyScores(NamedTuple):
    """Every stage from patch scores on."""

    patch_scores: np.ndarray  # (N, L)
    anomaly_maps: np.ndarray  # (N, h, w)
    raw_scores: np.ndarray  # (N,)
    rscin_scores: np.ndarray  # (N,)


def lnamd(feature_map: np.ndarray, degree: int) -> np.ndarray:
    """Local neighborhood aggregation, degree r: (N, C, H, W) -> (N, H*W, C).

    z_i = (x_i - mean x_i) / sqrt(var x_i + eps), mean and biased variance over (C, H, W) jointly;
    a_i(y, x) = 1/r² * sum of z_i over the r x r window around (y, x), zero outside the map;
    result = a_i(y, x) / ‖a_i(y, x)‖.
    """
    feature_map = np.asarray(feature_map, dtype=np.float64)
    num_images, channels, height, width = feature_map.shape
    reach = degree // 2
    result = np.zeros((num_images, height * width, channels))
    for i in range(num_images):
        mean, variance = feature_map[i].mean(), feature_map[i].var()
        normalised = (feature_map[i] - mean) / np.sqrt(variance + EPS_LAYER_NORM)
        for y in range(height):
            for x in range(width):
                total = np.zeros(channels)
                for yy in range(y - reach, y + reach + 1):
                    for xx in range(x - reach, x + reach + 1):
                        if 0 <= yy < height and 0 <= xx < width:
                            total += normalised[:, yy, xx]
                aggregated = total / degree**2
                result[i, y * width + x] = aggregated / max(np.linalg.norm(aggregated), EPS_UNIT)
    return result


def interval_slice(count: int, interval: Sequence[float]) -> slice:
    """Which of `count` ascending values are averaged.

    A bound below 1 is a fraction, int(count * bound); a bound of 1 or more is itself an index. The upper one is
    not included. Indices stay within the values, and at least one value is always taken.
    """
    first, last = (int(bound) if bound >= 1 else int(count * bound) for bound in interval)
    first = min(first, count - 1)
    last = min(last, count)
    return slice(first, max(last, first + 1))


def mutual_scores(features: np.ndarray, interval: Sequence[float] = (0.0, 0.3)) -> np.ndarray:
    """Mutual scoring: (N, L, C) -> (N, L).

    a_ip(j) = min over q of ‖x_ip - x_jq‖, for every other image j;
    score of patch p of image i = mean of the interval of the N-1 values a_ip(j), sorted ascending.
    """
    features = np.asarray(features, dtype=np.float64)
    num_images, num_patches, _ = features.shape
    scores = np.zeros((num_images, num_patches))
    for i in range(num_images):
        nearest = []  # one (L,) array per other image
        for j in range(num_images):
            if j == i:
                continue
            distances = [np.linalg.norm(features[j] - features[i, p], axis=1).min() for p in range(num_patches)]
            nearest.append(np.array(distances))
        ascending = np.sort(np.stack(nearest), axis=0)  # (N-1, L)
        scores[i] = ascending[interval_slice(num_images - 1, interval)].mean(axis=0)
    return scores


def interpolate(patch_map: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Bilinear, align_corners=True: (H, W) -> (h, w).

    Output row v lies at y = v * (H - 1) / (h - 1), columns alike; the four neighbours are mixed by their distances.
    """
    patch_map = np.asarray(patch_map, dtype=np.float64)
    (height, width), (out_height, out_width) = patch_map.shape, image_size
    result = np.zeros((out_height, out_width))
    for v in range(out_height):
        for u in range(out_width):
            y = v * (height - 1) / (out_height - 1) if out_height > 1 else 0.0
            x = u * (width - 1) / (out_width - 1) if out_width > 1 else 0.0
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            below, beside = y - top, x - left
            upper = (1 - beside) * patch_map[top, left] + beside * patch_map[top, right]
            lower = (1 - beside) * patch_map[bottom, left] + beside * patch_map[bottom, right]
            result[v, u] = (1 - below) * upper + below * lower
    return result


def min_max(scores: np.ndarray) -> np.ndarray:
    """(s - min s) / (max s - min s): (N,) -> (N,). Where all are equal, all are 0."""
    scores = np.asarray(scores, dtype=np.float64)
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread > 0 else np.zeros_like(scores)


def rscin(
    scores: np.ndarray,
    class_tokens: np.ndarray,
    windows: Sequence[int] = (1, 2, 3),
    *,
    clip_negative: bool = True,
) -> np.ndarray:
    """Re-scoring by the image neighborhood: scores (N,), class tokens (N, D) -> (N,).

    W_ij = c_i · c_j; for a window k let K_i be the k largest entries of row i (all N where k > N);
    r_i(k) = sum over j in K_i of W_ij * s_j / sum over j in K_i of W_ij, with s the min-max-scaled scores;
    result = mean of r_i(k) over the windows.

    An image unlike another has nothing to say about it: a negative W_ij counts as 0 (`clip_negative=False`: the plain
    formula), and where no weight is left the image keeps its own score.
    """
    scaled = min_max(scores)
    class_tokens = np.asarray(class_tokens, dtype=np.float64)
    num_images = len(scaled)
    rescored = np.zeros((len(windows), num_images))
    for i in range(num_images):
        row = np.array([class_tokens[i] @ class_tokens[j] for j in range(num_images)])
        descending = sorted(range(num_images), key=lambda j: -row[j])
        for n, k in enumerate(windows):
            kept = descending[:k]
            weights = [max(row[j], 0.0) if clip_negative else row[j] for j in kept]
            total = sum(weights)
            if total == 0:
                rescored[n, i] = scaled[i]
            else:
                rescored[n, i] = sum(weight * scaled[j] for weight, j in zip(weights, kept, strict=True)) / total
    return rescored.mean(axis=0)


def anomaly_scores(
    maps: Sequence[np.ndarray],
    class_tokens: np.ndarray,
    degrees: Sequence[int] = (1, 3, 5),
    interval: Sequence[float] = (0.0, 0.3),
    windows: Sequence[int] = (1, 2, 3),
    image_size: int | tuple[int, int] = 518,
) -> AnomalyScores:
    """The whole chain, from one (N, C, H, W) map per layer and class tokens (N, D) to scores.

    Patch scores are the mean over layers, then over degrees; the raw score is the maximum of the anomaly map.
    """
    num_images, _, height, width = np.shape(maps[0])
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    per_degree = [np.mean([mutual_scores(lnamd(x, r), interval) for x in maps], axis=0) for r in degrees]
    patch_scores = np.mean(per_degree, axis=0)
    patch_maps = patch_scores.reshape(num_images, height, width)
    anomaly_maps = np.stack([interpolate(patch_map, size) for patch_map in patch_maps])
    raw_scores = anomaly_maps.reshape(num_images, -1).max(axis=1)
    return AnomalyScores(patch_scores, anomaly_maps, raw_scores, rscin(raw_scores, class_tokens, windows))
