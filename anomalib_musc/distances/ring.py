# SPDX-License-Identifier: Apache-2.0
"""Images that several processes hold: each process's visit the others, and every pair is compared once."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.loading import PoolLoader
from anomalib_musc.distances.plan import Plan, Workload, make_plan
from anomalib_musc.distances.processes import Processes, Transfer
from anomalib_musc.distances.storage import trim, write_lines
from anomalib_musc.distances.tiles import CancellingWindowsError, Tile

# Compares two tiles, and writes the distances of both directions to two targets.
Compare = Callable[[Tile, Tile, tuple[torch.Tensor, torch.Tensor]], None]


@dataclass(frozen=True)
class Shares:
    """Which images meet in which step.

    In step s the images of process k visit process k + s, so that after half a round every two processes have met.
    Those that face each other in an even round meet twice: each of them then compares half of the pairs.

    Attributes:
        sizes: How many images each process holds.
        rank: That of this process.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def steps(self) -> range:
        """The steps after the first, in which each process compares its own images."""
        return range(1, len(self.sizes) // 2 + 1)

    def first_column(self, rank: int) -> int:
        """Return where the images of a process begin among all."""
        return sum(self.sizes[:rank])

    def visiting(self, rank: int, step: int) -> range:
        """Return which images of a process visit another one."""
        return range(self._middle(rank) if self._is_halved(rank, step) else 0, self.sizes[rank])

    def visited(self, rank: int, step: int) -> range:
        """Return which images of a process its visitors are compared with."""
        return range(self._middle(rank) if self._is_halved(rank, step) else self.sizes[rank])

    def num_pairs(self) -> int:
        """Return how many pairs of images this process compares."""
        own = self.sizes[self.rank] * (self.sizes[self.rank] - 1) // 2
        sources = ((self.rank - step) % len(self.sizes) for step in self.steps)
        visits = (
            len(self.visited(self.rank, step)) * len(self.visiting(source, step))
            for step, source in zip(self.steps, sources, strict=True)
        )
        return own + sum(visits)

    def _is_halved(self, rank: int, step: int) -> bool:
        return 2 * step == len(self.sizes) and rank < step

    def _middle(self, rank: int) -> int:
        return (self.sizes[rank] + 1) // 2


class Ring:
    """All processes, and the images that each of them holds.

    Args:
        processes: All of them.
        num_images: How many images this one holds.
    """

    def __init__(self, processes: Processes, num_images: int) -> None:
        self.processes = processes
        self.shares = Shares(tuple(processes.gather(num_images)), processes.rank)

    @property
    def own_columns(self) -> slice:
        """Where the images of this process are among all."""
        first = self.shares.first_column(self.processes.rank)
        return slice(first, first + self.shares.sizes[self.processes.rank])

    def make_plan(self, workload: Workload, memory_budget: float | None) -> Plan:
        """Divide each process's budget, see :func:`.make_plan`; as many images travel as the smallest allows."""
        plan = self.processes.together(lambda: make_plan(workload, memory_budget))
        has_images = self.shares.sizes[self.processes.rank] > 0
        own = min(plan.chunk, plan.tile) if has_images else None
        return replace(plan, chunk=min(chunk for chunk in self.processes.gather(own) if chunk is not None))

    def surveyed(self, pool: PoolLoader) -> PoolLoader:
        """Look at all features, see :meth:`.PoolLoader.surveyed`; an error in one process is raised in all."""
        return self.processes.together(lambda: pool.surveyed(self.processes))

    def agreed_workloads(self, workloads: Sequence[Workload], kernels: Sequence[Kernel]) -> list[Workload]:
        """Return workloads with the first process's kernel, or the first that all have, shared where all share it.

        Args:
            workloads: As a trial in this process has chosen.
            kernels: Those that this process has.
        """
        names = [kernel.name for kernel in kernels]
        offers = self.processes.gather((workloads[0].kernel.name, names, len(workloads) == 1))
        common = [name for name in offers[0][1] if all(name in others for _, others, _ in offers)]
        chosen = offers[0][0] if offers[0][0] in common else common[0]
        kernel = kernels[names.index(chosen)]
        is_shared = all(shared for _, _, shared in offers)
        return [
            replace(part, kernel=kernel)
            for workload in workloads
            for part in ([workload] if is_shared and kernel.can_share else workload.separate())
        ]

    def agree(self, pool: PoolLoader, workload: Workload) -> PoolLoader:
        """Return a loader that prepares images as those of the other processes do.

        Raises:
            ValueError: If a feature is not finite once prepared, in any process.
            CancellingWindowsError: If the windows of an image of any process cancel, see :func:`.tile_of_maps`.
        """
        agreed = self.processes.together(lambda: pool.centred(workload, self.processes))
        if any(self.processes.gather(self.processes.together(lambda: _cancels(agreed, workload)))):
            raise CancellingWindowsError
        return agreed

    def compare_visitors(
        self, pool: PoolLoader, workload: Workload, plan: Plan, distances: torch.Tensor, compare: Compare
    ) -> None:
        """Compare this process's images with those of the others, while the next ones travel.

        Args:
            pool: The images of this process.
            workload: What is compared.
            plan: How many are held and travel at once.
            distances: Where the distances go, ``(D, n, N, L)``.
            compare: Compares two tiles.
        """
        for step in self.shares.steps:
            _Step(self, pool, workload, plan, distances, compare, step).run()


def _cancels(pool: PoolLoader, workload: Workload) -> bool:
    """Whether the windows of an image cancel: found before images travel, as no process can go on alone."""
    try:
        for index in range(len(pool.images)):
            pool.tile(workload, index, index + 1)
    except CancellingWindowsError:
        return True
    return False


class _Step:
    """One step of the ring, see :meth:`Ring.compare_visitors`."""

    def __init__(
        self,
        ring: Ring,
        pool: PoolLoader,
        workload: Workload,
        plan: Plan,
        distances: torch.Tensor,
        compare: Compare,
        step: int,
    ) -> None:
        self._pool, self._workload, self._distances, self._compare = pool, workload, distances, compare
        self._processes, self._tile = ring.processes, plan.tile
        self._shares = shares = ring.shares
        self._source, self._target = ((shares.rank + move) % ring.processes.size for move in (-step, step))
        rounds = max(math.ceil(len(shares.visiting(rank, step)) / plan.chunk) for rank in range(ring.processes.size))
        self._going = _spread(_parts(shares.visiting(shares.rank, step), plan.chunk), rounds)
        self._coming = _spread(_parts(shares.visiting(self._source, step), plan.chunk), rounds)
        self._visited = shares.visited(shares.rank, step)
        self._visited_there = shares.visited(self._target, step)

    def run(self) -> None:
        """Compare all visitors, and send their distances home."""
        own_tiles = list(self._own_tiles()) if len(self._visited) <= self._tile else None
        travelling, returning = self._travel(0), None
        for index in range(len(self._going)):
            visitors = travelling.wait()
            travelling = self._travel(index + 1)  # while these are compared
            compare = partial(self._compare_with, own_tiles or self._own_tiles(), visitors, self._coming[index])
            backward = self._processes.together(compare)  # all wait for each other: what fails here is told there
            before, returning = returning, self._send_home(backward, index)
            self._write(before, index - 1)  # which has come meanwhile
            del compare, visitors, backward, before
            trim()
        self._write(returning, len(self._going) - 1)

    def _travel(self, index: int) -> Transfer:
        """Begin to send a part of this process's images, and to receive a part of another's."""
        features, images = self._pool.features, self._pool.images
        is_over = index == len(self._going)
        going, coming = (range(0), range(0)) if is_over else (self._going[index], self._coming[index])
        sent = features[[images[image] for image in going]] if len(going) and self._visited_there else None
        shape = (len(coming), *features.shape[1:]) if len(coming) and self._visited else None
        return self._processes.exchange(sent, self._target, shape, self._source, like=features)

    def _own_tiles(self) -> Iterator[tuple[range, Tile]]:
        for part in _parts(self._visited, self._tile):
            yield part, self._pool.tile(self._workload, part.start, part.stop)

    def _compare_with(
        self,
        own_tiles: Iterable[tuple[range, Tile]],
        visitors: torch.Tensor | None,
        part: range,
    ) -> torch.Tensor | None:
        """Compare visitors with this process's images, and return the distances of their patches, ``(D, m, n, L)``."""
        if visitors is None:
            return None
        loader = replace(self._pool, features=visitors, images=range(len(visitors)))
        tile = loader.tile(self._workload, 0, len(visitors))
        num_degrees, num_patches = self._distances.shape[0], self._distances.shape[3]
        first = self._shares.first_column(self._source)
        columns = slice(first + part.start, first + part.stop)
        backward = tile.half_norms.new_empty(num_degrees, len(visitors), len(self._visited), num_patches)
        for rows, own in own_tiles:
            targets = self._distances[:, rows.start : rows.stop, columns], backward[:, :, rows.start : rows.stop]
            self._compare(own, tile, targets)
        return backward

    def _send_home(self, backward: torch.Tensor | None, index: int) -> Transfer:
        """Begin to send visitors' distances home, and to receive those of this process's images."""
        going = self._going[index]
        num_degrees, num_patches = self._distances.shape[0], self._distances.shape[3]
        shape = (num_degrees, len(going), len(self._visited_there), num_patches)
        return self._processes.exchange(backward, self._source, shape, self._target, self._workload.like)

    def _write(self, returning: Transfer | None, index: int) -> None:
        """Write the distances of a part of this process's images, once they have come back."""
        returned = None if returning is None else returning.wait()
        if returned is None or not returned.numel():
            return
        going, first = self._going[index], self._shares.first_column(self._target)
        columns = slice(first + self._visited_there.start, first + self._visited_there.stop)
        write_lines(self._distances, self._distances[:, going.start : going.stop, columns], returned)


def _parts(images: range, size: int) -> list[range]:
    """Cut a range into parts of a size."""
    return [images[first : first + size] for first in range(0, len(images), size)]


def _spread(parts: list[range], rounds: int) -> list[range]:
    """Spread parts evenly over rounds; those between have none."""
    places = {number * rounds // len(parts): part for number, part in enumerate(parts)}
    return [places.get(index, range(0)) for index in range(rounds)]
