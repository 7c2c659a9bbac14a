# SPDX-License-Identifier: Apache-2.0
"""Sums over the square windows of maps."""

import torch
from torch.nn import functional as F  # noqa: N812

_NEAR = 2**14  # patches of windows that are looked up together: half a MB of indices
_POOLED = 5  # up to this side a window is summed at once: its patches stay in the cache
TINY_NORM = 1e-12  # as in torch.nn.functional.normalize


def write_unit_vectors(patches: torch.Tensor, degree: int, origin: torch.Tensor | None, target: torch.Tensor) -> None:
    """Write the window sums of patches, scaled to unit length, less an origin.

    Args:
        patches: Maps ``(n, H, W, C)``.
        degree: Side of the window.
        origin: Shape ``(C,)``.
        target: Where to write, ``(n, H * W, C)``.
    """
    sums = window_sums(patches, degree)
    scales = reciprocal_norms(sums, degree)
    if origin is None:
        torch.mul(sums, scales, out=target)
    else:
        torch.addcmul(-origin, sums, scales, out=target)


def reciprocal_norms(sums: torch.Tensor, degree: int) -> torch.Tensor:
    """Return what scales the sums of windows ``(..., C)`` to unit length, ``(..., 1)``."""
    norms = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    if not norms.isfinite().all():  # squares of large sums overflow
        norms = torch.linalg.vector_norm(sums / degree**2, dim=-1, keepdim=True) * degree**2
    return norms.clamp_min_(TINY_NORM * degree**2).reciprocal_()


def window_sums(patches: torch.Tensor, degree: int) -> torch.Tensor:
    """Sum patches ``(..., H, W, C)`` over windows of side ``degree``; returns ``(..., H * W, C)``."""
    if degree == 1:
        return patches.flatten(-3, -2)
    maps = patches.reshape(-1, *patches.shape[-3:]).permute(0, 3, 1, 2)  # in memory channels are last
    for window in [(degree, degree)] if degree <= _POOLED else [(degree, 1), (1, degree)]:
        maps = F.avg_pool2d(maps, window, 1, (window[0] // 2, window[1] // 2), divisor_override=1)
    return maps.permute(0, 2, 3, 1).reshape(*patches.shape[:-3], -1, patches.shape[-1])


def window_sums_at(
    patches: torch.Tensor, degree: int, images: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum patches over the windows of some places.

    Args:
        patches: Maps ``(n, H, W, C)``, contiguous.
        degree: Side of the window.
        images: Which maps, ``(k,)``.
        places: Positions in them, ``(k,)``.

    Returns:
        The sums ``(k, C)``, and how many patches each has, ``(k, 1)``.
    """
    parts = zip(*(index.split(max(1, _NEAR // degree**2)) for index in (images, places)), strict=True)
    sums, counts = zip(*(_sums_at(patches, degree, *some) for some in parts), strict=True)
    return torch.cat(sums), torch.cat(counts)


def _sums_at(
    patches: torch.Tensor, degree: int, images: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    height, width, channels = patches.shape[1:]
    shifts = torch.arange(degree, device=patches.device) - degree // 2
    rows, columns = (places // width)[:, None] + shifts, (places % width)[:, None] + shifts  # (k, degree)
    is_inside = ((rows >= 0) & (rows < height))[..., None] & ((columns >= 0) & (columns < width))[:, None]
    near = ((rows * width)[..., None] + columns[:, None]) * is_inside  # (k, degree, degree)
    near, is_there = (near + (images * height * width)[:, None, None]).flatten(1), is_inside.flatten(1).to(patches)
    sums = F.embedding_bag(near, patches.view(-1, channels), mode="sum", per_sample_weights=is_there)
    return sums, is_there.sum(dim=1, keepdim=True)


def window_sum(values: torch.Tensor, dim: int, radius: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum ``2 * radius + 1`` neighbours along a dimension by shifted additions; places outside count as zeros.

    Args:
        values: Any shape.
        dim: Along which.
        radius: Number of neighbours on each side; at least 1 where ``out`` is given.
        out: Where to put the sums.
    """
    if radius == 0 and out is None:
        return values
    size = values.shape[dim]
    if out is None or size == 1:
        total, first = values.clone() if out is None else out.copy_(values), 1
    else:  # the first sum takes the place of a copy
        total, first = out, 2
        later, earlier = values.narrow(dim, 1, size - 1), values.narrow(dim, 0, size - 1)
        torch.add(later, earlier, out=total.narrow(dim, 1, size - 1))
        total.select(dim, 0).copy_(values.select(dim, 0))
        total.narrow(dim, 0, size - 1).add_(later)
    for shift in range(first, min(radius, size - 1) + 1):
        total.narrow(dim, shift, size - shift).add_(values.narrow(dim, 0, size - shift))
        total.narrow(dim, 0, size - shift).add_(values.narrow(dim, shift, size - shift))
    return total
