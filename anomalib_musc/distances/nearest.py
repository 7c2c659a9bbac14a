# SPDX-License-Identifier: Apache-2.0
"""The distance of every patch to the nearest patch of every other image; see :func:`nearest_distances`."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from anomalib_musc.distances.comparison import compare_tiles
from anomalib_musc.distances.full_precision import full_precision
from anomalib_musc.distances.kernels import Precision, check_precision, make_batched_kernels, make_kernels
from anomalib_musc.distances.loading import PoolLoader
from anomalib_musc.distances.plan import Plan, Workload, bytes_to_hold, make_plan, make_workloads
from anomalib_musc.distances.processes import Processes
from anomalib_musc.distances.ring import Compare, Ring
from anomalib_musc.distances.same_place import compare_places, make_places
from anomalib_musc.distances.storage import GIB, budget_in_bytes, check_budget, file_tensor, release, trim, write_lines
from anomalib_musc.distances.tiles import CancellingWindowsError, Tile
from anomalib_musc.distances.trial import seconds_of_pair

Block = tuple[slice, torch.Tensor]
Progress = Callable[[int], object]


def nearest_distances(
    features: torch.Tensor,
    degrees: Sequence[int] | None = None,
    *,
    search_radius: int | None = None,
    images: Sequence[int] | None = None,
    prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    precision: Precision = "exact",
    memory_budget: float | None = None,
    device: torch.device | str | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Iterator[Block]:
    r"""Compare the patches of all images, and yield each one's distance to the nearest patch of every other image.

    .. math:: d_{ipj} = \min_q \lVert x_{ip} - x_{jq} \rVert_2, \qquad d_{ipi} = \infty

    Patches :math:`x` are compared as they are. Of maps, each patch is first added to its neighbours in a square
    window, with zeros around the map, and the sum scaled to unit length; several window sizes share one product:

    .. math:: \hat f_p \cdot \hat g_q = \sum_{u \in \mathcal{N}(p)} \sum_{v \in \mathcal{N}(q)} f_u \cdot g_v, \qquad
              x_p = \hat f_p / \lVert \hat f_p \rVert_2

    Every unordered pair of images is multiplied once: the largest entries of the product's rows give the distances of
    one image's patches, those of its columns the other's. Arguments are checked at once; the work begins when the first
    block is asked for, and all images have been compared when it comes. Gradients are not followed.

    Args:
        features: Patches of N images, shape ``(N, L, C)``; or maps, shape ``(N, C, H, W)``, with L = H * W. They may
            lie on the host, in a memory-mapped file too, while another device computes.
        degrees: For maps, the D window sizes, odd numbers. ``None`` for patches, with D = 1.
        search_radius: For maps, within how many rows and columns of its own place a patch is sought in the other
            images. Defaults to the whole image.
        images: Indices of the images that are compared, which are then counted from 0. Defaults to all.
        prepare: Changes the features of some images, shape ``(n, ...)``, each by itself, once, or each time that they
            are loaded to the device where memory is short; it keeps their shape. So a pool that fits no memory is
            prepared while it is compared.
        precision: ``"exact"``: within 1e-4 of float64 for unit vectors; for others within 1e-4 of the longest
            difference between a patch and the mean patch, whatever offset all patches share. ``"fast"``: products of
            8-bit integers or 16-bit numbers where a short trial shows that the processor multiplies them faster, of
            16-bit numbers on CUDA with Triton; elsewhere as ``"exact"``.
        memory_budget: GiB that may be taken, beside ``features``, on the device and on the host, and for sorting a
            block. What does not fit goes to temporary files; no distance depends on it. Defaults to half of what is
            free.
        device: Where to compute. Defaults to where ``features`` are.
        processes: Those that hold the other images of the pool, each its share, none of them too; features have the
            same shape but for their number, and every process calls this with the same other arguments. What is wrong
            with the features or the budget of one is raised in all. Defaults to none: all images are here.
        progress: Called with the number of image pairs just compared, each counted once a degree.

    Yields:
        A slice of n images, and their distances, shape ``(D, n, N, L)``: entry ``[d, i, j, p]`` is that of patch p of
        image i of the slice to image j; infinite where that is the image itself. float64 for float64 features, else
        float32, on ``device``. Slices ascend and cover all images once, with all degrees; or, where a trial shows that
        to be faster, once for each degree in turn, with D = 1. Of several processes each gets the slices of its own
        images, with distances to the N images of all, by rank; all of them have to be asked for.

    Raises:
        ValueError: If there are fewer than two images, a feature is not finite or above 1e15 (float32), so that its
            square could overflow, or an argument is out of range. All features are looked at before any is compared.
        MemoryBudgetError: A ValueError, if the budget does not suffice to compare two images.
        OSError: If there is no room for temporary files.

    Example:
        >>> import torch
        >>> points = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [3.0, 4.0]]])  # 2 images, 2 patches each
        >>> for images, distances in nearest_distances(points):
        ...     print(images, distances[0, :, :, 0].round(decimals=3))  # of the first patch of each image
        slice(0, 2, None) tensor([[inf, 1.],
                [1., inf]])
        >>> blocks = nearest_distances(torch.randn(4, 8, 5, 6), degrees=(1, 3))
        >>> sum(len(distances) for images, distances in blocks)  # of both degrees, in one block or in two
        2
    """
    _check_features(features, degrees)
    pool = range(len(features)) if images is None else images
    if len(set(pool)) < len(pool) or not set(pool) <= set(range(len(features))):
        msg = f"images must be different indices from 0 to {len(features) - 1}, got {list(pool)[:10]}."
        raise ValueError(msg)
    ring = None if processes is None or processes.size == 1 else Ring(processes, len(pool))
    num_images = len(pool) if ring is None else sum(ring.shares.sizes)
    if num_images < 2:
        msg = f"features must hold at least 2 images to compare, got {num_images}."
        raise ValueError(msg)
    check_precision(precision)
    check_budget(memory_budget)
    like = _like(features.dtype, features.device if device is None else torch.device(device))
    num_patches, channels = (
        features.shape[1:] if degrees is None else (math.prod(features.shape[2:]), features.shape[1])
    )
    check_search_radius(search_radius)
    if search_radius is not None and degrees is None:
        msg = (
            f"search_radius={search_radius} needs maps (N, C, H, W) with degrees, as patches (N, L, C) have no places."
        )
        raise ValueError(msg)
    places = None if degrees is None else make_places((features.shape[2], features.shape[3]), search_radius)
    with full_precision(like.device):
        workloads = make_workloads(
            (len(pool), num_patches, channels), degrees or (1,), precision, like, places, num_images
        )
    if ring is not None:
        kernels = make_kernels(precision, like) if places is None else make_batched_kernels(precision, like)
        workloads = ring.agreed_workloads(workloads, kernels)
    workloads = [workload.on_budget(budget_in_bytes(memory_budget, like.device)) for workload in workloads]
    return surveyed_blocks(PoolLoader(features.detach(), pool, prepare), workloads, memory_budget, progress, ring)


def least_memory(
    shape: Sequence[int],
    degrees: Sequence[int],
    precision: Precision,
    device: torch.device,
    search_radius: int | None = None,
) -> int:
    """Return the bytes without which :func:`nearest_distances` cannot compare float32 maps.

    Args:
        shape: That of the maps, ``(N, C, H, W)``.
        degrees: The window sizes.
        precision: "exact" or "fast".
        device: Where to compute.
        search_radius: How far from its own place a patch is sought.
    """
    num_images, channels, height, width = shape
    like, places = _like(torch.float32, device), make_places((height, width), search_radius)
    workloads = make_workloads((num_images, height * width, channels), degrees, precision, like, places)
    return max(workload.least_bytes for workload in workloads)


def estimate_seconds(shape: Sequence[int], degrees: Sequence[int], precision: Precision, device: torch.device) -> float:
    """Estimate how long :func:`nearest_distances` takes for two images, by a short trial.

    Args:
        shape: That of a float32 map, ``(C, H, W)``.
        degrees: The window sizes.
        precision: "exact" or "fast".
        device: Where to compute.
    """
    channels, height, width = shape
    return seconds_of_pair(precision, height * width, channels, degrees, _like(torch.float32, device))


def check_degrees(degrees: Sequence[int], name: str = "degrees") -> None:
    """Raise a ValueError that calls the argument ``name`` unless it is a non-empty sequence of positive odd numbers."""
    is_list = isinstance(degrees, Sequence) and len(degrees) > 0
    if not is_list or not all(isinstance(degree, int) and degree >= 1 and degree % 2 == 1 for degree in degrees):
        msg = f"{name} must be a non-empty sequence of positive odd numbers, got {degrees!r}."
        raise ValueError(msg)


def check_search_radius(search_radius: int | None) -> None:
    """Raise a ValueError unless ``search_radius`` is a whole number, not negative, or ``None``."""
    is_number = isinstance(search_radius, int) and not isinstance(search_radius, bool)
    if search_radius is not None and not (is_number and search_radius >= 0):
        msg = f"search_radius must be a whole number of at least 0, or None for the whole image, got {search_radius!r}."
        raise ValueError(msg)


def _check_features(features: torch.Tensor, degrees: Sequence[int] | None) -> None:
    if degrees is not None:
        check_degrees(degrees)
    letters = "NLC" if degrees is None else "NCHW"
    if features.ndim != len(letters) or 0 in features.shape[1:]:
        other = "maps (N, C, H, W) with degrees" if degrees is None else "patches (N, L, C) without degrees"
        shape = ", ".join(letters)
        msg = f"features must have shape ({shape}), none but N of them 0, got {tuple(features.shape)}; or give {other}."
        raise ValueError(msg)


def _like(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.promote_types(dtype, torch.float32), device=device)


def surveyed_blocks(
    pool: PoolLoader,
    workloads: Sequence[Workload],
    memory_budget: float | None,
    progress: Progress | None,
    ring: Ring | None = None,
) -> Iterator[Block]:
    """Look at all images, prepare those that several workloads share where memory allows, and compare them."""
    if ring is not None:
        yield from compared(ring.surveyed(pool), workloads, memory_budget, progress, ring)
        return
    pool, like = pool.surveyed(), workloads[0].like
    tile_bytes = bytes_to_hold(workloads, memory_budget)
    if tile_bytes is not None:
        with full_precision(like.device):
            pool = pool.held(workloads[0], tile_bytes)
        memory_budget = None if memory_budget is None else memory_budget - 2 * tile_bytes / GIB
    yield from compared(pool, workloads, memory_budget, progress)


def compared(
    pool: PoolLoader,
    workloads: Sequence[Workload],
    memory_budget: float | None,
    progress: Progress | None,
    ring: Ring | None = None,
) -> Iterator[Block]:
    """Compare the images of a surveyed pool, one workload after the other; see :func:`nearest_distances`."""
    for workload in workloads:
        try:
            yield from _blocks(pool, workload, memory_budget, progress, ring)
        except CancellingWindowsError:  # rare; before any block, and before any comparison where one tile holds all
            yield from compared(pool, workload.separate(), memory_budget, progress, ring)


def _blocks(
    pool: PoolLoader, workload: Workload, memory_budget: float | None, progress: Progress | None, ring: Ring | None
) -> Iterator[Block]:
    """Compare all images, then yield the distances in blocks; see :func:`nearest_distances`."""
    num_images, num_patches, _ = workload.shape
    plan = make_plan(workload, memory_budget) if ring is None else ring.make_plan(workload, memory_budget)
    shape = (len(workload.degrees), num_images, workload.num_columns, num_patches)

    def allocate() -> torch.Tensor:
        if plan.device is None:
            return file_tensor(shape, workload.like.dtype)
        return workload.like.new_empty(shape, device=plan.device)

    distances = allocate() if ring is None else ring.processes.together(allocate)
    compare = partial(_compare_pair, workload, plan, distances, progress)
    with full_precision(workload.like.device):
        if ring is None:
            _compare_own(pool.centred(workload), workload, plan, distances, compare)
        else:
            agreed = ring.agree(pool, workload)
            own = distances[:, :, ring.own_columns]
            ring.processes.together(partial(_compare_own, agreed, workload, plan, own, compare))
            ring.compare_visitors(agreed, workload, plan, distances, compare)
    is_part = plan.device is None or plan.block < num_images  # who keeps a part must not keep all distances
    for first in range(0, num_images, plan.block):
        images = slice(first, min(first + plan.block, num_images))
        block = distances[:, images].to(workload.like.device, copy=is_part)
        release(distances)
        yield images, block
    trim()


def _compare_own(pool: PoolLoader, workload: Workload, plan: Plan, distances: torch.Tensor, compare: Compare) -> None:
    """Write to ``distances[d, i, j, p]`` the distance from patch p of image i to image j; infinite where i = j."""
    num_images = distances.shape[1]
    tiles = [slice(first, min(first + plan.tile, num_images)) for first in range(0, num_images, plan.tile)]
    for index, rows in enumerate(tiles):
        left = pool.tile(workload, rows.start, rows.stop)
        for columns in tiles[index:]:
            right = left if columns == rows else pool.tile(workload, columns.start, columns.stop)
            compare(left, right, (distances[:, rows, columns], distances[:, columns, rows]))
            del right
            trim()


def _compare_pair(
    workload: Workload,
    plan: Plan,
    distances: torch.Tensor,
    progress: Progress | None,
    left: Tile,
    right: Tile,
    targets: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Compare two tiles, and write the distances to two targets, parts of the buffer of all or not."""
    blocks, device, is_same = targets, workload.like.device, right is left
    if plan.device != device:  # written in long runs: single lines would be slow on a disk
        forward = torch.empty_like(targets[0], device=device)
        blocks = forward, forward if is_same else torch.empty_like(targets[1], device=device)
    if workload.places is None:
        compare_tiles(left, right, workload.kernel, plan.chunk, plan.apart, blocks, progress)
    else:
        norm_channels = workload.kernel.rounding.norm_channels
        compare_places(left, right, workload.places, norm_channels, plan.apart, blocks, progress)
    if plan.device != device:
        write_lines(distances, targets[0], blocks[0])
        if not is_same:
            write_lines(distances, targets[1], blocks[1])
