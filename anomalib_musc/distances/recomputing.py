# SPDX-License-Identifier: Apache-2.0
"""Squared distances that are too small for products in less are computed again, by products in float64.

Of two images only those patches are multiplied again that are as close to a patch of the other: whatever a patch is
nearest to has, by the same products, a patch that is as near. Where few patches are, it costs next to nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from anomalib_musc.distances.storage import CACHE_BYTES
from anomalib_musc.distances.tiles import CANCELLATION, Tile, in_float64

SPOILT = -1.0  # in place of a squared distance that is to be recomputed
DOUBT = 1 / 20  # of the distance that is too small for products: by so much they may err
# Bytes of a patch of a pair of images that is looked at, and of a number that is multiplied: copies in both precisions.
_PATCH_BYTES, _NUMBER_BYTES = 64, 32
_STEPS = 4  # in which some images are compared with each other: in each with all later ones, so few pairs twice
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
            reach: The larger of both sides' :meth:`reach`, ``(a, b)``.
            shortest: The smaller of both sides' :meth:`shortest`.
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
        self._rows, self._places = is_chosen.nonzero().unbind(dim=1)  # image by image
        self._stops = is_chosen.sum(dim=1).cumsum(dim=0).tolist()
        self._found = torch.full_like(self.squared, float("inf"))

    def parts(self, most: int, first: int = 0) -> Iterator[slice]:
        """Cut the chosen patches, from the first on, into parts of at most so many."""
        for start in range(first, len(self._places), most):
            yield slice(start, min(start + most, len(self._places)))

    def load(self, part: slice) -> "_Part":
        """Return what is compared of a part of the chosen patches."""
        places = self._places[part]
        vectors = in_float64(self.tile.vectors_of(self.images.start + self._rows[part], places, self.index))
        rows = {}
        for image, (start, stop) in enumerate(zip([0, *self._stops], self._stops, strict=False)):
            if max(start, part.start) < min(stop, part.stop):
                rows[image] = slice(max(start, part.start) - part.start, min(stop, part.stop) - part.start)
        return _Part(self, rows, places, vectors)

    def keep_smaller(self, pairs: tuple[torch.Tensor, torch.Tensor], places: torch.Tensor, found: torch.Tensor) -> None:
        """Keep squared distances at some places of images to others, as far as they are the smallest so far."""
        indices = (*pairs, places)
        self._found[indices] = torch.minimum(self._found[indices], found.clamp_min_(0).to(self._found))

    def write(self) -> None:
        """Replace what is spoilt by the distances of the chosen patches."""
        found = self._found
        if self._equals is not None:
            found = found.gather(2, self._equals[:, None].expand_as(found))
        self.squared.copy_(torch.where(self.is_spoilt, found, self.squared))


@dataclass
class _Part:
    """Some of the chosen patches of a side, image by image.

    Attributes:
        side: The side.
        rows: Where the patches of each image are.
        places: Places of the r patches in their images, ``(r,)``.
        vectors: What is compared, ``(r, C)``.
    """

    side: _Side
    rows: dict[int, slice]
    places: torch.Tensor
    vectors: torch.Tensor

    def __post_init__(self) -> None:
        self.squared_norms = torch.linalg.vector_norm(self.vectors, dim=1).square_()

    def count(self, image: int) -> int:
        """Return how many patches of an image are here."""
        return self.rows[image].stop - self.rows[image].start

    def alike(self, images: list[int]) -> list[list[int]]:
        """Return those of some images that are here, together if about as many patches of each are, else each apart."""
        images = [image for image in images if image in self.rows]
        counts = [self.count(image) for image in images]
        is_alike = bool(images) and max(counts) * len(images) <= 2 * sum(counts)
        return [images] if is_alike else [[image] for image in images]

    def rows_of(self, images: list[int]) -> torch.Tensor:
        """Return the rows of some images, ``(m, k)``; the last one again of those that have fewer."""
        starts, stops = (
            torch.tensor([getattr(self.rows[image], end) for image in images]) for end in ("start", "stop")
        )
        steps = torch.arange(int((stops - starts).max()))
        return torch.minimum(starts[:, None] + steps, stops[:, None] - 1).to(self.vectors.device)


def _recompute_block(left: _Side, right: _Side, memory: int) -> None:
    is_needed = left.is_spoilt.any(dim=2) | right.is_spoilt.any(dim=2).T  # (a, b)
    if not is_needed.any():
        return
    is_same = right is left
    reach = torch.maximum(left.reach(), right.reach().T)
    shortest = torch.minimum(left.shortest(), right.shortest().T)
    left.choose(reach, shortest)
    if not is_same:
        right.choose(reach.T, shortest.T)
    if is_same:
        is_needed = is_needed.triu(1)
    needed = [set(row.nonzero().flatten().tolist()) for row in is_needed.cpu()]
    most = max(1, memory // (2 * _NUMBER_BYTES * left.tile.patches.shape[2]))
    for rows in left.parts(most):
        x = left.load(rows)
        for columns in right.parts(most, rows.start if is_same else 0):
            y = x if is_same and columns == rows else right.load(columns)
            _compare_parts(x, y, needed, memory)
    left.write()
    if not is_same:
        right.write()


def _compare_parts(left: _Part, right: _Part, needed: list[set[int]], memory: int) -> None:
    """Compare the images of two parts with each other, several at once where not too few of the pairs are needed.

    Args:
        left: Patches of some images.
        right: Those of others, or the same.
        needed: With which on the right each on the left is compared.
        memory: Bytes for the products.
    """
    block = min(memory // 4, CACHE_BYTES) if left.vectors.device.type == "cpu" else memory // 4
    numbers = block // left.vectors.itemsize
    for group in left.alike(list(left.rows)):
        longest = max(left.count(image) for image in group)
        at_once = max(1, min(numbers // (longest * len(right.places)), len(group) // _STEPS))
        for first in range(0, len(group), at_once):
            images = group[first : first + at_once]
            others = set.union(*(needed[image] for image in images))
            num_needed = sum(len(needed[image]) for image in images)
            if len(images) * len(others) <= 4 * num_needed:  # of a part and itself a half at most is needed
                together = [(images, others)]
            else:
                together = [([image], needed[image]) for image in images]
            for some, facing in together:
                for alike in right.alike(sorted(facing)):
                    _compare(left, some, right, alike, numbers)


def _compare(left: _Part, images: list[int], right: _Part, others: list[int], numbers: int) -> None:
    """Multiply the chosen patches of a images with those of m others, about so many products at once."""
    own, rows, device = left.rows_of(images), right.rows_of(others), right.places.device  # (a, k), (m, l)
    a, m = torch.tensor(images, device=device)[:, None, None], torch.tensor(others, device=device)[:, None, None]
    y, of_y = right.vectors[rows.flatten()], right.squared_norms[rows.flatten()]
    at_once = max(1, numbers // (len(images) * len(y)))
    for some in own.split(at_once, dim=1):
        x, of_x = left.vectors[some.flatten()], left.squared_norms[some.flatten(), None]
        squared = torch.addmm(of_y, x, y.T, alpha=-2).add_(of_x).view(*some.shape, *rows.shape)
        left.side.keep_smaller(
            (a, m.transpose(0, 1)), left.places[some][:, None], squared.amin(dim=3).transpose(1, 2)
        )  # (a, m, k)
        right.side.keep_smaller(
            (m, a.transpose(0, 1)), right.places[rows][:, None], squared.amin(dim=1).transpose(0, 1)
        )
