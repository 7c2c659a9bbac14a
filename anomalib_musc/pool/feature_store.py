# SPDX-License-Identifier: Apache-2.0
"""The features of a pool on the host, within a budget of memory."""

import math
from collections.abc import Sequence

import torch

from anomalib_musc.distances.storage import GIB, MemoryBudgetError, budget_in_bytes, file_tensor, release

_HOST = torch.device("cpu")


class FeatureStore:
    """Feature maps that arrive batch by batch: in memory up to half of a budget, else in temporary files.

    Args:
        memory_budget: GiB for the features and for their scoring; by default half of what is free.
        first: The first batch, one map ``(B, C, h, w)`` a layer.
        num_images: How many images will come, if that is known.
        least: Bytes of the budget without which they cannot be scored.

    Raises:
        MemoryBudgetError: If the budget is less than that.
        OSError: If there is no room for temporary files.

    Attributes:
        layers: One map ``(N, C, h, w)`` a layer, of the images so far.
    """

    def __init__(
        self, memory_budget: float | None, first: Sequence[torch.Tensor], num_images: int | None, least: int
    ) -> None:
        self._budget = budget_in_bytes(memory_budget, _HOST)
        if self._budget < least:
            raise MemoryBudgetError(least, self._budget)
        self._limit = min(self._budget // 2, self._budget - least)
        self._is_on_disk = False
        self._size = 0
        self._memory: list[torch.Tensor] = []
        self._reserve(first, num_images or len(first[0]))

    @property
    def layers(self) -> list[torch.Tensor]:
        """See the class."""
        return [memory[: self._size] for memory in self._memory]

    @property
    def remaining_budget(self) -> float:
        """GiB of the budget that the features leave."""
        held = 0 if self._is_on_disk else sum(memory.nbytes for memory in self._memory)
        return (self._budget - held) / GIB

    def append(self, feature_maps: Sequence[torch.Tensor]) -> None:
        """Add a batch, one map ``(B, C, h, w)`` a layer."""
        end = self._size + len(feature_maps[0])
        if end > len(self._memory[0]):
            self._reserve(feature_maps, 2 * end)
        for memory, maps in zip(self._memory, feature_maps, strict=True):
            memory[self._size : end] = maps
            release(memory)
        self._size = end

    def _reserve(self, feature_maps: Sequence[torch.Tensor], num_images: int) -> None:
        """Make room for so many images, keeping those that are there."""
        shapes = [(num_images, *maps.shape[1:]) for maps in feature_maps]
        held = len(self._memory[0]) if self._memory else 0  # together with the new room, until all is copied
        self._is_on_disk |= sum(_bytes_of_one(maps) for maps in feature_maps) * (num_images + held) > self._limit
        allocate = file_tensor if self._is_on_disk else torch.empty
        old, self._memory = self._memory, []
        for index, shape in enumerate(shapes):
            self._memory.append(allocate(shape, dtype=torch.float32))
            if old:
                self._memory[index][: self._size] = old[index][: self._size]
                release(self._memory[index])


def _bytes_of_one(maps: torch.Tensor) -> int:
    return math.prod(maps.shape[1:]) * maps.itemsize
