# SPDX-License-Identifier: Apache-2.0
"""The way into the distances, against a search in float64."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded import assert_close, rand, randn, to_numpy, unit

from anomalib_musc.distances import MemoryBudgetError, least_memory, nearest_distances
from anomalib_musc.distances.comparison import compare_tiles
from anomalib_musc.distances.kernels import make_kernels
from anomalib_musc.distances.loading import PoolLoader
from anomalib_musc.distances.nearest import compared, surveyed_blocks
from anomalib_musc.distances.plan import Workload, make_plan, make_workloads
from anomalib_musc.distances.storage import GIB
from anomalib_musc.distances.trial import fastest
from anomalib_musc.distances.windows import write_unit_vectors

CPU = torch.device("cpu")


@pytest.fixture(params=["one product for all degrees", "one for each", "one for each, images held"])
def search_maps(request):
    """nearest_distances of maps, as if a trial had chosen either way."""

    def search_maps(
        maps: torch.Tensor, degrees: tuple[int, ...], precision: str = "exact", budget: float | None = None
    ):
        num_images, channels, height, width = maps.shape
        kernel, _ = fastest(precision, height * width, channels, degrees, torch.empty(0))
        if search_maps.is_shared and not kernel.can_share:
            kernel = next(kernel for kernel in make_kernels(precision, torch.empty(0)) if kernel.can_share)
        together = [tuple(degrees)] if search_maps.is_shared else [(degree,) for degree in degrees]
        shape = (num_images, height * width, channels)
        workloads = [Workload(shape, some, torch.empty(0), kernel, shape[0]) for some in together]
        pool = PoolLoader(maps, range(num_images), None).surveyed()
        if request.param.endswith("held"):
            pool = pool.held(workloads[0], num_images * max(workload.image_bytes for workload in workloads))
        return compared(pool, workloads, budget, None)

    search_maps.is_shared = request.param == "one product for all degrees"
    return search_maps


def search(features: np.ndarray) -> np.ndarray:
    """Distances (N, N, L) of patches (N, L, C), patch by patch; infinite to the image itself."""
    num_images, num_patches, _ = features.shape
    found = np.full((num_images, num_images, num_patches), np.inf)
    for i in range(num_images):
        for j in set(range(num_images)) - {i}:
            for p in range(num_patches):
                found[i, j, p] = np.linalg.norm(features[j] - features[i, p], axis=1).min()
    return found


def window_vectors(maps: np.ndarray, degree: int) -> np.ndarray:
    """Unit vectors (N, L, C) of the sums over the windows of maps (N, C, H, W)."""
    radius = degree // 2
    padded = np.pad(maps, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (degree, degree), axis=(2, 3))  # (N, C, H, W, r, r)
    sums = windows.sum(axis=(4, 5)).reshape(*maps.shape[:2], -1).transpose(0, 2, 1)
    return sums / np.linalg.norm(sums, axis=2, keepdims=True)


def collect(blocks, num_images: int) -> tuple[list[slice], torch.Tensor]:
    """The slices, and all distances (D, N, N, L), of blocks that hold all degrees or one after the other."""
    slices, degrees = [], []
    for images, distances in blocks:
        if images.start == 0:
            degrees.append([])
        slices.append(images)
        assert distances.shape[1] == images.stop - images.start
        assert distances.shape[2] == num_images
        degrees[-1].append(distances)
    return slices, torch.cat([torch.cat(parts, dim=1) for parts in degrees])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 1), (5, 7, 3), (4, 6, 300)])
def test_patches_are_compared_as_they_are(shape, dtype):
    features = (3 * randn(*shape)).to(dtype)
    ((images, distances),) = nearest_distances(features)
    assert images == slice(0, shape[0], None)
    assert distances.shape == (1, shape[0], shape[0], shape[1])
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert distances[0].diagonal().isposinf().all()
    expected = search(to_numpy(features))
    assert_close(distances[0], expected, 1e-4 * shape[2] ** 0.5)  # relative to the norms of patches


@pytest.mark.parametrize("degrees", [(1,), (3,), (1, 5, 3), (3, 3)])
def test_windows_of_maps_are_compared(search_maps, degrees):
    maps = randn(4, 24, 3, 5)
    slices, distances = collect(search_maps(maps, degrees), 4)
    assert slices == [slice(0, 4, None)] * (1 if search_maps.is_shared else len(degrees))
    expected = [search(window_vectors(to_numpy(maps), degree)) for degree in degrees]
    assert_close(distances, np.stack(expected), 1e-4)


@pytest.mark.parametrize("channels", [24, 256])
def test_a_budget_that_forces_files_changes_no_distance(channels):
    maps, degrees = randn(11, channels, 4, 5), (1, 3)
    _, expected = collect(nearest_distances(maps, degrees), 11)
    least = least_memory(maps.shape, degrees, "exact", CPU)
    workloads = make_workloads((11, 20, channels), degrees, "exact", torch.empty(0))
    assert make_plan(workloads[0], least / GIB).device is None  # a file
    slices, distances = collect(nearest_distances(maps, degrees, memory_budget=least / GIB), 11)
    once = [slice(image, image + 1, None) for image in range(11)]
    assert slices == once * len(workloads)
    assert_close(distances, expected, 2e-6)
    with pytest.raises(MemoryBudgetError, match="memory_budget must be at least"):
        list(nearest_distances(maps, degrees, memory_budget=0.99 * least / GIB))


@pytest.mark.parametrize("budget", [None, 2e-3])
def test_blocks_ascend_and_cover_all_images_once(budget):
    covered = []
    for images, distances in nearest_distances(unit(300, 4, 3), memory_budget=budget):
        covered += range(images.start, images.stop)
        rows = torch.arange(images.start, images.stop)
        assert distances[0, torch.arange(len(rows)), rows].isposinf().all()
        assert distances.isinf().sum() == 4 * len(rows)
    assert covered == list(range(300))


@pytest.mark.parametrize("channels", [24, 256])
def test_a_block_stays_as_it_was(channels):
    """Whoever keeps blocks has not kept memory that the next ones are written to."""
    maps = randn(5, channels, 3, 3)
    budget = least_memory(maps.shape, (1, 3), "exact", CPU) / GIB
    kept = list(nearest_distances(maps, (1, 3), memory_budget=budget))
    again = nearest_distances(maps, (1, 3), memory_budget=budget)
    assert len(kept) > 1
    for (images, distances), (same, expected) in zip(kept, again, strict=True):
        assert images == same
        torch.testing.assert_close(distances, expected, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("noise", [0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("share", [0.04, 0.3, 1])
def test_patches_that_are_all_but_equal(search_maps, share, noise, precision):
    """As those of a plain background are, within an image and among images."""
    maps = randn(5, 96, 5, 6)
    flat = maps.flatten(2)
    flat[..., : int(share * 30)] = randn(1, 96, 1, seed=1)
    maps += noise * randn(5, 96, 5, 6, seed=2)
    _, distances = collect(search_maps(maps, (1, 3), precision), 5)
    expected = np.stack([search(window_vectors(to_numpy(maps), degree)) for degree in (1, 3)])
    assert_close(distances, expected, 1e-4 if precision == "exact" else 2e-2)


def static_maps(noise: float, kind: str) -> torch.Tensor:
    """Maps (6, 96, 5, 6) of a camera that does not move: the background has structure, the same in all images."""
    maps = randn(6, 96, 5, 6)
    if kind == "a repeated texture":  # a place is like others of the same image, too
        maps[:] = randn(1, 96, 1, 2, seed=1).repeat(1, 1, 5, 3)
    elif kind == "colours in any order":  # patches are of three kinds, windows of many
        maps[:] = randn(96, 3, seed=1)[:, torch.randint(3, (5, 6), generator=torch.Generator().manual_seed(4))]
    elif kind == "two lots":
        maps[:3], maps[3:] = randn(1, 96, 5, 6, seed=1), randn(1, 96, 5, 6, seed=2)
    elif kind == "the background moved by a column":
        maps[:] = randn(1, 96, 5, 6, seed=1)
        maps[3:] = maps[3:].roll(1, dims=3)
    else:
        maps[:, :, :, :4] = randn(1, 96, 5, 4, seed=1)
    maps += noise * randn(6, 96, 5, 6, seed=3)
    return maps


STATIC = [
    "something in front",
    "a repeated texture",
    "colours in any order",
    "two lots",
    "the background moved by a column",
]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("noise", [0, 1e-5, 1e-3, 1e-2])
@pytest.mark.parametrize("kind", STATIC)
def test_a_background_that_does_not_move(search_maps, kind, noise, precision):
    maps = static_maps(noise, kind)
    _, distances = collect(search_maps(maps, (1, 3), precision), 6)
    expected = np.stack([search(window_vectors(to_numpy(maps), degree)) for degree in (1, 3)])
    assert_close(distances, expected, 1e-4 if precision == "exact" else 2e-2)


@pytest.mark.parametrize("kind", STATIC)
def test_a_background_that_does_not_move_within_a_small_budget(kind):
    maps, degrees = static_maps(1e-3, kind), (1, 3)
    expected = np.stack([search(window_vectors(to_numpy(maps), degree)) for degree in degrees])
    least = least_memory(maps.shape, degrees, "exact", CPU)
    for budget in (least / GIB, 2 * least / GIB):
        _, distances = collect(nearest_distances(maps, degrees, memory_budget=budget), 6)
        assert_close(distances, expected, 1e-4)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_images_of_one_patch_that_is_always_the_same(precision):
    for features in (unit(1, 1, 64).repeat(5, 1, 1), unit(1, 1, 64).repeat(5, 1, 1) + 1e-3 * unit(5, 1, 64, seed=1)):
        _, distances = collect(nearest_distances(features, precision=precision), 5)
        assert_close(distances[0], search(to_numpy(features)), 1e-4)


def test_few_kinds_of_patches_are_compared_apart_where_windows_are_of_many():
    (workload, *_) = make_workloads((6, 30, 96), (1,), "exact", torch.empty(0))
    for kind, degrees, expected in (
        ("colours in any order", (1,), False),
        ("colours in any order", (1, 5), True),
        ("a repeated texture", (1, 5), False),
    ):
        pool = PoolLoader(static_maps(0, kind), range(6), None).surveyed()
        assert pool.centred(replace(workload, degrees=degrees)).is_static == expected


def test_same_places_are_compared_few_images_at_a_time():
    """Memory for one image after the other changes no distance, in a tile's comparison with itself and with another."""
    maps = static_maps(1e-3, "something in front")
    (workload, *_) = make_workloads((6, 30, 96), (3,), "exact", torch.empty(0))
    pool = PoolLoader(maps, range(6), None).surveyed().centred(workload)
    assert pool.is_static
    assert not PoolLoader(randn(6, 96, 5, 6), range(6), None).surveyed().centred(workload).is_static
    whole, first, last = pool.tile(workload, 0, 6), pool.tile(workload, 0, 4), pool.tile(workload, 4, 6)
    expected = search(window_vectors(to_numpy(maps), 3))
    for memory in (1, 2**30):
        distances = torch.empty(1, 6, 6, 30)
        compare_tiles(whole, whole, workload.kernel, 2, memory, (distances, distances), None)
        assert_close(distances[0], expected, 1e-4)
        forward, backward = torch.empty(1, 4, 2, 30), torch.empty(1, 2, 4, 30)
        compare_tiles(first, last, workload.kernel, 2, memory, (forward, backward), None)
        assert_close(forward[0], expected[:4, 4:], 1e-4)
        assert_close(backward[0], expected[4:, :4], 1e-4)


