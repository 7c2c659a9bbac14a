# SPDX-License-Identifier: Apache-2.0
"""`anomalib_musc.functional` against the official release's numbers, an independent oracle and its own promises."""

import re
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, randn, to_numpy, unit
from torch.nn.functional import interpolate, normalize

from anomalib_musc.functional import lnamd, mutual_scores, rscin

CHAINS = ["small", "pair_even", "interval"]
CLASS_TOKEN_FILES = {"clip_class_tokens_mvtec_ad": 15, "clip_class_tokens_visa": 12}  # with their categories
ATOL = {torch.float32: 1e-5, torch.float64: 1e-9}  # LNAMD and RsCIN
ATOL_DISTANCE = {torch.float32: 1e-4, torch.float64: 1e-7}  # mutual scores: roots of differences of products
LOW_PRECISION = [torch.float16, torch.bfloat16]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def to_float32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


# The official release's numbers


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS)
def test_oracle_equals_golden(name: str) -> None:
    chain = golden.load(name)
    options, maps = golden.settings(chain), golden.feature_maps(chain)
    for degree in options["degrees"]:
        for layer, feature_map in enumerate(maps):
            features = chain[f"lnamd_r{degree}"][layer]
            np.testing.assert_allclose(oracle.lnamd(feature_map, degree), features, rtol=0, atol=1e-6)
            scores = oracle.mutual_scores(features, options["interval"])
            np.testing.assert_allclose(scores, chain[f"msm_r{degree}"][layer], rtol=0, atol=1e-5)
    result = oracle.anomaly_scores(maps, chain["class_tokens"], **options)
    np.testing.assert_allclose(result.patch_scores, chain["patch_scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.anomaly_maps, chain["anomaly_maps"][:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.raw_scores, chain["raw_scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.rscin_scores, chain["rscin_scores"], rtol=0, atol=1e-5)


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS)
def test_lnamd_equals_golden(name: str) -> None:
    chain = golden.load(name)
    for degree in golden.settings(chain)["degrees"]:
        for layer, feature_map in enumerate(golden.feature_maps(chain)):
            actual = lnamd(torch.from_numpy(feature_map), degree)
            assert_close(actual, chain[f"lnamd_r{degree}"][layer], 1e-5)


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS)
def test_mutual_scores_equal_golden(name: str) -> None:
    chain = golden.load(name)
    options = golden.settings(chain)
    for degree in options["degrees"]:
        for layer, features in enumerate(chain[f"lnamd_r{degree}"]):
            actual = mutual_scores(torch.from_numpy(features), options["interval"])
            assert_close(actual, chain[f"msm_r{degree}"][layer], 1e-4)


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS)
def test_rscin_equals_golden(name: str) -> None:
    chain = golden.load(name)
    windows = golden.settings(chain)["windows"]
    actual = rscin(to_float32(chain["raw_scores"]), torch.from_numpy(chain["class_tokens"]), windows)
    assert_close(actual, chain["rscin_scores"], 1e-5)


def chain_scores(
    maps: list[torch.Tensor],
    class_tokens: torch.Tensor,
    degrees: tuple[int, ...],
    interval: tuple[float, float],
    windows: tuple[int, ...],
    image_size: int | tuple[int, int],
) -> oracle.AnomalyScores:
    """The oracle's chain over the functions under test."""
    num_images, _, height, width = maps[0].shape
    patch_scores = torch.stack([mutual_scores(lnamd(x, r), interval) for r in degrees for x in maps]).mean(0)
    grid = patch_scores.view(num_images, 1, height, width)
    anomaly_maps = interpolate(grid, image_size, mode="bilinear", align_corners=True)[:, 0]
    raw_scores = anomaly_maps.flatten(1).amax(1)
    return oracle.AnomalyScores(patch_scores, anomaly_maps, raw_scores, rscin(raw_scores, class_tokens, windows))


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS)
def test_chain_equals_golden(name: str) -> None:
    chain = golden.load(name)
    maps = [torch.from_numpy(x) for x in golden.feature_maps(chain)]
    actual = chain_scores(maps, torch.from_numpy(chain["class_tokens"]), **golden.settings(chain))
    assert_close(actual.patch_scores, chain["patch_scores"], 1e-4)
    assert_close(actual.anomaly_maps, chain["anomaly_maps"][:, 0], 1e-4)
    assert_close(actual.raw_scores, chain["raw_scores"], 1e-4)
    assert_close(actual.rscin_scores, chain["rscin_scores"], 1e-4)


