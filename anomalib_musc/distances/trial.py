# SPDX-License-Identifier: Apache-2.0
"""What is fastest on this machine, by a short trial: which product, and whether one serves all degrees."""

import math
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.kernels import Kernel, Precision, make_batched_kernels, make_kernels
from anomalib_musc.distances.same_place import Places, compare_places
from anomalib_musc.distances.tiles import CancellingWindowsError, Tile, tile_of_maps, tile_of_vectors

_SIDE = 32  # of the largest grid that is tried: what is fastest at 400 patches need not be at 1000
_MOST_BYTES = 2**29  # that products may take: one for all degrees is whole, where separate ones are cut into rows
_IMAGES = 4
# Of same-place search: images, of which more cost as much a pair; lines; places of one, at least; numbers and products.
_MANY_IMAGES, _LINES, _LENGTH, _NUMBERS = 64, 4, 4, 2**21
_TRIALS, _LEAST_SECONDS = 2, 0.005  # how often each is timed at least, and for how long together
# What takes so many times as long as something else is given up; the first time, which is slow, so much later.
_HOPELESS, _FIRST_SECONDS = 2, 0.02


def fastest(
    precision: Precision, num_patches: int, channels: int, degrees: Sequence[int], like: torch.Tensor
) -> tuple[Kernel, bool]:
    """Choose a kernel, and whether it compares all degrees with one product; tried once in a process.

    Args:
        precision: "exact" or "fast".
        num_patches: L.
        channels: C.
        degrees: The D degrees.
        like: A tensor of the device and type of the comparison.
    """
    kernels = make_kernels(precision, like)
    if len(kernels) == 1 and (len(degrees) == 1 or not kernels[0].can_share):
        return kernels[0], False
    seconds = _seconds_of_ways(
        precision, _grid(num_patches), channels, tuple(degrees), like.dtype, like.device, torch.get_num_threads()
    )
    number, is_shared = min(seconds, key=lambda way: seconds[way])
    kernel = kernels[number]
    return kernel, is_shared and kernel.pair_bytes(num_patches, is_shared=True) <= _MOST_BYTES


def seconds_of_pair(
    precision: Precision, num_patches: int, channels: int, degrees: Sequence[int], like: torch.Tensor
) -> float:
    """Estimate how long the comparison of two images takes, at all degrees, by a trial; see :func:`fastest`."""
    grid = _grid(num_patches)
    seconds = _seconds_of_ways(
        precision, grid, channels, tuple(degrees), like.dtype, like.device, torch.get_num_threads()
    )
    return min(seconds.values()) * (num_patches / math.prod(grid)) ** 2


