# SPDX-License-Identifier: Apache-2.0
"""Same-place search against one in float64, place by place."""

import numpy as np
import pytest
import torch
from seeded import assert_close, randn, to_numpy
from test_nearest_distances import collect, window_vectors

from anomalib_musc.distances import least_memory, nearest_distances
from anomalib_musc.distances.kernels import make_batched_kernels
from anomalib_musc.distances.loading import PoolLoader
from anomalib_musc.distances.nearest import compared
from anomalib_musc.distances.plan import Workload, make_plan, make_workloads
from anomalib_musc.distances.same_place import make_places
from anomalib_musc.distances.storage import GIB

CPU = torch.device("cpu")


def search(maps: torch.Tensor, degree: int, radius: int) -> np.ndarray:
    """Distances (N, N, L) of the window vectors of maps, within a radius; infinite to the image itself."""
    num_images, channels, height, width = maps.shape
    vectors = window_vectors(to_numpy(maps), degree).reshape(num_images, height, width, channels)
    found = np.full((num_images, num_images, height, width), np.inf)
    for i in range(num_images):
        for j in set(range(num_images)) - {i}:
            for y in range(height):
                for x in range(width):
                    near = vectors[j, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
                    found[i, j, y, x] = np.linalg.norm(near - vectors[i, y, x], axis=2).min()
    return found.reshape(num_images, num_images, -1)


SHAPES = [(5, 24, 4, 6), (3, 12, 2, 9), (2, 7, 1, 5), (4, 33, 6, 2), (3, 8, 1, 1), (9, 16, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_a_patch_is_sought_near_its_place(shape, radius):
    maps = randn(*shape)
    expected = [search(maps, degree, radius) for degree in (1, 3)]
    _, distances = collect(nearest_distances(maps, (1, 3), search_radius=radius), len(maps))
    assert_close(distances, np.stack(expected), 1e-4)
    _, distances = collect(nearest_distances(maps.double(), (1, 3), search_radius=radius), len(maps))
    assert distances.dtype == torch.float64
    assert_close(distances, np.stack(expected), 1e-7)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_radius_of_the_whole_map_is_the_whole_search(precision):
    maps = randn(4, 24, 3, 5)
    _, expected = collect(nearest_distances(maps, (1, 3), precision=precision), 4)
    for radius in (4, 5, 100):
        _, distances = collect(nearest_distances(maps, (1, 3), search_radius=radius, precision=precision), 4)
        assert_close(distances, expected, 1e-6)


@pytest.mark.parametrize("number", range(len(make_batched_kernels("fast", torch.empty(0)))))
@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3, 1])
def test_patches_that_are_all_but_equal(number, noise):
    """With every product, as if a trial had chosen it."""
    maps = randn(5, 96, 5, 6)
    maps[..., :3, :] = randn(1, 96, 1, 1, seed=1)  # two backgrounds, of which one is far from the other
    maps[..., 3:, :2] = 4 * randn(1, 96, 1, 1, seed=2)
    maps += noise * randn(5, 96, 5, 6, seed=3)
    kernel = make_batched_kernels("fast", torch.empty(0))[number]
    workload = Workload((5, 30, 96), (3,), torch.empty(0), kernel, 5, make_places((5, 6), 1))
    pool = PoolLoader(maps, range(5), None).surveyed()
    _, distances = collect(compared(pool, [workload], None, None), 5)
    assert_close(distances[0], search(maps, 3, 1), 1e-4 if number == 0 else 6e-3)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_budget_and_the_order_change_no_distance(precision):
    maps, order = randn(11, 24, 4, 5), [3, 1, 8, 0, 10, 2, 5, 4, 9, 7, 6]
    _, expected = collect(nearest_distances(maps, (1, 3), search_radius=1, precision=precision), 11)
    least = least_memory(maps.shape, (1, 3), precision, CPU, 1) / GIB
    (workload, _) = make_workloads((11, 20, 24), (1, 3), precision, torch.empty(0), make_places((4, 5), 1))
    plan = make_plan(workload, 1.5 * least)
    assert (plan.device, plan.tile < 6) == (None, True)  # a file, and many tiles
    for budget in (least, 1.5 * least):
        blocks = nearest_distances(maps, (1, 3), search_radius=1, precision=precision, memory_budget=budget)
        _, distances = collect(blocks, 11)
        assert_close(distances, expected, 2e-6)
    _, distances = collect(nearest_distances(maps, (1, 3), images=order, search_radius=1, precision=precision), 11)
    assert_close(distances, expected[:, order][:, :, order], 2e-6)


def test_progress_counts_each_pair_at_each_degree():
    steps = []
    blocks = nearest_distances(randn(6, 16, 7, 4), (1, 3), search_radius=1, progress=steps.append, memory_budget=1e-4)
    collect(blocks, 6)
    assert sum(steps) == 2 * 15


@pytest.mark.parametrize("radius", [-1, 1.5, True, "2"])
def test_a_wrong_radius_is_named(radius):
    with pytest.raises(ValueError, match=f"search_radius must be a whole number of at least 0, .* got {radius!r}"):
        nearest_distances(torch.ones(3, 2, 4, 4), (1,), search_radius=radius)


def test_patches_without_places_are_refused():
    with pytest.raises(ValueError, match=r"search_radius=1 needs maps \(N, C, H, W\)"):
        nearest_distances(torch.ones(3, 4, 2), search_radius=1)


def test_a_file_twice_costs_next_to_nothing():
    """Of places where two images are equal, these two alone are compared again."""
    maps = randn(12, 32, 5, 6)
    maps[3], maps[7] = maps[0], maps[0] + 1e-6 * randn(32, 5, 6, seed=1)
    _, distances = collect(nearest_distances(maps, (1, 3), search_radius=2), 12)
    assert_close(distances, np.stack([search(maps, degree, 2) for degree in (1, 3)]), 1e-4)


@pytest.mark.parametrize("grid", [(6, 15), (7, 5)])
@pytest.mark.parametrize("noise", [0, 1e-5, 1e-3, 1e-2])
def test_a_background_that_does_not_move(grid, noise):
    """Also where each image is a tile of its own, and where nothing but the very place is searched."""
    maps = randn(1, 48, *grid, seed=1) + noise * randn(6, 48, *grid)
    maps[2, :, 1:4, 2:5] = randn(48, 3, 3, seed=3)  # something in front
    for radius in (0, 1):
        expected = np.stack([search(maps, degree, radius) for degree in (1, 3)])
        least = least_memory(maps.shape, (1, 3), "exact", CPU, radius) / GIB
        for budget in (None, least):
            blocks = nearest_distances(maps, (1, 3), search_radius=radius, memory_budget=budget)
            assert_close(collect(blocks, 6)[1], expected, 1e-4)
