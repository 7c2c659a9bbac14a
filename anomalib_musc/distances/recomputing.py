# SPDX-License-Identifier: Apache-2.0
"""Squared distances that are too small for products in less are computed again, by products in float64.

Of two images only those patches are multiplied again that are as close to a patch of the other: whatever a patch is
nearest to has, by the same products, a patch that is as near. Where few patches are, it costs next to nothing.
"""

import math
from dataclasses import dataclass

import torch

from anomalib_musc.distances.tiles import CANCELLATION, Tile, in_float64

SPOILT = -1.0  # in place of a squared distance that is to be recomputed
DOUBT = 1 / 20  # of the distance that is too small for products: by so much they may err
_PATCH_BYTES, _NUMBER_BYTES = 64, 16  # of a patch of a pair of images that is looked at; of a number in both precisions
_CACHE_BYTES = 2**23  # of products, which stay in a processor's cache
_MANY = 1 / 8  # of an image's patches: products of fewer take less than telling which are equal


def recompute(left: Tile, right: Tile, index: int, memory: int, targets: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Replace the squared distances of two tiles that products cannot tell, some images at a time.

    Args:
        left: n images.
        right: m others, or the same.
        index: That of the degree.
        memory: Bytes for a few images at a time.
        targets: Squared distances, ``(n, m, L)`` and ``(m, n, L)``, one and the same where the tiles are.
    """
    at_once = max(1, math.isqrt(memory // (_PATCH_BYTES * left.patches.shape[1])))
    for first in range(0, len(left.patches), at_once):
        rows = slice(first, min(first + at_once, len(left.patches)))
        for second in range(first if right is left else 0, len(right.patches), at_once):
            columns = slice(second, min(second + at_once, len(right.patches)))
            one = _Side(left, rows, index, targets[0][rows, columns])
            is_same = right is left and rows == columns
            other = one if is_same else _Side(right, columns, index, targets[1][columns, rows])
            _recompute_block(one, other, memory)


@dataclass
class _Side:
    """Some images of a tile, and their distances to others.

    Attributes:
        tile: The tile.
        images: a of its images.
        index: That of the degree.
        squared: Their squared distances to b others, ``(a, b, L)``.
    """

    tile: Tile
    images: slice
    index: int
    squared: torch.Tensor

    def __post_init__(self) -> None:
        self._resolution = self.tile.resolution(self.index, self.images)[:, None]  # (a, 1, L)
        self._half_norms = self.tile.half_norms[self.index, self.images, None]
        self.is_spoilt = self.squared < (0 if self.tile.is_static else self._resolution)
        self._equals: torch.Tensor | None = None

    def reach(self) -> torch.Tensor:
        """Return the largest squared distance that products may give for the nearest to a spoilt one, ``(a, b)``."""
        return (1 + 2 * DOUBT) * torch.where(self.is_spoilt, self._resolution, 0).amax(dim=2)

    def shortest(self) -> torch.Tensor:
        """Return the norm of the shortest patch whose distance is spoilt, ``(a, b)``."""
        half_norms = torch.where(self.is_spoilt, self._half_norms, float("inf")).amin(dim=2)
        return half_norms.clamp_min_(0).mul_(2).sqrt_()

    def choose(self, reach: torch.Tensor, shortest: torch.Tensor) -> None:
        """Choose the patches that may be the nearest to a spoilt one, or are such.

        Args:
            reach: See above, of both sides, ``(a, b)``.
            shortest: Likewise.
        """
        least = (shortest / 2 - reach.sqrt()).clamp_min_(0).square_() / 2  # half: norms are rounded, too
        is_near = (self.squared < reach[..., None]) & (self._half_norms >= least[..., None])
        if self.tile.scales is None:  # two such patches are of one size but for 2 %
            sizes = self.tile.sizes[self.index, self.images, None]
            is_near &= self.squared < (1 + 3 * DOUBT) * 2 * CANCELLATION * sizes
        is_chosen = is_near.any(dim=1).int()
        if is_chosen.sum() > _MANY * is_chosen.numel():
            self._equals = self.tile.equals(self.images, self.index)  # (a, L)
            is_chosen = torch.zeros_like(is_chosen).scatter_reduce_(1, self._equals, is_chosen, "amax")
        count = max(1, int(is_chosen.sum(dim=1).max()))
        self.places = is_chosen.topk(count, dim=1).indices  # (a, k); those beyond an image's own do no harm
        self.nearest = self.squared.new_full((*self.squared.shape[:2], count), float("inf"))

    def vectors(self, images: slice) -> torch.Tensor:
        """Return what is compared of the chosen patches of some of the images, with norms, ``(n, k, C + 2)``."""
        of_tile = torch.arange(self.images.start, self.images.stop)[images].to(self.places.device)
        vectors = in_float64(self.tile.vectors_of(of_tile, self.places[images], self.index))
        squared_norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).square_()
        return torch.cat([vectors, squared_norms, torch.ones_like(squared_norms)], dim=-1)

    def write(self) -> None:
        """Replace what is spoilt by the distances of the chosen patches."""
        places, nearest = self.places[:, None].expand_as(self.nearest), self.nearest
        found = torch.full_like(self.squared, float("inf")).scatter_(2, places, nearest)
        if self._equals is not None:
            found = found.gather(2, self._equals[:, None].expand_as(found))
        self.squared.copy_(torch.where(self.is_spoilt, found, self.squared))


def _recompute_block(left: _Side, right: _Side, memory: int) -> None:
    if not (left.is_spoilt.any() or right.is_spoilt.any()):
        return
    reach = torch.maximum(left.reach(), right.reach().T)
    shortest = torch.minimum(left.shortest(), right.shortest().T)
    left.choose(reach, shortest)
    if right is not left:
        right.choose(reach.T, shortest.T)
    count, channels = max(left.places.shape[1], right.places.shape[1]), left.tile.patches.shape[2]
    at_once = max(1, memory // (4 * _NUMBER_BYTES * count * channels))
    for first in range(0, len(left.squared), at_once):
        rows = slice(first, min(first + at_once, len(left.squared)))
        x = left.vectors(rows)
        for second in range(first if right is left else 0, len(right.squared), at_once):
            columns = slice(second, min(second + at_once, len(right.squared)))
            y = x if right is left and rows == columns else right.vectors(columns)
            _compare((left, rows, x), (right, columns, y), memory)
    left.write()
    if right is not left:
        right.write()


def _compare(left: tuple[_Side, slice, torch.Tensor], right: tuple[_Side, slice, torch.Tensor], memory: int) -> None:
    """Multiply the chosen patches of some images, see :meth:`_Side.vectors`, with those of others, each pair once."""
    (one, rows, x), (other, columns, y) = left, right
    y = torch.cat([-2 * y[..., :-2], y[..., -1:], y[..., -2:-1]], dim=-1)  # |x|² + |y|² - 2xy is one product
    block = memory // 2 if x.device.type != "cpu" else min(memory // 2, _CACHE_BYTES)
    for image, patches in enumerate(x, rows.start):
        start = image - rows.start if right[2] is x else 0
        others, images = y[start:], slice(columns.start + start, columns.stop)
        patches_at_once = max(1, block // (x.itemsize * len(others) * others.shape[1]))
        for first in range(0, len(patches), patches_at_once):
            some = slice(first, first + patches_at_once)
            squared = (patches[some] @ others.flatten(0, 1).T).unflatten(1, others.shape[:2])  # (k, m, k')
            to_right, to_left = one.nearest[image, images, some], other.nearest[images, image]
            for target, found in ((to_right, squared.amin(dim=2).T), (to_left, squared.amin(dim=0))):
                target.copy_(torch.minimum(target, found.clamp_min_(0).to(target)))
