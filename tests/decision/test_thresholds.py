# SPDX-License-Identifier: Apache-2.0
"""The rule for pools without labels, on drawn scores."""

import numpy as np
import pytest
import torch

from anomalib_musc.decision.thresholds import contamination_threshold, factor_of, image_threshold


def distinct(count: int) -> torch.Tensor:
    """Image features of images that are no copies."""
    return torch.nn.functional.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(0)), dim=-1)


def flagged(scores: np.ndarray, class_tokens: torch.Tensor | None = None, **kwargs) -> np.ndarray:
    tokens = distinct(len(scores)) if class_tokens is None else class_tokens
    return scores > image_threshold(torch.from_numpy(scores), tokens, **kwargs)


def test_it_is_the_sentence():
    rng = np.random.default_rng(0)
    scores = rng.gamma(4, size=41) / 10
    low, high = np.quantile(scores, [0.2, 0.45])
    expected = scores > min(high + 3 * (high - low), 2)
    assert flagged(scores).tolist() == expected.tolist()


def test_of_normal_scores_one_in_fifty_is_flagged():
    pools = np.random.default_rng(0).normal(0.5, 0.01, (20, 1000))
    assert np.mean([flagged(pool) for pool in pools]) == pytest.approx(0.0216, abs=0.004)  # beyond 2.02 deviations


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("num_images", [20, 50, 400])
def test_clear_defects_are_found_up_to_one_half(share, num_images):
    found, false_alarms = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        is_bad = np.arange(num_images) < max(1, round(share * num_images))
        labels = flagged(np.where(is_bad, rng.uniform(0.8, 1.6, num_images), rng.normal(0.4, 0.02, num_images)))
        found.append(labels[is_bad].mean())
        false_alarms.append(labels[~is_bad].mean())
    assert np.mean(found) == 1
    assert np.mean(false_alarms) < 0.12


@pytest.mark.parametrize("num_images", range(2, 9))
def test_few_good_images_are_mostly_left_alone(num_images):
    shares = [flagged(np.random.default_rng(seed).normal(0.4, 0.02, num_images)).mean() for seed in range(200)]
    assert np.mean(shares) < 0.2


@pytest.mark.parametrize("num_images", [1, 2, 3, 10])
def test_equal_scores_are_normal(num_images):
    assert not flagged(np.full(num_images, 0.7)).any()
    rounding = np.random.default_rng(0).uniform(0, 5e-5, num_images)
    assert not flagged(0.7 + rounding).any()


def test_order_and_unit_change_nothing():
    scores = np.random.default_rng(1).gamma(3, size=60) / 40
    order = np.random.default_rng(2).permutation(60)
    expected = flagged(scores)
    assert flagged(scores[order], distinct(60)[order]).tolist() == expected[order].tolist()
    assert flagged(2 * scores + 0.3).tolist() == expected.tolist()


@pytest.mark.parametrize("copies", [1, 5, 40])
@pytest.mark.parametrize("which", [0, 29])
def test_copies_of_an_image_change_no_label(copies, which):
    scores = np.sort(np.random.default_rng(3).gamma(3, size=30)) / 40
    tokens = distinct(30)
    more = np.concatenate([scores, np.repeat(scores[which], copies)])
    more_tokens = torch.cat([tokens, tokens[which].expand(copies, -1)])
    assert flagged(more, more_tokens)[:30].tolist() == flagged(scores, tokens).tolist()


def test_less_of_a_factor_flags_more():
    scores = np.random.default_rng(4).gamma(3, size=100) / 40
    counts = [flagged(scores, factor=factor_of(sensitivity)).sum() for sensitivity in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 55


@pytest.mark.parametrize(("contamination", "count"), [(0.1, 2), (0.5, 10), (0.03, 1), (0.01, 0)])
def test_contamination_is_a_share(contamination, count):
    scores = torch.from_numpy(np.random.default_rng(5).permutation(20).astype(float))
    threshold = contamination_threshold(scores, contamination)
    assert int((scores > threshold).sum()) == count
    assert threshold == (19 if count == 0 else 19.5 - count)