def test_a_region_close_to_a_plain_background(search_maps):
    """Whose patches are as close to each other as they are far from what is subtracted."""
    plain, other = unit(1, 1, 768)[0, 0], unit(1, 1, 768, seed=1)[0, 0]
    features = plain.repeat(4, 128, 1)
    features[:, 64:] = (plain + 0.05 * other) / (plain + 0.05 * other).norm() + 6e-4 * unit(4, 64, 768, seed=2)
    features[1:, 64:96] = features[0, 80:112] + 1e-4 * unit(3, 32, 768, seed=3)
    maps = features.mT.reshape(4, 768, 8, 16)
    _, distances = collect(search_maps(maps, (1, 3)), 4)
    expected = np.stack([search(window_vectors(to_numpy(maps), degree)) for degree in (1, 3)])
    assert_close(distances, expected, 1e-4)


@pytest.mark.parametrize("noise", [0, 1e-5, 1e-3])
@pytest.mark.parametrize("memory", [1, 2**20, 2**30])
def test_two_backgrounds(memory, noise):
    """The second one is compared again, few patches of few images at a time, or all."""
    features = unit(6, 60, 192)
    features[:, :20], features[:, 20:40] = features[0, 0].clone(), features[0, 30].clone()
    features = features + noise * unit(6, 60, 192, seed=1)
    expected = search(to_numpy(features))
    _, distances = collect(nearest_distances(features), 6)
    assert_close(distances[0], expected, 1e-4)
    (workload,) = make_workloads((6, 60, 192), (1,), "exact", torch.empty(0))
    tile = PoolLoader(features, range(6), None).surveyed().centred(workload).tile(workload, 0, 6)
    distances = torch.empty(1, 6, 6, 60)
    compare_tiles(tile, tile, workload.kernel, 2, memory, (distances, distances), None)
    assert_close(distances[0], expected, 1e-4)