def _grid(num_patches: int) -> tuple[int, int]:
    """Return the grid that is tried in place of one of so many patches."""
    side = min(_SIDE, math.isqrt(num_patches))
    return side, max(1, min(_SIDE, num_patches // side))


@lru_cache
def _seconds_of_ways(
    precision: Precision,
    grid: tuple[int, int],
    channels: int,
    degrees: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> dict[tuple[int, bool], float]:
    """Return how long a pair of images takes, by the number of a kernel and whether one product serves all degrees."""
    del num_threads  # a trial for each
    like = torch.empty(0, dtype=dtype, device=device)
    kernels = make_kernels(precision, like)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(_IMAGES, *grid, channels, generator=generator).to(like)
    seconds: dict[tuple[int, bool], float] = {}
    for number in reversed(range(len(kernels))):  # the fastest are the last, beside which others are soon given up
        kernel, vectors = kernels[number], patches.flatten(1, 2).clone()
        kernel.rounding.change_basis(vectors)
        parts = vectors[:1], vectors[1 : 1 + max(1, kernel.block // vectors.shape[1] ** 2)]
        for is_shared in (True, False) if len(degrees) > 1 and kernel.can_share else (False,):
            make_tile = partial(_tile, kernel, grid, degrees if is_shared else None)
            try:
                left, right = map(make_tile, parts)
            except CancellingWindowsError:  # as numbers at random may
                continue
            times = 1 if is_shared else len(degrees)
            best = min(seconds.values(), default=math.inf) / times
            seconds[number, is_shared] = times * _seconds(kernel, left, right, best)
    return seconds


def _tile(kernel: Kernel, grid: tuple[int, int], degrees: tuple[int, ...] | None, vectors: torch.Tensor) -> Tile:
    """Make a tile of vectors ``(b, L, C)``, whose windows are still to be summed where degrees are given."""
    if degrees is not None:
        return tile_of_maps(vectors.unflatten(1, grid), degrees, kernel.rounding)
    storage = F.pad(vectors, (0, kernel.rounding.norm_channels))
    return tile_of_vectors(storage, vectors.shape[2], kernel.rounding)


def fastest_by_place(
    precision: Precision, num_images: int, places: Places, channels: int, like: torch.Tensor
) -> Kernel:
    """Choose the kernel for same-place search, see :func:`fastest`."""
    some, lines = max(1, min(num_images, _MANY_IMAGES)), min(places.lines, _LINES)
    place_numbers = some * (channels + some * (2 * places.reach + 1))
    length = min(places.length, max(_LENGTH, _NUMBERS // (place_numbers * lines)))
    few, threads = Places((length, lines), places.radius), torch.get_num_threads()
    seconds = _seconds_by_place(precision, some, few, channels, like.dtype, like.device, threads)
    images = num_images / some
    rounded = images * math.prod(places.grid) / math.prod(few.grid)
    multiplied = images**2 * places.num_products / few.num_products
    whole = [rounded * rounding + multiplied * comparing for rounding, comparing in seconds]
    return make_batched_kernels(precision, like)[whole.index(min(whole))]


@lru_cache
def _seconds_by_place(
    precision: Precision,
    num_images: int,
    places: Places,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> list[tuple[float, float]]:
    """Return how long each kernel takes to round images, and to compare them with each other."""
    del num_threads  # a trial for each
    like = torch.empty(0, dtype=dtype, device=device)
    kernels = make_batched_kernels(precision, like)
    if len(kernels) == 1:
        return [(0.0, 0.0)]
    num_places = math.prod(places.grid)
    vectors = torch.randn(num_places, num_images, channels, generator=torch.Generator().manual_seed(0)).to(like)
    targets = (like.new_empty(1, num_images, num_images, num_places),) * 2
    seconds = []
    for kernel in kernels:
        norm_channels = kernel.rounding.norm_channels
        storage = F.pad(vectors, (0, norm_channels)).transpose(0, 1)
        make_tile = partial(tile_of_vectors, storage, channels, kernel.rounding)
        tile = make_tile()
        tile.sizes = torch.zeros_like(tile.sizes)  # no distance is computed again, as of few channels most would be
        compare = partial(compare_places, tile, tile, places, norm_channels, _MOST_BYTES, targets, None)
        seconds.append((shortest_seconds(make_tile, device), shortest_seconds(compare, device)))
    return seconds


def _seconds(kernel: Kernel, left: Tile, right: Tile, best: float) -> float:
    """Return the shortest of a few times, for one pair of images, of those of an image with a few others.

    Args:
        kernel: Compares them.
        left: An image.
        right: The others.
        best: See :func:`shortest_seconds`.
    """
    (num_degrees, count, num_patches), like = right.half_norms.shape, left.half_norms
    targets = (
        like.new_empty(num_degrees, 1, count, num_patches),
        like.new_empty(num_degrees, count, 1, num_patches),
    )
    compare = partial(kernel.compare, left, right, count, targets, None)
    return shortest_seconds(compare, like.device, best=best * count) / count


def shortest_seconds(
    run: Callable[[], object], device: torch.device, *, is_warm: bool = False, best: float = math.inf
) -> float:
    """Return the shortest of a few times, each until a device has done it.

    Args:
        run: What is timed.
        device: Where it runs.
        is_warm: Whether it has run before; else the first time is not counted.
        best: What something else takes. What takes much longer is not timed again.
    """
    limit, first = _HOPELESS * best, 0.0 if is_warm else _seconds_once(run, device)
    if first > limit + _FIRST_SECONDS and device.type == "cpu":  # GPUs compile for longer
        return first
    times = [_seconds_once(run, device)]
    while min(first, *times) <= limit and (len(times) < _TRIALS or sum(times) < _LEAST_SECONDS):
        times.append(_seconds_once(run, device))
    return min(times)


def _seconds_once(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
