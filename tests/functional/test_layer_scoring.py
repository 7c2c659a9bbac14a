# SPDX-License-Identifier: Apache-2.0
"""`layer_scores`, which shares work between degrees, and the fast precision, against the equations."""

import functools

import golden
import numpy as np
import oracle
import pytest
import torch
from seeded import assert_close, randn, to_numpy, unit

from anomalib_musc.functional import layer_scores, mutual_scores

SHARED, SEPARATE = 256, 24  # channels, for which a trial may choose one product for all degrees, or one for each
FAST = 5e-3  # of a distance; a map's range is about 1 here


def by_equations(maps: torch.Tensor, degrees: tuple[int, ...], interval: tuple[float, float] = (0, 0.3)) -> np.ndarray:
    scores = [oracle.mutual_scores(oracle.lnamd(to_numpy(maps), degree), interval) for degree in degrees]
    return np.mean(scores, axis=0)


@golden.needs_golden
@pytest.mark.parametrize("name", golden.CHAINS)
def test_layers_and_degrees_equal_golden(name):
    chain = golden.load(name)
    options = golden.settings(chain)
    maps = torch.from_numpy(golden.feature_maps(chain)).float()
    scores = [layer_scores(layer, options["degrees"], options["interval"]) for layer in maps]
    assert_close(torch.stack(scores).mean(dim=0), chain["patch_scores"], 1e-5)


@pytest.mark.parametrize("degrees", [(1,), (1, 3, 5), (7,), (5, 1), (3, 3)])
@pytest.mark.parametrize("grid", [(6, 5), (2, 9), (1, 4), (4, 1)])
@pytest.mark.parametrize("channels", [SHARED, SEPARATE])
def test_all_degrees_are_those_of_the_equations(channels, grid, degrees):
    maps = randn(4, channels, *grid)
    assert_close(layer_scores(maps, degrees, (0, 2)), by_equations(maps, degrees, (0, 2)), 1e-4)


@pytest.mark.parametrize("channels", [SHARED, SEPARATE])
def test_float64_stays_float64(channels):
    maps = randn(4, channels, 3, 4, dtype=torch.float64)
    scores = layer_scores(maps, (1, 3))
    assert scores.dtype == torch.float64
    assert_close(scores, by_equations(maps, (1, 3)), 1e-7)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("channels", [SHARED, 768, SEPARATE])
def test_the_order_of_images_and_the_threads_change_nothing(channels, precision):
    maps = randn(9, channels, 6, 6) + randn(1, channels, 6, 6, seed=1)
    score = functools.partial(layer_scores, degrees=(1, 3), precision=precision)
    expected, threads = score(maps), torch.get_num_threads()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(score(maps[order]), expected[order], 2e-6)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)  # of which each has a trial of its own
            assert_close(score(maps), expected, 2e-6 if precision == "exact" else FAST)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("channels", [SHARED, SEPARATE])
def test_some_images_form_a_pool(channels):
    maps = randn(9, channels, 3, 3)
    assert_close(layer_scores(maps, images=[8, 0, 3, 4]), layer_scores(maps[[8, 0, 3, 4]]), 1e-6)


def test_progress_counts_each_pair_at_each_degree():
    for channels in (SHARED, SEPARATE):
        steps = []
        layer_scores(randn(6, channels, 3, 3), (1, 3), progress=steps.append)
        assert sum(steps) == 2 * 15


@pytest.mark.parametrize("channels", [SHARED, SEPARATE])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_blank_and_repeated_images(channels, precision):
    maps = randn(5, channels, 4, 4)
    maps[1] = 3.0  # normalised to zeros
    maps[3] = maps[2]
    scores = layer_scores(maps, (1, 3, 5), (0, 1), precision=precision)
    assert scores.isfinite().all()
    assert_close(scores[2:4], torch.zeros(2, 16), 1e-4)
    assert_close(scores, by_equations(maps, (1, 3, 5), (0, 1)), 1e-4 if precision == "exact" else FAST)


@pytest.mark.parametrize("memory_budget", [None, 5e-3], ids=["at once", "in tiles"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("size", [0.1, 0.01, 1e-3])
def test_patches_that_cancel_in_their_window(size, precision, memory_budget):
    signs = torch.tensor([1.0, 1, -2]).repeat(4).view(1, 1, 12, 1)
    maps = signs * randn(1, 768, 1, 1) + size * randn(4, 768, 12, 12, seed=1)
    scores = layer_scores(maps, (1, 3, 5), (0, 1), precision=precision, memory_budget=memory_budget)
    assert_close(scores, by_equations(maps, (1, 3, 5), (0, 1)), 1e-4 if precision == "exact" else 2e-2)


def test_gradients_are_not_followed():
    maps = randn(3, SHARED, 3, 3).requires_grad_()
    assert not layer_scores(maps).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_map": torch.ones(3, 4, 5)}, r"feature_map must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
        ({"feature_map": torch.ones(1, 4, 5, 5)}, "feature_map must hold at least 2 images"),
        ({"images": [1]}, "feature_map must hold at least 2 images"),
        ({"images": [0, 4]}, r"images must be different indices from 0 to 3, got \[0, 4\]"),
        ({"images": [0, 1, 1]}, "images must be different indices"),
        ({"feature_map": torch.full((3, 4, 5, 5), torch.nan)}, r"NaN or infinity in images \[0, 1, 2\]"),
        ({"degrees": (1, 2)}, r"degrees must be a non-empty sequence of positive odd numbers, got \(1, 2\)"),
        ({"degrees": ()}, "degrees must be"),
        ({"interval": (0.5, 0.2)}, "interval must begin below its end"),
        ({"interval": ("a", "b")}, "interval must be two finite bounds 0 <= lo < hi, got .'a', 'b'."),
        ({"precision": "quick"}, r"precision must be one of \('exact', 'fast'\), got 'quick'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_scores(**{"feature_map": randn(4, 8, 3, 3), **arguments})


# The fast precision


@pytest.mark.parametrize("channels", [16, 256, 768])
@pytest.mark.parametrize("distance", [1.0, 0.1, 0.03, 0.01, 1e-3])
def test_fast_distances_are_close_at_every_scale(channels, distance):
    features = unit(1, 20, channels, dtype=torch.float64) + distance * unit(
        8, 20, channels, seed=1, dtype=torch.float64
    )
    features = torch.nn.functional.normalize(features, dim=-1).float()
    expected = oracle.mutual_scores(to_numpy(features), (0, 1))
    assert_close(mutual_scores(features, (0, 1), precision="fast"), expected, 2 * FAST if channels == 16 else FAST)


def test_fast_stays_close_where_one_channel_outweighs_all_others():
    maps = randn(6, 768, 5, 5)
    maps[:, 7] *= 60  # as in transformers
    expected = by_equations(maps, (1, 3))
    assert_close(layer_scores(maps, (1, 3), precision="fast"), expected, 2e-2 * np.ptp(expected))