def test_images_are_counted_in_the_order_given():
    features = unit(7, 5, 4)
    for chosen in ([5, 0, 3], range(1, 7, 2)):
        ((images, distances),) = nearest_distances(features, images=chosen)
        assert images == slice(0, 3, None)
        assert_close(distances[0], search(to_numpy(features[list(chosen)])), 1e-4)


@pytest.mark.parametrize("degrees", [None, (3,), (1, 3)])
def test_each_image_is_prepared_alone(degrees):
    features = randn(6, 9, 260) if degrees is None else randn(6, 260, 3, 3)
    shapes = set()

    def prepare(image: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(image.shape))
        return torch.sin(image) + image.mean()

    chosen = [4, 2, 3]
    _, distances = collect(nearest_distances(features, degrees, images=chosen, prepare=prepare), 3)
    assert shapes == {(1, *features.shape[1:])}
    prepared = torch.stack([torch.sin(features[image]) + features[image].mean() for image in chosen])
    _, expected = collect(nearest_distances(prepared, degrees), 3)
    assert_close(distances, expected, 1e-5)


def test_progress_counts_each_pair_at_each_degree():
    for channels in (24, 256):
        steps = []
        collect(nearest_distances(randn(6, channels, 2, 2), (1, 3), progress=steps.append), 6)
        assert sum(steps) == 2 * 15