# The oracle


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("degree", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 7, 4, 6), (3, 5, 6, 3), (6, 1, 4, 9), (1, 9, 1, 5), (4, 16, 3, 3)])
def test_lnamd_equals_oracle(shape: tuple[int, ...], degree: int, dtype: torch.dtype) -> None:
    feature_map = 3 * randn(*shape, seed=degree, dtype=dtype) + 0.5
    actual = lnamd(feature_map, degree)
    assert actual.shape == (shape[0], shape[2] * shape[3], shape[1])
    assert_close(actual, oracle.lnamd(to_numpy(feature_map), degree), ATOL[dtype])


@pytest.mark.parametrize("dtype", ATOL_DISTANCE)
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
    assert_close(actual, expected, ATOL_DISTANCE[dtype] * (0.1 if scale == "small" else 1))


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("windows", [(1,), (2,), (1, 2, 3), (1, 8, 9), [3, 1], (4, 100)])
@pytest.mark.parametrize("num_images", [2, 3, 6, 12])
def test_rscin_equals_oracle(num_images: int, windows: tuple[int, ...], dtype: torch.dtype) -> None:
    scores = 5 * rand(num_images, seed=num_images, dtype=dtype) - 1
    class_tokens = unit(num_images, 5, seed=num_images + 1, dtype=dtype)  # some similarities are negative
    actual = rscin(scores, class_tokens, windows)
    assert actual.shape == (num_images,)
    assert_close(actual, oracle.rscin(to_numpy(scores), to_numpy(class_tokens), windows), ATOL[dtype])


def test_rscin_of_tokens_that_are_not_normalised() -> None:
    """DINO's image features: an image need not be its own best match."""
    scores = rand(7, dtype=torch.float64)
    class_tokens = randn(7, 6, seed=3, dtype=torch.float64) * torch.tensor([[0.2, 30, 1, 2, 8, 0.5, 15]]).T
    similarity = class_tokens @ class_tokens.T
    assert (similarity.argmax(1) != torch.arange(7)).any()
    for windows in [(1,), (1, 2, 3)]:
        expected = oracle.rscin(to_numpy(scores), to_numpy(class_tokens), windows)
        assert_close(rscin(scores, class_tokens, windows), expected, 1e-9)


def test_chain_on_oblong_maps_equals_oracle() -> None:
    maps = [randn(5, 6, 4, 7, seed=seed) for seed in (1, 2)]
    class_tokens = unit(5, 8, seed=3)
    settings = {"degrees": (1, 3), "interval": (0.0, 0.6), "windows": (1, 2), "image_size": (9, 15)}
    expected = oracle.anomaly_scores([to_numpy(x) for x in maps], to_numpy(class_tokens), **settings)
    for actual, reference in zip(chain_scores(maps, class_tokens, **settings), expected, strict=True):
        assert_close(actual, reference, 1e-4)


# LNAMD


def test_lnamd_by_hand() -> None:
    """Mean 0 and variance 1 leave the map alone; zeros pad it, the window's sum has one direction per patch."""
    feature_map = torch.tensor([[[[1.0, -1.0]], [[1.0, -1.0]]]])  # (1, 2, 1, 2)
    root = 0.5**0.5
    assert_close(lnamd(feature_map, 1), np.array([[[root, root], [-root, -root]]]), 1e-6)
    assert_close(lnamd(feature_map, 3), np.zeros((1, 2, 2)), 1e-6)  # both windows hold both patches: they cancel


@pytest.mark.parametrize(("shape", "degree"), [((2, 3, 2, 3), 7), ((3, 4, 1, 1), 5), ((2, 5, 3, 2), 9)])
def test_lnamd_degree_above_the_map(shape: tuple[int, ...], degree: int) -> None:
    feature_map = randn(*shape, seed=4)
    assert_close(lnamd(feature_map, degree), oracle.lnamd(to_numpy(feature_map), degree), 1e-5)


@pytest.mark.parametrize("degree", [1, 3])
def test_lnamd_rows_are_unit_vectors(degree: int) -> None:
    norms = lnamd(randn(3, 8, 5, 4), degree).norm(dim=-1)
    assert_close(norms, np.ones((3, 20)), 1e-5)


