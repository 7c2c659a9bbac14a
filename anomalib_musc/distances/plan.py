# SPDX-License-Identifier: Apache-2.0
"""How a budget of memory is divided: what is held where, and how much of it at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from anomalib_musc.distances.kernels import Kernel, Precision
from anomalib_musc.distances.same_place import Places
from anomalib_musc.distances.storage import BUSY_NUMBERS, MemoryBudgetError, budget_in_bytes
from anomalib_musc.distances.trial import fastest, fastest_by_place

# Working memory of sorting a block of distances, in its own size: the distances, a copy, values and indices on a GPU.
_SORTING = 5
# A block of distances that is yielded takes no more than this, nor than this share of the budget.
_BLOCK_BYTES, _BLOCK_SHARE = 2**23, 1 / 64
_APART = 64  # that part of the memory may be spared for same places, beside that of loading images
_LOADING = 16  # that part of the memory may be spared for the images that are loaded together
_HELD_SHARE = 1 / 4  # of the memory, for what is used again at every degree
# What the libraries of each thread pack their operands into; no more of a small budget than this share.
_THREAD_BYTES, _THREAD_SHARE = 3 * 2**20, 1 / 8


@dataclass(frozen=True)
class Workload:
    """Images that are to be compared with each other.

    Attributes:
        shape: Images N, patches L and channels C.
        degrees: The D degrees that are compared together.
        like: A tensor of the device and type of the comparison.
        kernel: Compares the images of two tiles.
        num_columns: Images that each is compared with, itself included: N, or more where other processes hold some.
        places: Where a patch is sought; ``None`` for the whole image.
        loaded_at_once: Images that are loaded together: on the host as many as threads, on a GPU as keep it busy,
            where memory allows.
    """

    shape: tuple[int, int, int]
    degrees: tuple[int, ...]
    like: torch.Tensor
    kernel: Kernel
    num_columns: int
    places: Places | None = None
    loaded_at_once: int = 1

    def on_budget(self, budget: int) -> "Workload":
        """Load as many images together as keep threads or a GPU busy and leave most of a budget of bytes."""
        num_images, num_patches, channels = self.shape
        is_on_host = self.like.device.type == "cpu"
        most = torch.get_num_threads() if is_on_host else BUSY_NUMBERS // (num_patches * channels)
        spared = min(budget // _LOADING, budget - self.least_bytes) // self.loading_bytes
        return replace(self, loaded_at_once=max(1, min(1 + spared, num_images, most)))

    def separate(self) -> "list[Workload]":
        """Return a workload for each degree."""
        return [replace(self, degrees=(degree,)) for degree in self.degrees]

    @property
    def image_bytes(self) -> int:
        """Memory of an image in a tile."""
        _, num_patches, channels = self.shape
        rounding = self.kernel.rounding
        numbers = num_patches * (channels + rounding.norm_channels + 5 * len(self.degrees))
        if self.places is not None:
            numbers += self.places.window_patches * (channels + rounding.norm_channels)
        rounded = num_patches * (channels + -channels % rounding.channel_multiple)
        return numbers * self.like.itemsize + rounded * rounding.number_bytes

    @property
    def loading_bytes(self) -> int:
        """Working memory of loading images."""
        return 4 * self.loaded_at_once * self.shape[1] * self.shape[2] * self.like.itemsize

    @property
    def pair_bytes(self) -> int:
        """Working memory of comparing two images."""
        if self.places is not None:
            return self.places.pair_numbers * self.like.itemsize
        return self.kernel.pair_bytes(self.shape[1], is_shared=len(self.degrees) > 1)

    @property
    def distances_bytes(self) -> int:
        """Memory of the distances of the patches of one image to another."""
        return len(self.degrees) * self.shape[1] * self.like.itemsize

    @property
    def row_bytes(self) -> int:
        """Memory of the distances of the patches of one image to all."""
        return self.num_columns * self.distances_bytes

    @property
    def travelling_bytes(self) -> int:
        """Memory of an image on its way to another process, of one that comes, and of the distances of both."""
        if self.num_columns == self.shape[0]:
            return 0
        features = self.shape[1] * self.shape[2] * self.like.itemsize
        return 4 * features + 4 * max(1, self.shape[0]) * self.distances_bytes

    @property
    def sorting_bytes(self) -> int:
        """Working memory of sorting the distances of one image."""
        return _SORTING * self.row_bytes

    @property
    def tile_bytes(self) -> int:
        """What the smallest tiles take: an image on each side, their distances, or those of one image to sort."""
        comparing = 2 * self.image_bytes + 2 * self.distances_bytes + self.row_bytes
        return max(comparing, self.sorting_bytes)

    @property
    def least_bytes(self) -> int:
        """Memory without which no two images can be compared."""
        return self.pair_bytes + self.travelling_bytes + self.loading_bytes + self.tile_bytes


def make_workloads(
    shape: tuple[int, int, int],
    degrees: Sequence[int],
    precision: Precision,
    like: torch.Tensor,
    places: Places | None = None,
    num_columns: int | None = None,
) -> list[Workload]:
    """Compare all degrees together where that is less work, else one after the other.

    Args:
        shape: Images N, patches L and channels C.
        degrees: Their degrees.
        precision: "exact" or "fast".
        like: A tensor of the device and type of the comparison.
        places: Where a patch is sought; ``None`` for the whole image.
        num_columns: Images that each is compared with, itself included. Defaults to N.
    """
    columns = shape[0] if num_columns is None else num_columns
    if places is not None:
        kernel = fastest_by_place(precision, columns, places, shape[2], like)
        return [Workload(shape, (degree,), like, kernel, columns, places) for degree in degrees]
    kernel, is_shared = fastest(precision, *shape[1:], degrees, like)
    if is_shared:
        return [Workload(shape, tuple(degrees), like, kernel, columns)]
    return [Workload(shape, (degree,), like, kernel, columns) for degree in degrees]


def bytes_to_hold(workloads: Sequence[Workload], memory_budget: float | None) -> int | None:
    """Return what a tile of all images takes, if they can be held, prepared, for all workloads, and the tile as well.

    ``None`` where there is a single workload, or no room for both.
    """
    budget = budget_in_bytes(memory_budget, workloads[0].like.device)
    tile_bytes = workloads[0].shape[0] * max(workload.image_bytes for workload in workloads)
    room = min(_HELD_SHARE * budget, budget - max(workload.least_bytes for workload in workloads))
    return tile_bytes if len(workloads) > 1 and 2 * tile_bytes <= room else None


@dataclass(frozen=True)
class Plan:
    """What fits into a budget.

    Attributes:
        tile: Images that are held at once on each side.
        chunk: Pairs of images that are compared at once; of several processes, images that travel at once, too.
        apart: Bytes for what is compared apart from the products.
        block: Images whose distances are yielded at once.
        device: Where the buffer of all distances is; ``None`` for a file.
    """

    tile: int
    chunk: int
    apart: int
    block: int
    device: torch.device | None


def make_plan(workload: Workload, memory_budget: float | None) -> Plan:
    """Divide a budget of GiB, on the device and on the host each.

    Raises:
        MemoryBudgetError: If it does not suffice to compare two images.
    """
    num_images, num_patches, _ = workload.shape
    budget = budget_in_bytes(memory_budget, workload.like.device)
    if budget < workload.least_bytes:
        raise MemoryBudgetError(workload.least_bytes, budget)
    packing = min(torch.get_num_threads() * _THREAD_BYTES, int(budget * _THREAD_SHARE))
    budget = max(workload.least_bytes, budget - packing)

    pair_bytes, image_bytes = workload.pair_bytes, workload.image_bytes
    at_once = pair_bytes + workload.travelling_bytes
    spared = min(budget // 4, budget - workload.least_bytes + at_once)
    best_chunk = workload.kernel.block // num_patches**2 if workload.places is None else 1
    num_images = max(1, num_images)  # a process may hold none of them, and still takes part
    most = num_images**2 if workload.kernel.mixes_pairs else num_images
    chunk = max(1, min(best_chunk, spared // at_once, most))
    rest = budget - chunk * at_once - workload.loading_bytes
    apart = max(0, min(budget // _APART, rest - workload.tile_bytes))
    rest -= apart
    device = _buffer_device(workload, rest, memory_budget)
    if device == workload.like.device:
        rest -= num_images * workload.row_bytes
    block_bytes = int(min(budget * _BLOCK_SHARE, _BLOCK_BYTES))
    sortable = 1 + (rest - workload.tile_bytes) // workload.sorting_bytes
    block = max(1, min(block_bytes // workload.row_bytes, sortable, num_images))
    rest -= block * workload.row_bytes  # the last block of a degree is still held while the next degree is compared
    is_elsewhere = device != workload.like.device
    of_pairs = (2 * workload.distances_bytes if is_elsewhere else 0) + (0 if workload.places is None else pair_bytes)
    of_own = of_pairs if workload.places is None else of_pairs - num_patches * workload.like.itemsize  # one way
    if num_images * image_bytes + num_images**2 * of_own <= rest:
        tile = num_images
    elif of_pairs:  # tile² * of_pairs + tile * 2 * image_bytes = rest
        tile = int((math.sqrt(image_bytes**2 + of_pairs * rest) - image_bytes) / of_pairs)
    else:
        tile = rest // (2 * image_bytes)
    return Plan(min(max(1, tile), num_images), chunk, workload.loading_bytes + apart, block, device)


def _buffer_device(workload: Workload, rest: int, memory_budget: float | None) -> torch.device | None:
    """Return where all distances take at most half of the memory."""
    distances = workload.shape[0] * workload.row_bytes
    device, host = workload.like.device, torch.device("cpu")
    if distances <= min(rest // 2, rest - workload.tile_bytes):
        return device
    on_host = device.type != "cpu" and distances <= budget_in_bytes(memory_budget, host) // 2
    return host if on_host else None