def test_autocast_is_off_within_and_as_before_without():
    features = unit(4, 6, 40)
    ((_, expected),) = nearest_distances(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _, distances in nearest_distances(features):
            assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
            torch.testing.assert_close(distances, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.ones(3, 4)}, r"features must have shape \(N, L, C\), .* got \(3, 4\)"),
        ({"features": torch.ones(3, 2, 4, 4)}, r"got \(3, 2, 4, 4\); or give maps \(N, C, H, W\) with degrees"),
        (
            {"degrees": (1, 3)},
            r"features must have shape \(N, C, H, W\), .* patches \(N, L, C\) without degrees",
        ),
        ({"features": torch.ones(3, 0, 4)}, r"got \(3, 0, 4\)"),
        (
            {"features": torch.ones(3, 2, 4, 4), "degrees": (2,)},
            r"degrees must be .* odd numbers, got \(2,\)",
        ),
        ({"features": torch.ones(1, 4, 2)}, "features must hold at least 2 images to compare, got 1"),
        ({"images": [0, 3]}, r"images must be different indices from 0 to 2, got \[0, 3\]"),
        ({"precision": "half"}, r"precision must be one of \('exact', 'fast'\), got 'half'"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of GiB, got 0"),
    ],
)
def test_bad_arguments_are_named_before_the_first_block(arguments, message):
    with pytest.raises(ValueError, match=message):
        nearest_distances(**{"features": torch.ones(3, 4, 2), **arguments})


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_images_that_are_not_finite_are_named(value, precision):
    features = unit(8, 4, 3)
    features[[3, 6, 7], 1, 2] = value
    blocks = nearest_distances(features, images=[6, 0, 3, 4], precision=precision)
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinity in images \[6, 3\]"):
        next(blocks)


@pytest.mark.parametrize("value", [2e15, 1e18, 1e19, -1e30])
def test_numbers_that_would_overflow_are_named_before_anything_is_compared(value):
    for features, degrees in ((randn(4, 6, 300), None), (randn(4, 300, 2, 3), (1, 3)), (randn(4, 8, 2, 3), (1,))):
        steps = []
        features[3].flatten()[5] = value
        with pytest.raises(ValueError, match=r"in images \[3\], or numbers above 1e\+15, whose squares overflow"):
            next(nearest_distances(features, degrees, progress=steps.append, memory_budget=1))
        assert not steps
    (_, distances), *_ = nearest_distances(1e14 * unit(4, 6, 300))
    assert distances[0][~torch.eye(4, dtype=torch.bool)].isfinite().all()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("offset", [1, 10, 100, 1000, 1e5])
@pytest.mark.parametrize("shape", [(5, 40, 24), (5, 40, 384), (3, 30, 768)])
def test_an_offset_of_all_patches_changes_no_distance(shape, offset, precision):
    features = randn(*shape) + offset + 3 * randn(1, 1, shape[2], seed=1)
    images = [4, 0, 2] if len(features) == 5 else [2, 0, 1]
    _, distances = collect(nearest_distances(features, images=images, precision=precision), 3)
    patches = to_numpy(features[images])
    longest = np.linalg.norm(patches - patches.mean(axis=(0, 1)), axis=2).max()
    assert_close(distances[0], search(patches), (1e-6 if precision == "exact" else 6e-3) * longest)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float16, 100), (torch.bfloat16, 10), (torch.float64, 1e7)])