@pytest.mark.parametrize("degree", [1, 3, 5])
def test_lnamd_ignores_scale_and_offset_of_an_image(degree: int) -> None:
    feature_map = randn(4, 6, 5, 4)
    scale = torch.tensor([0.5, 2.0, 10.0, 100.0]).view(4, 1, 1, 1)
    offset = torch.tensor([0.0, -1.0, 3.0, 20.0]).view(4, 1, 1, 1)
    assert_close(lnamd(feature_map * scale + offset, degree), lnamd(feature_map, degree), 2e-5)


@pytest.mark.parametrize("degree", [1, 3])
def test_lnamd_treats_images_alone(degree: int) -> None:
    feature_map = randn(5, 6, 4, 3)
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = lnamd(feature_map, degree)
    assert_close(lnamd(feature_map[order], degree), whole[order], 1e-6)
    assert_close(lnamd(feature_map[2:3], degree), whole[2:3], 1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.7, -1e4])
@pytest.mark.parametrize("degree", [1, 3, 5])
def test_lnamd_of_a_constant_map_is_finite(value: float, degree: int) -> None:
    features = lnamd(torch.full((2, 3, 4, 5), value), degree)
    assert features.isfinite().all()
    assert (features.norm(dim=-1) <= 1 + 1e-5).all()
    assert mutual_scores(features).isfinite().all()


def test_lnamd_of_zeros_is_zero() -> None:
    assert_close(lnamd(torch.zeros(2, 3, 4, 5), 3), np.zeros((2, 20, 3)), 0)


# Mutual scoring


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


# RsCIN


def test_rscin_by_hand() -> None:
    scores = torch.tensor([2.0, 4.0])
    class_tokens = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]])  # similarity 1/2
    assert_close(rscin(scores, class_tokens, (1,)), np.array([0, 1]), 1e-6)
    assert_close(rscin(scores, class_tokens, (2,)), np.array([1 / 3, 2 / 3]), 1e-6)
    assert_close(rscin(scores, class_tokens, (1, 2)), np.array([1 / 6, 5 / 6]), 1e-6)


@pytest.mark.parametrize("value", [0.0, 0.37, -5.0])
def test_rscin_of_equal_scores_is_zero(value: float) -> None:
    assert_close(rscin(torch.full((6,), value), unit(6, 5)), np.zeros(6), 0)


def test_rscin_of_one_image_is_zero() -> None:
    assert_close(rscin(torch.tensor([0.8]), unit(1, 5)), np.zeros(1), 0)


def test_rscin_ignores_scale_and_offset_of_the_scores() -> None:
    scores, class_tokens = rand(8), unit(8, 5, seed=1)
    assert_close(rscin(3 * scores - 7, class_tokens), rscin(scores, class_tokens), 1e-5)


def test_rscin_windows_above_the_pool_act_as_the_pool() -> None:
    scores, class_tokens = rand(4), unit(4, 5, seed=1)
    assert_close(rscin(scores, class_tokens, (9, 50)), rscin(scores, class_tokens, (4,)), 1e-6)


def test_rscin_window_one_keeps_the_scores_of_unit_tokens() -> None:
    assert_close(rscin(torch.tensor([1.0, 3.0, 2.0, 5.0]), unit(4, 5), (1,)), np.array([0, 0.5, 0.25, 1]), 1e-6)


@pytest.mark.parametrize("windows", [(1,), (2,), (1, 2, 3), (4,)])
@pytest.mark.parametrize(
    "class_tokens",
    [
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.6, 0.8], [-0.8, -0.6]]),  # row 0 sums to -1.4 at k = 4
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]),  # at k = 4 every row sums to 0
        torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.8, 0.6], [-0.8, -0.6]]),  # nothing resembles image 0, nor itself
        torch.zeros(4, 2),
    ],
    ids=["negative", "sum to zero", "one zero", "zeros"],
)
def test_rscin_without_positive_similarity(class_tokens: torch.Tensor, windows: tuple[int, ...]) -> None:
    scores = torch.tensor([0.2, 0.9, 0.4, 0.6])
    actual = rscin(scores, class_tokens, windows)
    assert actual.isfinite().all()
    assert actual.min() >= 0
    assert actual.max() <= 1
    assert_close(actual, oracle.rscin(to_numpy(scores), to_numpy(class_tokens), windows), 1e-5)


def test_rscin_keeps_the_score_of_an_image_like_no_other() -> None:
    scores = torch.tensor([0.0, 1.0, 0.5])
    assert_close(rscin(scores, torch.zeros(3, 2)), scores, 1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.6, -0.8]])
    assert rscin(scores, opposite, (3,))[0] == 0


