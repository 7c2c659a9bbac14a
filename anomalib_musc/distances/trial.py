# SPDX-License-Identifier: Apache-2.0
"""What is fastest on this machine, by a short trial: which product, and whether one serves all degrees."""

import math
import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.kernels import Kernel, Precision, make_kernels
from anomalib_musc.distances.tiles import CancellingWindowsError, Tile, tile_of_maps, tile_of_vectors

_SIDE = 32  # of the largest grid that is tried: what is fastest at 400 patches need not be at 1000
_TRIALS = 2
_IMAGES = 4


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
    side = min(_SIDE, math.isqrt(num_patches))
    grid = (side, max(1, min(_SIDE, num_patches // side)))
    kernels = make_kernels(precision, like)
    way = _fastest(precision, grid, channels, tuple(degrees), like.dtype, like.device, torch.get_num_threads())
    return kernels[way[0]], way[1]


@lru_cache
def _fastest(
    precision: Precision,
    grid: tuple[int, int],
    channels: int,
    degrees: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
) -> tuple[int, bool]:
    """Return the number of the fastest kernel, and whether it does best with one product for all degrees."""
    del num_threads  # a trial for each
    like = torch.empty(0, dtype=dtype, device=device)
    kernels = make_kernels(precision, like)
    if len(kernels) == 1 and (len(degrees) == 1 or not kernels[0].can_share):
        return 0, False
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(_IMAGES, *grid, channels, generator=generator).to(like)
    seconds = {}
    for number, kernel in enumerate(kernels):
        vectors = kernel.rounding.prepare(patches.flatten(1, 2))
        storage = F.pad(vectors, (0, kernel.rounding.norm_channels))
        seconds[number, False] = len(degrees) * _seconds(kernel, tile_of_vectors(storage, channels, kernel.rounding))
        if len(degrees) > 1 and kernel.can_share:
            try:
                tile = tile_of_maps(vectors.view_as(patches), degrees, kernel.rounding)
            except CancellingWindowsError:  # as numbers at random may
                continue
            seconds[number, True] = _seconds(kernel, tile)
    return min(seconds, key=lambda way: seconds[way])


def _seconds(kernel: Kernel, tile: Tile) -> float:
    """Return the shortest of a few times, for one pair of images."""
    count = max(1, min(_IMAGES - 1, kernel.block // tile.patches.shape[1] ** 2))
    times = []
    for _ in range(1 + _TRIALS):
        start = time.perf_counter()
        distances, _ = kernel(tile, 0, tile, slice(1, 1 + count))
        distances.sum().item()  # when the device has done it
        times.append((time.perf_counter() - start) / count)
    return min(times[1:])
