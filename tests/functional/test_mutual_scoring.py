# SPDX-License-Identifier: Apache-2.0
"""Step 2 against the official release's numbers, an independent oracle and its own promises."""

import re

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, rand, randn, to_numpy, unit
from torch.nn.functional import normalize

from anomalib_musc.functional import mutual_scores, reference_scores
from anomalib_musc.functional.mutual_scoring import interval_means

ATOL = {torch.float32: 1e-4, torch.float64: 1e-7}  # distances are roots of differences of products


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_mutual_scores_equal_golden(name: str) -> None:
    chain = golden.load(name)
    options = golden.settings(chain)
    for degree in options["degrees"]:
        for layer, features in enumerate(chain[f"lnamd_r{degree}"]):
            actual = mutual_scores(torch.from_numpy(features), options["interval"])
            assert_close(actual, chain[f"msm_r{degree}"][layer], 1e-4)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("scale", ["unit", "small", "large", "mixed"])
@pytest.mark.parametrize("num_images", [2, 3, 4, 5, 6])
def test_mutual_scores_equal_oracle(num_images: int, scale: str, dtype: torch.dtype) -> None:
    length, channels = 3 * num_images - 1, 2 * num_images + 5  # odd and even, both
    features = unit(num_images, length, channels, seed=num_images, dtype=torch.float64)
    norms = {"unit": 1.0, "small": 0.01, "large": 10.0, "mixed": 0.1 + 3 * rand(num_images, length, 1, seed=1)}
    features = (features * norms[scale]).to(dtype)
    expected = oracle.mutual_scores(to_numpy(features))
    actual = mutual_scores(features)
    assert actual.shape == (num_images, length)
    assert_close(actual, expected, ATOL[dtype] * (0.1 if scale == "small" else 1))


# Image 0 of N lies at distances 1, 2, ..., N-1 from the others: which of them are averaged?
DEFAULT = (0.0, 0.3)
INTERVALS = [
    *[(DEFAULT, n, [1]) for n in (2, 3, 4, 5, 6, 7)],
    *[(DEFAULT, n, [1, 2]) for n in (8, 9, 10)],
    *[(DEFAULT, n, [1, 2, 3]) for n in (11, 12)],
    ((0, 3), 2, [1]),  # counts stop at the N-1 there are
    ((0, 3), 3, [1, 2]),
    ((0, 3), 4, [1, 2, 3]),
    ((0, 3), 9, [1, 2, 3]),
    ((0, 50), 6, [1, 2, 3, 4, 5]),
    ((2, 5), 4, [3]),
    ((2, 5), 5, [3, 4]),
    ((2, 5), 6, [3, 4, 5]),
    ((2, 5), 12, [3, 4, 5]),
    ((1, 3), 9, [2, 3]),  # 1 is a count at either end
    ((0, 1), 9, [1]),
    ((0.0, 1.0), 9, [1]),
    ((0.0, 0.99), 9, [1, 2, 3, 4, 5, 6, 7]),
    ((0.1, 0.5), 2, [1]),
    ((0.1, 0.5), 3, [1]),
    ((0.1, 0.5), 5, [1, 2]),
    ((0.1, 0.5), 10, [1, 2, 3, 4]),
    ((0.1, 0.5), 11, [2, 3, 4, 5]),
    ((0.1, 0.5), 12, [2, 3, 4, 5]),
    ((0.5, 7), 9, [5, 6, 7]),  # a fraction and a count
    ((0.9, 0.95), 5, [4]),  # both ends fall on one index: one value is averaged still
    ((0.55, 0.6), 9, [5]),
]


@pytest.mark.parametrize(("interval", "num_images", "averaged"), INTERVALS)
def test_interval(interval: tuple[float, float], num_images: int, averaged: list[int]) -> None:
    features = torch.arange(num_images, dtype=torch.float32).view(num_images, 1, 1)
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(num_images))
    scores = mutual_scores(features[shuffled], interval)
    expected = sum(averaged) / len(averaged)
    assert scores[shuffled.argsort()][0].item() == pytest.approx(expected, abs=1e-4)
    assert_close(scores, oracle.mutual_scores(to_numpy(features[shuffled]), interval), 1e-4)


