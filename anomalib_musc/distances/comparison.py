# SPDX-License-Identifier: Apache-2.0
"""The images of one tile against those of another; small distances are computed again in float64."""

from collections.abc import Callable

import torch

from anomalib_musc.distances.kernels import Kernel
from anomalib_musc.distances.recomputing import recompute
from anomalib_musc.distances.static import merge_same_places
from anomalib_musc.distances.tiles import Tile


def compare_tiles(
    left: Tile,
    right: Tile,
    kernel: Kernel,
    chunk: int,
    memory: int,
    targets: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int], object] | None,
) -> None:
    """Compare every image of a tile with every image of another, or of itself; each pair once.

    Args:
        left: n images.
        right: m others, or the same.
        kernel: Compares images.
        chunk: How many pairs at once.
        memory: Bytes for what is compared apart from the products.
        targets: Where the distances go, see :meth:`.Kernel.compare`.
        progress: Likewise.
    """
    is_same = right is left
    if is_same:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    kernel.compare(left, right, chunk, targets, progress)
    for index in range(len(left.degrees)):
        if left.is_static:
            merge_same_places(left, right, index, memory, targets)
        recompute(left, right, index, memory, (targets[0][index], targets[1][index]))
    targets[0].sqrt_()
    if not is_same:
        targets[1].sqrt_()