@golden.needs_golden
@pytest.mark.parametrize("windows", [(1, 2, 3), (1, 8, 9)])
@pytest.mark.parametrize("name", CLASS_TOKEN_FILES)
def test_rscin_on_real_class_tokens(name: str, windows: tuple[int, ...]) -> None:
    categories = golden.load(name)
    assert len(categories) == CLASS_TOKEN_FILES[name]
    for seed, (category, array) in enumerate(categories.items()):
        class_tokens = to_float32(array)
        scores = rand(len(array), seed=seed)
        actual = rscin(scores, class_tokens, windows)
        assert actual.shape == (len(array),), category
        assert actual.isfinite().all(), category
        assert actual.min() >= 0, category
        assert actual.max() <= 1, category
        expected = oracle.rscin(to_numpy(scores), array, windows)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5, err_msg=category)
        order = torch.randperm(len(array), generator=torch.Generator().manual_seed(seed))
        shuffled = rscin(scores[order], class_tokens[order], windows)
        np.testing.assert_allclose(shuffled, actual[order], rtol=0, atol=1e-5, err_msg=category)


@golden.needs_golden
@pytest.mark.parametrize("name", CHAINS + list(CLASS_TOKEN_FILES))
def test_golden_similarities_that_count_are_positive(name: str) -> None:
    """Leaving negative similarities out changes no published number: there the oracle's rule is the plain formula."""
    arrays = golden.load(name)
    pools = {"class_tokens": arrays["class_tokens"]} if name in CHAINS else arrays
    windows = golden.settings(arrays)["windows"] if name in CHAINS else (1, 9)
    for category, class_tokens in pools.items():
        scores = np.random.default_rng(0).random(len(class_tokens))
        plain = oracle.rscin(scores, class_tokens, windows, clip_negative=False)
        np.testing.assert_array_equal(oracle.rscin(scores, class_tokens, windows), plain, err_msg=category)