def test_an_offset_in_other_types(dtype, offset):
    features = (randn(4, 20, 64, dtype=torch.float64) + offset).to(dtype)
    _, distances = collect(nearest_distances(features), 4)
    assert_close(distances[0], search(to_numpy(features)), 1e-5)


def test_an_offset_within_a_small_budget_and_of_prepared_features():
    features = randn(11, 20, 64) + 100
    _, expected = collect(nearest_distances(features), 11)
    (workload,) = make_workloads((11, 20, 64), (1,), "exact", torch.empty(0))
    _, distances = collect(nearest_distances(features, memory_budget=workload.least_bytes / GIB), 11)
    assert_close(distances, expected, 1e-6)
    _, distances = collect(nearest_distances(features - 100, prepare=lambda image: image + 100), 11)
    assert_close(distances, expected, 1e-4)  # of the rounding of the sum


def test_distances_know_nothing_of_the_method():
    code = """
import sys, torch
from anomalib_musc.distances import nearest_distances
for images, distances in nearest_distances(torch.rand(3, 4, 5, 6), (1, 3), precision="fast"): pass
print(*sorted(sys.modules))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "anomalib_musc.distances.nearest"} <= loaded
    own = {name for name in loaded if name.startswith("anomalib_musc.")}
    others = {name for name in own if not name.startswith("anomalib_musc.distances")}
    of_package = {"anomalib_musc.compat", "anomalib_musc.compat.old_names", "anomalib_musc.startup"}
    assert others <= of_package  # which the package itself imports, and what watches imports
    assert not loaded & {"anomalib", "lightning", "timm", "open_clip", "torchvision", "cv2", "pandas", "sklearn"}


def separately(
    maps: torch.Tensor,
    degrees: tuple[int, ...],
    images: Sequence[int] | None = None,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    budget: float | None = None,
) -> list[torch.Tensor]:
    """Distances with a product for each degree, for which images are held."""
    images = range(len(maps)) if images is None else images
    _, channels, height, width = maps.shape
    kernel, _ = fastest("exact", height * width, channels, degrees, torch.empty(0))
    shape = len(images), height * width, channels
    workloads = [Workload(shape, (degree,), torch.empty(0), kernel, len(images)) for degree in degrees]
    budget = None if budget is None else budget * max(workload.least_bytes for workload in workloads) / GIB
    blocks = surveyed_blocks(PoolLoader(maps, images, prepare), workloads, budget, None)
    return [distances for _, distances in blocks]


class TestHeldImages:
    def test_the_least_memory_still_suffices(self):
        maps = randn(2, 4, 32, 32)
        found, expected = separately(maps, (1, 3), budget=1.0001), separately(maps, (1, 3))
        assert_close(torch.cat([one.flatten() for one in found]), torch.cat([one.flatten() for one in expected]), 1e-6)

    def test_autocast_is_off_while_they_are_prepared(self):
        weight, maps = randn(16, 16), randn(3, 16, 4, 4)

        def prepare(features: torch.Tensor) -> torch.Tensor:
            return torch.einsum("nchw,cd->ndhw", features, weight)

        expected = separately(maps, (1, 3), prepare=prepare)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = separately(maps, (1, 3), prepare=prepare)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    def test_an_error_names_the_images_that_were_given(self):
        maps = randn(10, 4, 5, 6)

        def prepare(features: torch.Tensor) -> torch.Tensor:
            return features * (torch.nan if torch.equal(features, maps[7:8]) else 1)

        with pytest.raises(ValueError, match=r"in images \[7\]"):
            separately(maps, (1, 3), [5, 7, 9], prepare)

    def test_sums_of_large_numbers(self):
        maps = (1 + rand(2, 1024, 31, 31)) * 5e14
        distances, _ = separately(maps, (31, 1))
        vectors = torch.empty(2, 31 * 31, 1024, dtype=torch.float64)
        write_unit_vectors(maps.permute(0, 2, 3, 1).double(), 31, None, vectors)
        expected = torch.cdist(vectors[0], vectors[1]).amin(dim=1)
        assert_close(distances[0, 0, 1].double(), expected, 1e-4)
