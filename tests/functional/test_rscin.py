# SPDX-License-Identifier: Apache-2.0
"""Step 3 against the official release's numbers, an independent oracle and its own promises."""

import re

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, rand, randn, to_numpy, unit

from anomalib_musc.functional import rscin

CLASS_TOKEN_FILES = {"clip_class_tokens_mvtec_ad": 15, "clip_class_tokens_visa": 12}  # with their categories
ATOL = {torch.float32: 1e-5, torch.float64: 1e-9}


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_rscin_equals_golden(name: str) -> None:
    chain = golden.load(name)
    windows = golden.settings(chain)["windows"]
    actual = rscin(torch.from_numpy(chain["raw_scores"]).float(), torch.from_numpy(chain["class_tokens"]), windows)
    assert_close(actual, chain["rscin_scores"], 1e-5)


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
        class_tokens = torch.from_numpy(array).float()
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
@pytest.mark.parametrize("name", golden.CHAINS + list(CLASS_TOKEN_FILES))
def test_golden_similarities_that_count_are_positive(name: str) -> None:
    """Leaving negative similarities out changes no published number: there the oracle's rule is the plain formula."""
    arrays = golden.load(name)
    pools = {"class_tokens": arrays["class_tokens"]} if name in golden.CHAINS else arrays
    windows = golden.settings(arrays)["windows"] if name in golden.CHAINS else (1, 9)
    for category, class_tokens in pools.items():
        scores = np.random.default_rng(0).random(len(class_tokens))
        plain = oracle.rscin(scores, class_tokens, windows, clip_negative=False)
        np.testing.assert_array_equal(oracle.rscin(scores, class_tokens, windows), plain, err_msg=category)


@pytest.mark.parametrize("windows", [(), [], (0,), (1, 0), (2, -3)])
def test_rscin_refuses_windows(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^windows must .* got {re.escape(str(windows))}"):
        rscin(rand(4), unit(4, 5), windows)


@pytest.mark.parametrize(("scores", "class_tokens"), [(5, 4), (4, 5), (1, 2)])
def test_rscin_refuses_pools_of_two_sizes(scores: int, class_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"^class_tokens must have shape \({scores}, D\).* got \({class_tokens}, 5\)"):
        rscin(rand(scores), unit(class_tokens, 5))


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 4)])
def test_rscin_refuses_dimensions_of_scores(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^scores must have shape \(N,\).* got {re.escape(str(shape))}"):
        rscin(torch.zeros(shape), unit(4, 5))


@pytest.mark.parametrize("shape", [(4,), (4, 5, 1)])
def test_rscin_refuses_dimensions_of_class_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^class_tokens must have shape \(4, D\).* got {re.escape(str(shape))}"):
        rscin(rand(4), randn(*shape))
