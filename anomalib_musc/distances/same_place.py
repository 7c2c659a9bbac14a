# SPDX-License-Identifier: Apache-2.0
"""Same-place search: a patch is compared with those near its own place in the other images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from anomalib_musc.distances.kernels.plain import reuse_buffer
from anomalib_musc.distances.rounding import exchange_norms, in_order
from anomalib_musc.distances.static import merge_same_places, squared_distances
from anomalib_musc.distances.tiles import Tile

_ROWS = 128  # images of some lines on the left that are multiplied at least: fewer take the time of more
_LARGEST_BITS = 0x7BFF  # of float16's largest number; in bfloat16 it is a large one, too
_CACHED = 2**17  # numbers that are written together: few enough for a cache, enough for several threads
_IMAGES = 4  # whose equal patches are sought together
_WIDE = 2  # how much wider than high a grid is whose rows are compared


@dataclass(frozen=True)
class Places:
    """The grid of a map, and how far from its own place a patch is sought.

    Attributes:
        grid: Height and width.
        radius: Rows and columns on each side.
    """

    grid: tuple[int, int]
    radius: int

    @property
    def is_wide(self) -> bool:
        """Whether rows are compared in place of columns, as columns are short."""
        return self.grid[1] > _WIDE * self.grid[0]

    @property
    def lines(self) -> int:
        """How many columns there are, or rows."""
        return self.grid[0 if self.is_wide else 1]

    @property
    def length(self) -> int:
        """Places of a line."""
        return self.grid[1 if self.is_wide else 0]

    @property
    def reach(self) -> int:
        """How far from its own place a patch is sought along a line."""
        return min(self.radius, self.length - 1)

    @property
    def window_patches(self) -> int:
        """Patches of the window of a line."""
        return self.length + 2 * self.reach

    @property
    def line_numbers(self) -> int:
        """Products of the places of a line with those near them in another, and their minima, of two images."""
        return self.length * (2 * self.reach + 1 + 3)

    @property
    def pair_numbers(self) -> int:
        """Numbers of working memory that it takes to compare two images of two tiles."""
        return self.line_numbers + math.prod(self.grid) * 9 // 4  # distances both ways, and what is computed again

    @property
    def num_products(self) -> int:
        """Pairs of places that are multiplied where images are compared with each other."""
        others = sum(self.lines - step for step in range(1, min(self.radius, self.lines - 1) + 1))
        return self.length * (others * (2 * self.reach + 1) + self.lines * (self.reach + 1))

    def near(self, place: int) -> torch.Tensor:
        """Return the positions within the radius of a place, ``(k,)``."""
        height, width = self.grid
        row, column = divmod(place, width)
        rows = torch.arange(max(0, row - self.radius), min(height, row + self.radius + 1))
        columns = torch.arange(max(0, column - self.radius), min(width, column + self.radius + 1))
        return (rows[:, None] * width + columns).flatten()


def make_places(grid: tuple[int, int], search_radius: int | None) -> Places | None:
    """Return where a patch is sought; ``None`` where that is the whole image."""
    return None if search_radius is None or search_radius >= max(grid) - 1 else Places(grid, search_radius)


def compare_places(
    left: Tile,
    right: Tile,
    places: Places,
    norm_channels: int,
    memory: int,
    targets: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int], object] | None,
) -> None:
    """Compare every image of a tile with every image of another, or of itself, place by place.

    A line of the grid on the right, a column or of wide grids a row, is multiplied with the lines near it on the left:
    each of their places with a window of the line, all images at once. A product serves both directions, and in a
    tile's comparison with itself a pair of places is multiplied once.

    Args:
        left: n images, whose operands have norms.
        right: m others, or the same.
        places: The grid and the radius.
        norm_channels: See :class:`~anomalib_musc.distances.rounding.Rounding`.
        memory: Bytes for more lines than one at once.
        targets: Where the distances go, ``(1, n, m, L)`` to the right and ``(1, m, n, L)`` to the left; one and the
            same where the tiles are.
        progress: Called with the number of image pairs just compared.
    """
    is_same, lines = right is left, places.lines
    x, y = _by_place(left, places), _by_place(right, places)
    multiply = _LineProduct(places, norm_channels)
    num_left, num_right = x.shape[2], y.shape[2]
    shape = lines, places.length, num_left, num_right
    forward = _full_of_largest(in_order(x), shape)  # |x - y|² / 2 of the nearest patches so far
    backward = forward.mT if is_same else _full_of_largest(forward, shape)
    num_pairs = num_left * (num_left - 1) // 2 if is_same else num_left * num_right
    line_numbers = places.line_numbers * num_left * num_right + places.length * num_left * x.shape[3]
    at_once = max(1, min(math.ceil(_ROWS / num_left), memory // (line_numbers * x.element_size())))
    for line in range(lines):
        window = multiply.window(y[:, line])
        for others, first in _near_lines(places, line, at_once, is_same):
            products = multiply(x[:, others], window, first)  # (k, length, lines, n, m)
            if left.is_static and others.start <= line < others.stop:  # same places are compared apart
                products[places.reach - first, :, line - others.start] = _largest_of(products)
            nearest = products.amin(dim=0).transpose(0, 1)
            torch.minimum(forward[others], nearest, out=forward[others])
            nearest = _smallest_backward(products, first - places.reach)
            torch.minimum(backward[line], nearest, out=backward[line])
        if progress is not None:
            progress(num_pairs * (line + 1) // lines - num_pairs * line // lines)
    _write(forward.view(x.dtype), left, places, targets[0])
    if is_same:
        targets[0].diagonal(dim1=1, dim2=2).fill_(float("inf"))
    else:
        _write(backward.view(x.dtype).mT, right, places, targets[1])
    del forward, backward
    if left.is_static:
        merge_same_places(left, right, 0, memory, targets)
    _recompute(left, right, places, targets[0][0])
    targets[0].sqrt_()
    if not is_same:
        _recompute(right, left, places, targets[1][0])
        targets[1].sqrt_()


def _by_place(tile: Tile, places: Places) -> torch.Tensor:
    """Return a tile's operands as ``(length, lines, b, C)``."""
    by_place = tile.operands[0].transpose(0, 1).unflatten(0, places.grid)
    return by_place.transpose(0, 1) if places.is_wide else by_place


