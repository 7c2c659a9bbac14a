# SPDX-License-Identifier: Apache-2.0
"""A pool in several processes: each reads its share of the images, and all learn what is found of every one."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from anomalib_musc.distances import Processes
from anomalib_musc.pool.feature_store import FeatureStore

Item = TypeVar("Item")


def interleaved(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """Return what :func:`~anomalib_musc.pool.loaders.share_of` has dealt in its order: one of each share in turn.

    Example:
        >>> interleaved(["ace", "bd"])
        ['a', 'b', 'c', 'd', 'e']
    """
    dealt = [(index, rank) for rank, share in enumerate(shares) for index in range(len(share))]
    return [shares[rank][index] for index, rank in sorted(dealt)]


def move_images(
    processes: Processes,
    layers: Sequence[torch.Tensor],
    owners: Sequence[tuple[int, int]],
    takers: Sequence[int],
    store: FeatureStore,
) -> None:
    """Bring images to the processes that will compare them with each other.

    Args:
        processes: All of them.
        layers: The maps of this process's images, one ``(n, C, h, w)`` a layer.
        owners: Of each of all images, the rank of who holds it, and its index there.
        takers: The rank of who will have it; in the order of the images.
        store: Gets those of this process.
    """
    for (owner, index), taker in zip(owners, takers, strict=True):
        if processes.rank not in (owner, taker):
            continue
        arrived = []
        for maps in layers:
            own = maps[index : index + 1] if owner == processes.rank else None
            if owner != taker:
                shape = (1, *maps.shape[1:]) if taker == processes.rank else None
                own = processes.exchange(own, taker, shape, owner, maps).wait()
            if own is not None:
                arrived.append(own.to(maps.device))
        if taker == processes.rank:
            store.append(arrived)