# Precision, modes and manners


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_output_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert lnamd(randn(2, 3, 4, 5, dtype=dtype), 3).dtype == expected
    assert mutual_scores(unit(3, 4, 5, dtype=dtype)).dtype == expected
    assert rscin(rand(4, dtype=dtype), unit(4, 5, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_inputs_lose_nothing_more(dtype: torch.dtype) -> None:
    feature_map = 20 * randn(3, 64, 6, 5, dtype=dtype)
    assert_close(lnamd(feature_map, 3), oracle.lnamd(to_numpy(feature_map), 3), 1e-5)
    features = unit(4, 10, 64, dtype=dtype)
    assert_close(mutual_scores(features), oracle.mutual_scores(to_numpy(features)), 1e-4)
    scores, class_tokens = rand(6, dtype=dtype), unit(6, 5, dtype=dtype)
    assert_close(rscin(scores, class_tokens), oracle.rscin(to_numpy(scores), to_numpy(class_tokens)), 1e-5)


def all_three(feature_map: torch.Tensor, features: torch.Tensor, scores: torch.Tensor, class_tokens: torch.Tensor):
    return lnamd(feature_map, 3), mutual_scores(features), rscin(scores, class_tokens)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    """A feature map, features, scores and class tokens."""
    return randn(4, 32, 6, 5), unit(5, 12, 64), rand(6), unit(6, 16, seed=1)


@pytest.fixture
def expected(inputs: tuple[torch.Tensor, ...]) -> tuple[np.ndarray, ...]:
    feature_map, features, scores, class_tokens = map(to_numpy, inputs)
    return oracle.lnamd(feature_map, 3), oracle.mutual_scores(features), oracle.rscin(scores, class_tokens)


def assert_all_close(actual: tuple[torch.Tensor, ...], expected: tuple[np.ndarray, ...]) -> None:
    for result, reference, atol in zip(actual, expected, (1e-5, 1e-4, 1e-5), strict=True):
        assert result.dtype == torch.float32
        assert_close(result, reference, atol)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_autocast_loses_no_precision(inputs, expected, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        assert (torch.eye(2) @ torch.eye(2)).dtype == dtype  # autocast is at work
        assert_all_close(all_three(*inputs), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(inputs, expected, mode: type) -> None:
    with mode():
        assert_all_close(all_three(*inputs), expected)


def test_inputs_that_require_grad(inputs, expected) -> None:
    assert_all_close(all_three(*(x.requires_grad_() for x in inputs)), expected)


def test_inputs_that_are_not_contiguous(inputs, expected) -> None:
    views = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs[:2]]
    views += [inputs[2].repeat_interleave(2)[::2], inputs[3].T.contiguous().T]
    assert not any(x.is_contiguous() for x in views)
    assert_all_close(all_three(*views), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_inputs_are_left_alone(inputs, dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs]
    copies = [x.clone() for x in given]
    all_three(*given)
    assert all(torch.equal(x, copy) for x, copy in zip(given, copies, strict=True))


# What is refused


def refuses(*fragments: str):
    """A ValueError whose message holds every fragment."""
    return pytest.raises(ValueError, match="".join(f"(?=.*{re.escape(x)})" for x in fragments))


@pytest.mark.parametrize("degree", [0, -1, -3, 2, 4])
def test_lnamd_refuses_a_degree(degree: int) -> None:
    with refuses("degree", str(degree)):
        lnamd(randn(2, 3, 4, 5), degree)


@pytest.mark.parametrize("shape", [(4,), (3, 4, 5), (1, 2, 3, 4, 5)])
def test_lnamd_refuses_dimensions(shape: tuple[int, ...]) -> None:
    with refuses("feature_map", ", ".join(map(str, shape))):
        lnamd(randn(*shape), 3)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4, 5)])
def test_mutual_scores_refuse_dimensions(shape: tuple[int, ...]) -> None:
    with refuses("features", ", ".join(map(str, shape))):
        mutual_scores(randn(*shape))


@pytest.mark.parametrize("num_images", [0, 1])
def test_mutual_scores_refuse_fewer_than_two_images(num_images: int) -> None:
    with refuses("features", str(num_images)):
        mutual_scores(randn(num_images, 3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("index", [(0, 0, 0), (3, 4, 5), (1, 2, 3)])
def test_mutual_scores_refuse_features_that_are_not_finite(value: float, index: tuple[int, ...]) -> None:
    features = unit(4, 5, 6)
    features[index] = value
    with refuses("features"):
        mutual_scores(features)


@pytest.mark.parametrize(
    "interval",
    [(-0.1, 0.3), (-1, 3), (0.3, 0.3), (0.0, 0.0), (0.3, 0.1), (2, 2), (5, 2), (0.5, 2), (0.5, 1.0), (0.2, -0.1)],
)
def test_mutual_scores_refuse_an_interval(interval: tuple[float, float]) -> None:
    with refuses("interval", str(interval[0]), str(interval[1])):
        mutual_scores(unit(14, 3, 4), interval)


@pytest.mark.parametrize("windows", [(), [], (0,), (1, 0), (2, -3)])
def test_rscin_refuses_windows(windows: tuple[int, ...]) -> None:
    with refuses("windows", *(str(k) for k in windows if k < 1)):
        rscin(rand(4), unit(4, 5), windows)


@pytest.mark.parametrize(("scores", "class_tokens"), [(5, 4), (4, 5), (1, 2)])
def test_rscin_refuses_pools_of_two_sizes(scores: int, class_tokens: int) -> None:
    with refuses("class_tokens", str(scores), str(class_tokens)):
        rscin(rand(scores), unit(class_tokens, 5))


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 4)])
def test_rscin_refuses_dimensions_of_scores(shape: tuple[int, ...]) -> None:
    with refuses("scores", ", ".join(map(str, shape))):
        rscin(torch.zeros(shape), unit(4, 5))


@pytest.mark.parametrize("shape", [(4,), (4, 5, 1)])
def test_rscin_refuses_dimensions_of_class_tokens(shape: tuple[int, ...]) -> None:
    with refuses("class_tokens", ", ".join(map(str, shape))):
        rscin(rand(4), randn(*shape))


# What an import brings with it


def loaded_by(code: str) -> set[str]:
    """Top-level modules of a fresh interpreter after `code`."""
    report = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", report], cwd=root, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_functional_needs_torch_alone() -> None:
    code = """
import torch
from anomalib_musc.functional import lnamd, mutual_scores, rscin
rscin(mutual_scores(lnamd(torch.rand(3, 4, 5, 6), 3)).amax(1), torch.rand(3, 7))
"""
    loaded = loaded_by(code)
    assert {"anomalib_musc", "torch"} <= loaded
    heavy = {"anomalib", "lightning", "pytorch_lightning", "timm", "open_clip", "torchvision", "cv2", "pandas"}
    assert not loaded & (heavy | {"sklearn"})


def test_package_alone_does_not_import_torch() -> None:
    loaded = loaded_by("import anomalib_musc")
    assert "anomalib_musc" in loaded
    assert not loaded & {"torch", "anomalib", "lightning"}