def test_mutual_scores_follow_the_images_and_the_patches() -> None:
    features = unit(7, 9, 8)
    scores = mutual_scores(features)
    images, patches = torch.tensor([4, 6, 0, 2, 5, 1, 3]), torch.tensor([8, 3, 5, 0, 1, 7, 2, 6, 4])
    assert_close(mutual_scores(features[images]), scores[images], 2e-6)
    assert_close(mutual_scores(features[:, patches]), scores[:, patches], 2e-6)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_what_torch_may_round_is_not_rounded(precision: str) -> None:
    """A setting for the training of networks, which is left as it was."""
    features = unit(5, 40, 64)
    torch.set_float32_matmul_precision(precision)
    try:
        scores = mutual_scores(features)
        of_references = reference_scores(features[:2], features[2:])
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_close(scores, oracle.mutual_scores(to_numpy(features)), 1e-5)
    assert_close(of_references, reference_scores(features[:2].double(), features[2:].double()), 1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 3, 5, 7), (6, 30)])
def test_means_of_intervals_leave_the_distances_as_they_are(shape: tuple[int, ...]) -> None:
    distances = rand(*shape)
    before = distances.clone()
    first, second = interval_means(distances, (0.0, 0.3), (1, 2))
    assert torch.equal(distances, before)
    ascending = distances.sort(dim=-2).values
    assert_close(first, ascending[..., : max(1, int((shape[-2] - 1) * 0.3)), :].mean(dim=-2), 1e-6)
    assert_close(second, ascending[..., 1, :], 1e-6)


def test_a_defect_stands_out() -> None:
    features = unit(1, 12, 16).repeat(6, 1, 1) + 0.01 * randn(6, 12, 16, seed=1)
    features[2, 7] = unit(16, seed=2)
    scores = mutual_scores(normalize(features, dim=-1))
    assert scores.argmax() == 2 * 12 + 7
    assert scores.flatten().topk(2).values.diff().abs() > 0.5


@pytest.mark.parametrize("num_images", [2, 3, 7])
@pytest.mark.parametrize("channels", [8, 768])
def test_identical_images_are_at_no_distance(num_images: int, channels: int) -> None:
    features = unit(1, 20, channels).repeat(num_images, 1, 1)
    scores = mutual_scores(features)
    assert scores.isfinite().all()
    assert_close(scores, np.zeros((num_images, 20)), 1e-4)


@pytest.mark.parametrize("distance", [1e-2, 3e-3, 1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("channels", [16, 768])
def test_near_duplicates(channels: int, distance: float) -> None:
    features = unit(5, 16, channels, dtype=torch.float64)
    features[1:4] = features[:1] + distance * unit(3, 16, channels, seed=1, dtype=torch.float64)
    features = normalize(features, dim=-1).float()
    expected = oracle.mutual_scores(to_numpy(features), (0, 2))
    assert (expected[:4] < 2 * distance).all()
    assert_close(mutual_scores(features, (0, 2)), expected, 1e-4)


@pytest.mark.parametrize("norm", [10.0, 40.0])
def test_near_duplicates_that_are_not_unit_vectors(norm: float) -> None:
    features = unit(4, 12, 32, dtype=torch.float64)
    features[1:3] = features[:1] + 1e-3 * unit(2, 12, 32, seed=1, dtype=torch.float64)
    features = (norm * features).float()
    expected = oracle.mutual_scores(to_numpy(features), (0, 1))
    assert_close(mutual_scores(features, (0, 1)), expected, 1e-4 * norm)  # as sharp, relative to the norm


def test_mutual_scores_of_single_patches_and_zero_vectors() -> None:
    features = unit(4, 3, 5)
    features[1, 2] = 0
    for case in (features, features[:, 2:], torch.zeros(3, 4, 5)):
        assert_close(mutual_scores(case), oracle.mutual_scores(to_numpy(case)), 1e-4)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4, 5)])
def test_mutual_scores_refuse_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^features must have shape \(N, L, C\).* got {re.escape(str(shape))}"):
        mutual_scores(randn(*shape))


@pytest.mark.parametrize("num_images", [0, 1])
def test_mutual_scores_refuse_fewer_than_two_images(num_images: int) -> None:
    with pytest.raises(ValueError, match=f"^features must hold at least 2 images .* got {num_images}"):
        mutual_scores(randn(num_images, 3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [(0, 0, 0), (3, 4, 5), (1, 2, 3)])
def test_mutual_scores_refuse_features_that_are_not_finite(value: float, index: tuple[int, ...]) -> None:
    features = unit(4, 5, 6)
    features[index] = value
    with pytest.raises(ValueError, match=rf"^features must be finite, got NaN or infinity in images \[{index[0]}\]"):
        mutual_scores(features)


@pytest.mark.parametrize(
    "interval",
    [(-0.1, 0.3), (-1, 3), (0.3, 0.3), (0.0, 0.0), (0.3, 0.1), (2, 2), (5, 2), (0.5, 2), (0.5, 1.0), (0.2, -0.1)],
)
def test_mutual_scores_refuse_an_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=rf"^interval must .* got {re.escape(str(interval))}"):
        mutual_scores(unit(14, 3, 4), interval)
