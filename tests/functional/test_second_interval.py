# SPDX-License-Identifier: Apache-2.0
"""Defects that many images share, by a second interval, against the equations in float64."""

import numpy as np
import oracle
import pytest
import torch
from conftest import OwnBackbone
from seeded import assert_close, randn, to_numpy

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.distances import least_memory
from anomalib_musc.distances.storage import GIB
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


@pytest.mark.parametrize("radius", [0, 1])
def test_same_place_search_is_that_of_the_equations(radius):
    maps, places = randn(7, 12, 4, 3), np.array([divmod(place, 3) for place in range(12)])
    is_near = np.abs(places[:, None] - places).max(axis=2) <= radius
    vectors = oracle.lnamd(to_numpy(maps), 3)
    distances = np.linalg.norm(vectors[:, None, :, None] - vectors[None, :, None], axis=-1)  # (N, N, L, L)
    nearest = np.where(is_near, distances, np.inf).min(axis=3)
    ascending = np.sort(nearest, axis=1)[:, 1:]  # without the image itself, at distance 0
    s, t = (ascending[:, oracle.interval_slice(6, bounds)].mean(axis=1) for bounds in ((0, 0.3), SECOND))
    ordered = np.sort(np.log(t / s), axis=None)
    expected = np.maximum(s, t / np.exp(ordered[(len(ordered) - 1) // 2]))  # the lower one in the middle, as torch's
    assert_close(layer_scores(maps, (3,), second_interval=SECOND, search_radius=radius), expected, 1e-4)


@pytest.mark.parametrize("radius", [None, 1])
def test_a_subset_is_a_pool_of_its_own(radius):
    maps, subset = randn(12, 16, 4, 4), [7, 2, 11, 0, 5]
    alone = layer_scores(maps[subset], (1, 3), second_interval=SECOND, search_radius=radius)
    among = layer_scores(maps, (1, 3), second_interval=SECOND, search_radius=radius, images=subset)
    assert_close(among, alone, 1e-6)
    model = MuScModel(OwnBackbone(), second_interval=SECOND, search_radius=radius, aggregation_degrees=(1, 3))
    others = [index for index in range(12) if index not in subset]
    found = model.score([maps], [subset, others]).flatten(1)
    assert_close(found[subset], alone, 1e-6)


@pytest.mark.parametrize("radius", [None, 1])
def test_fast_and_the_least_budget(radius):
    maps, degrees = randn(11, 24, 6, 5), (1, 3)
    how = {"second_interval": SECOND, "search_radius": radius}
    expected = layer_scores(maps, degrees, **how)
    assert_close(layer_scores(maps, degrees, precision="fast", **how), expected, 5e-3)
    least = least_memory(maps.shape, degrees, "exact", torch.device("cpu"), radius) / GIB
    for factor in (1, 1.5, 5):
        assert_close(layer_scores(maps, degrees, memory_budget=least * factor, **how), expected, 1e-5)


@pytest.mark.parametrize("num_images", range(3, 11))
def test_copies_among_others(num_images):
    maps = randn(num_images, 8, 3, 3)
    maps[1] = maps[0]  # at distance 0 of each other
    scores = layer_scores(maps, (1, 3), second_interval=SECOND)
    assert scores.isfinite().all()
    assert (scores[2:] > 0).all()
    twice = layer_scores(torch.cat([maps, maps]), (1,), second_interval=SECOND)  # ties everywhere
    assert_close(twice[:num_images], twice[num_images:], 1e-5)


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


def test_a_fraction_and_a_count_are_compared_where_the_pool_is_known():
    MuScModel("musc-tiny", interval=(0, 4), second_interval=(0.4, 0.7))
    layer_scores(randn(12, 8, 3, 3), interval=(0, 4), second_interval=(0.4, 0.7))
    with pytest.raises(ValueError, match=r"begin where interval ends or later, got \(0.4, 0.7\) after \(0, 4\)"):
        layer_scores(randn(10, 8, 3, 3), interval=(0, 4), second_interval=(0.4, 0.7))


def test_through_engine(folder, make_engine):
    model = MuSc(OwnBackbone(), second_interval=SECOND, visualizer=False)
    make_engine().predict(model, data_path=folder)
    plain = MuSc(OwnBackbone(), visualizer=False)
    make_engine().predict(plain, data_path=folder)
    assert (model.pools[0].patch_scores >= plain.pools[0].patch_scores - 1e-6).all()
    assert (model.pools[0].patch_scores - plain.pools[0].patch_scores).max() > 1e-4
