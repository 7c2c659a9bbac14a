# SPDX-License-Identifier: Apache-2.0
"""Defects that many images share, by a second interval, against the equations in float64."""

import numpy as np
import oracle
import pytest
import torch
from conftest import OwnBackbone
from seeded import assert_close, randn, to_numpy

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import larger_score, layer_scores

SECOND = (0.4, 0.7)


def by_equations(maps: torch.Tensor, degrees: tuple[int, ...]) -> np.ndarray:
    """max(s, t / exp(median over all patches of log(t / s))), s and t averaged over the degrees."""
    s, t = (
        np.mean([oracle.mutual_scores(oracle.lnamd(to_numpy(maps), degree), bounds) for degree in degrees], axis=0)
        for bounds in ((0, 0.3), SECOND)
    )
    return np.maximum(s, t / np.exp(np.median(np.log(t / s))))


@pytest.mark.parametrize("degrees", [(1,), (1, 3)])
def test_it_is_that_of_the_equations(degrees):
    maps = randn(11, 24, 5, 5)  # an odd number of patches, whose median is one of them
    assert_close(layer_scores(maps, degrees, second_interval=SECOND), by_equations(maps, degrees), 1e-4)


def with_repeated_defect(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of 20 images with variants of one pattern, and where in the first ones is the same defect."""
    maps = randn(1, 32, 6, 6) + 0.5 * randn(20, 32, 6, 6, seed=1)
    is_defect = torch.zeros(20, 6, 6, dtype=torch.bool)
    is_defect[:number, 2:4, 2:4] = True
    maps[:number, :, 2:4, 2:4] = 3 * randn(1, 32, 2, 2, seed=2) + 0.3 * randn(number, 32, 2, 2, seed=3)
    return maps, is_defect.flatten(1)


@pytest.mark.parametrize("number", [4, 6, 8])
def test_a_defect_of_many_images_stands_out(number):
    maps, is_defect = with_repeated_defect(number)
    first = layer_scores(maps, (1,))
    both = layer_scores(maps, (1,), second_interval=SECOND)
    assert (both >= first).all()
    assert both[is_defect].min() > both[~is_defect].quantile(0.95)
    if number > 6:
        assert first[is_defect].max() < first[~is_defect].quantile(0.5)  # which the paper's interval takes for normal


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_order_and_budget_change_nothing(precision):
    maps, order = randn(9, 24, 4, 4), [3, 1, 8, 0, 2, 5, 4, 7, 6]
    expected = layer_scores(maps, (1, 3), second_interval=SECOND, precision=precision)
    found = layer_scores(maps[order], (1, 3), second_interval=SECOND, precision=precision, memory_budget=0.001)
    assert_close(found, expected[order], 1e-5)


@pytest.mark.parametrize("num_images", range(2, 11))
def test_few_or_equal_images_have_sensible_scores(num_images):
    scores = layer_scores(randn(num_images, 8, 3, 3), (1,), second_interval=SECOND)
    assert scores.isfinite().all()
    assert (scores > 0).all()
    equal = randn(1, 8, 3, 3).expand(num_images, -1, -1, -1)
    assert_close(layer_scores(equal, (1, 3), second_interval=SECOND), np.zeros((num_images, 9)), 1e-4)
    assert_close(larger_score(torch.ones(3, 2), torch.ones(3, 2)), np.ones((3, 2)), 0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((0.2, 0.7), r"second_interval must begin where interval ends or later, got \(0.2, 0.7\) after \(0.0, 0.3\)"),
        ((0.7, 0.4), "second_interval must begin below its end"),
        (0.4, "second_interval must be two finite bounds"),
        ((0.4, float("nan")), "second_interval must be two finite bounds"),
    ],
)
def test_a_wrong_one_is_named(second, message):
    with pytest.raises(ValueError, match=message):
        MuScModel("musc-tiny", second_interval=second)
    with pytest.raises(ValueError, match=message):
        layer_scores(randn(9, 8, 3, 3), second_interval=second)


def test_through_engine(folder, make_engine):
    model = MuSc(OwnBackbone(), second_interval=SECOND, visualizer=False)
    make_engine().predict(model, data_path=folder)
    plain = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(plain, data_path=folder)
    assert (model.pools[0].patch_scores >= plain.pools[0].patch_scores - 1e-6).all()
    assert (model.pools[0].patch_scores - plain.pools[0].patch_scores).max() > 1e-4
