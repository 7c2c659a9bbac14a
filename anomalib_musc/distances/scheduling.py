# SPDX-License-Identifier: Apache-2.0
"""The mutual scores of a pool within a budget of memory: what is held where, and in which order images meet."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from anomalib_musc.distances.comparison import Comparison, compare_tiles
from anomalib_musc.distances.storage import MemoryBudgetError, budget_in_bytes, file_tensor, release, trim
from anomalib_musc.distances.tiles import Tile

# Working memory of sorting one distance, in its own size: the distance, its copy, and values and indices of the result.
_SORTING = 5
# What the libraries of each thread pack their operands into; no more of a small budget than this share.
_BYTES_OF_THREAD, _SHARE_OF_THREADS = 3 * 2**20, 1 / 8


@dataclass(frozen=True)
class Workload:
    """Images that are to be compared with each other.

    Attributes:
        shape: Images N, patches L and channels C.
        degrees: Aggregation degrees that are compared together.
        like: A tensor of the device and type of the comparison.
        comparison: How two images are compared.
    """

    shape: tuple[int, int, int]
    degrees: tuple[int, ...]
    like: torch.Tensor
    comparison: Comparison

    @property
    def bytes_of_image(self) -> int:
        """Memory of an image in a tile."""
        _, num_patches, channels = self.shape
        numbers = num_patches * (channels + 2 * len(self.degrees))
        return numbers * self.like.itemsize + num_patches * channels * self.comparison.rounding.bytes_of_number

    @property
    def bytes_of_loading(self) -> int:
        """Working memory of loading an image."""
        return 4 * self.shape[1] * self.shape[2] * self.like.itemsize

    @property
    def bytes_of_pair(self) -> int:
        """Working memory of comparing two images."""
        return self.comparison.bytes_of_pair(self.shape[1])

    @property
    def bytes_of_distances(self) -> int:
        """Memory of the distances of the patches of one image to another."""
        return len(self.degrees) * self.shape[1] * self.like.itemsize

    @property
    def bytes_of_sorting(self) -> int:
        """Working memory of sorting the distances of one image."""
        return _SORTING * self.shape[0] * self.shape[1] * self.like.itemsize

    @property
    def least_bytes(self) -> int:
        """Memory without which no two images can be compared."""
        comparing = 2 * self.bytes_of_image + 2 * self.bytes_of_distances
        return self.bytes_of_pair + self.bytes_of_loading + max(comparing, self.bytes_of_sorting)


@dataclass(frozen=True)
class Plan:
    """What fits into a budget.

    Attributes:
        tile: Images that are held at once on each side.
        chunk: Images that are compared with an image at once.
        sorted_at_once: Images whose distances are sorted at once.
        home: Where all distances are held; ``None`` for a file.
    """

    tile: int
    chunk: int
    sorted_at_once: int
    home: torch.device | None


def make_plan(workload: Workload, memory_budget: float | None) -> Plan:
    """Divide a budget of GiB, on the device and on the host each.

    Raises:
        MemoryBudgetError: If it does not suffice to compare two images.
    """
    num_images, num_patches, _ = workload.shape
    budget = budget_in_bytes(memory_budget, workload.like.device)
    if budget < workload.least_bytes:
        raise MemoryBudgetError(workload.least_bytes, budget)
    packing = min(torch.get_num_threads() * _BYTES_OF_THREAD, int(budget * _SHARE_OF_THREADS))
    budget = max(workload.least_bytes, budget - packing)

    of_pair, of_image, loading = workload.bytes_of_pair, workload.bytes_of_image, workload.bytes_of_loading
    spared = min(budget // 4, budget - workload.least_bytes + of_pair)
    chunk = max(1, min(workload.comparison.block // num_patches**2, spared // of_pair, num_images))
    rest = budget - chunk * of_pair - loading
    home = _home(workload, rest, memory_budget)
    if home is None:
        written = 2 * workload.bytes_of_distances  # tile² * written + tile * 2 * of_image = rest
        tile = int((math.sqrt(of_image**2 + written * rest) - of_image) / written)
    else:
        rest -= num_images**2 * workload.bytes_of_distances if home == workload.like.device else 0
        tile = num_images if num_images * of_image <= rest else rest // (2 * of_image)
    sorted_at_once = rest // workload.bytes_of_sorting
    return Plan(min(max(1, tile), num_images), chunk, min(max(1, sorted_at_once), num_images), home)


def _home(workload: Workload, rest: int, memory_budget: float | None) -> torch.device | None:
    """Return where all distances take at most half of the memory."""
    distances = workload.shape[0] ** 2 * workload.bytes_of_distances
    device, host = workload.like.device, torch.device("cpu")
    if distances <= min(rest // 2, rest - 2 * workload.bytes_of_image):
        return device
    on_host = device.type != "cpu" and distances <= budget_in_bytes(memory_budget, host) // 2
    return host if on_host else None


def average_distances(
    workload: Workload,
    load: Callable[[int, int], Tile],
    start: int,
    stop: int,
    memory_budget: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Compare all images, and average each patch's ascending distances from ``start`` up to, not including, ``stop``.

    Args:
        workload: The images.
        load: Makes a tile of those from the first index up to, not including, the second.
        start: First of the sorted distances.
        stop: End of the sorted distances.
        memory_budget: GiB on the device and on the host each, by default half of what is free.
        progress: Called with the number of pairs just compared, each counted once a degree.

    Returns:
        The average over the degrees too, shape ``(N, L)``.
    """
    plan = make_plan(workload, memory_budget)
    num_images, num_patches, _ = workload.shape
    shape = (len(workload.degrees), num_images, num_images, num_patches)
    if plan.home is None:
        distances = file_tensor(shape, workload.like.dtype)
    else:
        distances = workload.like.new_empty(shape, device=plan.home)
    _compare_all(workload.comparison, load, plan, distances, progress)
    averages = workload.like.new_zeros(num_images, num_patches)
    for first in range(0, num_images, plan.sorted_at_once):
        images = slice(first, first + plan.sorted_at_once)
        for of_degree in distances:
            smallest = of_degree[images].to(averages.device).topk(stop, dim=1, largest=False).values
            averages[images] += smallest[:, start:].mean(dim=1)
        release(distances)
    trim()
    return averages / len(distances)