def _near_lines(places: Places, line: int, at_once: int, is_same: bool) -> Iterator[tuple[slice, int]]:
    """Yield the lines on the left that one on the right is compared with, a few together, and from which shift on.

    Of a tile and itself one direction suffices: lines before it, and in the line itself places from its own on.
    """
    last = line if is_same else min(places.lines, line + places.radius + 1)
    for start in range(max(0, line - places.radius), last, at_once):
        yield slice(start, min(start + at_once, last)), 0
    if is_same:
        yield slice(line, line + 1), places.reach


class _LineProduct:
    """Multiplies places with windows of a line, of all images, in memory that is used again."""

    def __init__(self, places: Places, norm_channels: int) -> None:
        self._length, self._reach, self._norm_channels = places.length, places.reach, norm_channels
        self._products = self._window = self._copy = torch.empty(0)

    def window(self, line: torch.Tensor) -> torch.Tensor:
        """Return a line ``(length, m, C)`` that faces others, between places that no patch is near.

        The next call overwrites it.
        """
        if not self._window.numel():
            self._window = line.new_zeros(self._length + 2 * self._reach, *line.shape[1:])
            self._window[..., -self._norm_channels // 2] = torch.finfo(line.dtype).max / 4
        exchange_norms(line, self._norm_channels, out=self._window[self._reach : self._reach + self._length])
        return self._window

    def __call__(self, x: torch.Tensor, window: torch.Tensor, first: int) -> torch.Tensor:
        """Multiply lines ``(length, lines, n, C)`` with windows, from a shift on: ``(k, length, lines, n, m)``.

        The next call overwrites the result.
        """
        places, count, channels = window.shape
        shifts, num_left = places - self._length + 1 - first, x.shape[1] * x.shape[2]
        size = shifts * self._length * num_left * count
        self._products = reuse_buffer(self._products, size, x)
        products = self._products[:size]
        if x.element_size() == 2:  # where windows overlap, or others lie between the lines, oneDNN is slow
            self._copy = reuse_buffer(self._copy, x.numel(), x)
            together = self._copy[: x.numel()].view_as(x).copy_(x).flatten(1, 2)
            by_shift = products.view(shifts, self._length, num_left, count)
            for shift, product in enumerate(by_shift, first):
                torch.bmm(together, window[shift : shift + self._length].mT, out=product)
        else:
            windows = window[first:].as_strided(
                (self._length, shifts * count, channels), (count * channels, channels, 1)
            )  # they overlap
            products = products.view(self._length, num_left, shifts * count)
            torch.bmm(x.flatten(1, 2), windows.mT, out=products)
            by_shift = products.unflatten(2, (shifts, count)).permute(2, 0, 1, 3)
        return in_order(by_shift).unflatten(2, x.shape[1:3])


def _full_of_largest(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return like.new_full(shape, _largest_of(like))


def _largest_of(like: torch.Tensor) -> float:
    """Return a number that is larger than any product; of 16-bit ones its bits, see :func:`.in_order`."""
    return torch.finfo(like.dtype).max if like.is_floating_point() else _LARGEST_BITS


def _smallest_backward(products: torch.Tensor, first_shift: int) -> torch.Tensor:
    """Return the smallest product of each place on the right, ``(length, n, m)``, of those that were multiplied.

    Args:
        products: Shape ``(k, length, lines, n, m)``, by shift and place on the left; they are overwritten.
        first_shift: The first shift, from a place on the left to one on the right.
    """
    length = products.shape[1]
    smallest = products[-first_shift]  # of a place itself
    for shift, product in enumerate(products, first_shift):
        if shift:
            places = smallest[max(0, shift) : length + min(0, shift)]
            torch.minimum(places, product[max(0, -shift) : length - max(0, shift)], out=places)
    return smallest.amin(dim=1) if smallest.shape[1] > 1 else smallest[:, 0]


def _write(nearest: torch.Tensor, query: Tile, places: Places, target: torch.Tensor) -> None:
    """Write squared distances to ``(1, n, m, L)``, a few images at a time.

    Args:
        nearest: Half of them, ``(lines, length, n, m)``.
        query: n images.
        places: The grid and the radius.
        target: Where they go.
    """
    by_column = nearest.transpose(0, 1) if places.is_wide else nearest  # (W, H, n, m)
    at_once = max(1, _CACHED // by_column[:, :, 0].numel())
    for some, block in zip(target[0].split(at_once), by_column.split(at_once, dim=2), strict=True):
        squared = torch.mul(block.to(query.half_norms), 2).clamp_min_(0)
        some.unflatten(2, places.grid).copy_(squared.permute(2, 3, 1, 0))


def _recompute(query: Tile, reference: Tile, places: Places, squared: torch.Tensor) -> None:
    """Compute squared distances ``(n, m, L)`` again where they are too small for the products.

    Args:
        query: n images.
        reference: m others, or the same.
        places: The grid and the radius.
        squared: The squared distances.
    """
    resolution = query.resolution(0)
    if query.is_static:
        resolution = torch.zeros_like(resolution)
    some_places = (squared.amin(dim=(0, 1)) < resolution.amax(dim=0)).nonzero().flatten().tolist()
    if not some_places:
        return
    num_patches, fine = query.patches.shape[1], query.fine(0)
    firsts = _firsts(reference)
    for place in some_places:
        near, here = places.near(place), squared[..., place]
        is_here = here < resolution[:, place, None]
        queries, references = (is_here.any(dim=dim).nonzero().flatten() for dim in (1, 0))
        vectors = query.patches[queries, place][None]  # (1, n', C)
        mean = vectors.mean(dim=1, keepdim=True)
        for some in references.split(max(1, num_patches // len(near))):  # no more patches than of an image
            positions, numbers = firsts[some[:, None], near].unique(return_inverse=True)  # (u,), (m', k)
            others = reference.patches[positions // num_patches, positions % num_patches][None]  # (1, u, C)
            distances = squared_distances(vectors - mean, others - mean, fine)[0]
            nearest = distances[:, numbers].amin(dim=2)  # (n', m')
            pairs = queries[:, None], some
            here[pairs] = torch.where(is_here[pairs], nearest, here[pairs])


def _firsts(tile: Tile) -> torch.Tensor:
    """Return the first patch of the same image that each equals, ``(b, L)``, by its position among those of all."""
    num_images, num_patches = tile.patches.shape[:2]
    images = [slice(first, min(first + _IMAGES, num_images)) for first in range(0, num_images, _IMAGES)]
    equals = torch.cat([tile.equals(some, 0) for some in images])
    return equals + num_patches * torch.arange(num_images, device=equals.device)[:, None]