def _compare_all(
    comparison: Comparison,
    load: Callable[[int, int], Tile],
    plan: Plan,
    distances: torch.Tensor,
    progress: Callable[[int], object] | None,
) -> None:
    """Write to ``distances[d, i, j, p]`` the distance from patch p of image i to image j; infinite where i = j."""
    num_images = distances.shape[1]
    tiles = [slice(first, min(first + plan.tile, num_images)) for first in range(0, num_images, plan.tile)]
    for index, rows in enumerate(tiles):
        left = load(rows.start, rows.stop)
        for columns in tiles[index:]:
            right = left if columns == rows else load(columns.start, columns.stop)
            targets = distances[:, rows, columns], distances[:, columns, rows]
            blocks = targets
            if plan.home is None:  # written in long runs: single lines would be slow on a disk
                blocks = torch.empty_like(targets[0]), torch.empty_like(targets[1])
            if right is left:
                blocks = blocks[0], blocks[0]
                blocks[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
            for image, images, to_right, to_left in compare_tiles(left, right, comparison, plan.chunk):
                blocks[0][:, image, images] = to_right
                blocks[1][:, images, image] = to_left
                if progress is not None:
                    progress(to_right.shape[0] * to_right.shape[1])
            if plan.home is None:
                for target, block in zip(targets, blocks, strict=True):
                    for line in range(target.shape[1]):
                        target[:, line] = block[:, line]
                        release(distances)
            del right, targets, blocks
            trim()
