# SPDX-License-Identifier: Apache-2.0
"""Same-place search: a patch is compared with those near its own place in the other images."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from anomalib_musc.distances.kernels.plain import reuse_buffer
from anomalib_musc.distances.rounding import exchange_norms, in_order
from anomalib_musc.distances.tiles import Tile, in_float64

_ROWS = 128  # of images and columns on the left that are multiplied at least: fewer take the time of more


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
    def row_radius(self) -> int:
        """Rows on each side that there are."""
        return min(self.radius, self.grid[0] - 1)

    @property
    def column_numbers(self) -> int:
        """Products of the places of a column with those near them in another, of two images."""
        return self.grid[0] * (2 * self.row_radius + 1)

    def pair_numbers(self) -> int:
        """Return how many numbers of working memory it takes to compare two images."""
        height, width = self.grid
        return self.column_numbers + height * (3 * width + 3)

    @property
    def window_patches(self) -> int:
        """Patches of the window of a column."""
        return self.grid[0] + 2 * self.row_radius

    def near(self, row: int, column: int) -> torch.Tensor:
        """Return the positions within the radius of a place, ``(k,)``."""
        height, width = self.grid
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

    A column of the grid on the right is multiplied with the columns near it on the left: each of their places with a
    window of the column, all images at once. A product serves both directions, and in a tile's comparison with itself
    a pair of places is multiplied once.

    Args:
        left: n images, whose operands have norms.
        right: m others, or the same.
        places: The grid and the radius.
        norm_channels: See :class:`~anomalib_musc.distances.rounding.Rounding`.
        memory: Bytes for the products of more columns than one.
        targets: Where the distances go, ``(1, n, m, L)`` to the right and ``(1, m, n, L)`` to the left; one and the
            same where the tiles are.
        progress: Called with the number of image pairs just compared.
    """
    (height, width), is_same = places.grid, right is left
    x, y = (tile.operands[0].transpose(0, 1).unflatten(0, places.grid) for tile in (left, right))  # (H, W, b, C)
    multiply = _ColumnProduct(places, norm_channels)
    num_left, num_right = x.shape[2], y.shape[2]
    shape = width, height, num_left, num_right
    forward = _largest(in_order(x), shape)  # |x - y|² / 2 of the nearest patches so far
    backward = forward.mT if is_same else _largest(forward, shape)
    num_pairs = num_left * (num_left - 1) // 2 if is_same else num_left * num_right
    column_bytes = places.column_numbers * num_left * num_right * x.element_size()
    copy_bytes = height * num_left * x.shape[3] * x.element_size()
    at_once = max(1, min(math.ceil(_ROWS / num_left), memory // (column_bytes + copy_bytes)))
    for column in range(width):
        window = multiply.window(y[:, column])
        for others, first in _near_columns(places, column, at_once, is_same):
            products = multiply(x[:, others], window, first)  # (k, H, columns, n, m)
            nearest = products.amin(dim=0).transpose(0, 1)
            torch.minimum(forward[others], nearest, out=forward[others])
            nearest = _smallest_backward(products, first - places.row_radius).amin(dim=1)
            torch.minimum(backward[column], nearest, out=backward[column])
        if progress is not None:
            progress(num_pairs * (column + 1) // width - num_pairs * column // width)
    _write(forward.view(x.dtype), left, right, places, targets[0])
    if not is_same:
        _write(backward.view(x.dtype).mT, right, left, places, targets[1])


def _near_columns(places: Places, column: int, at_once: int, is_same: bool) -> Iterator[tuple[slice, int]]:
    """Yield the columns on the left that one on the right is compared with, a few together, and from which row on.

    Of a tile and itself one direction suffices: columns before it, and in the column itself rows from the place on.
    """
    last = column if is_same else min(places.grid[1], column + places.radius + 1)
    for start in range(max(0, column - places.radius), last, at_once):
        yield slice(start, min(start + at_once, last)), 0
    if is_same:
        yield slice(column, column + 1), places.row_radius


class _ColumnProduct:
    """Multiplies places with windows of a column, of all images, in memory that is used again."""

    def __init__(self, places: Places, norm_channels: int) -> None:
        self._height, self._radius, self._norm_channels = places.grid[0], places.row_radius, norm_channels
        self._products = self._window = self._columns = torch.empty(0)

    def window(self, column: torch.Tensor) -> torch.Tensor:
        """Return a column ``(H, m, C)`` that faces others, between places that no patch is near.

        The next call overwrites it.
        """
        if not self._window.numel():
            self._window = column.new_zeros(self._height + 2 * self._radius, *column.shape[1:])
            self._window[..., -self._norm_channels // 2] = torch.finfo(column.dtype).max / 4
        exchange_norms(column, self._norm_channels, out=self._window[self._radius : self._radius + self._height])
        return self._window

    def __call__(self, x: torch.Tensor, window: torch.Tensor, first: int) -> torch.Tensor:
        """Multiply columns ``(H, columns, n, C)`` with windows, from their row ``first`` on: ``(k, H, columns, n, m)``.

        The next call overwrites the result.
        """
        places, count, channels = window.shape
        rows, num_left = places - self._height + 1 - first, x.shape[1] * x.shape[2]
        size = rows * self._height * num_left * count
        self._products = reuse_buffer(self._products, size, x)
        products = self._products[:size]
        if x.element_size() == 2:  # where windows overlap, or others lie between the columns, oneDNN is slow
            self._columns = reuse_buffer(self._columns, x.numel(), x)
            together = self._columns[: x.numel()].view_as(x).copy_(x).flatten(1, 2)
            of_rows = products.view(rows, self._height, num_left, count)
            for row, product in enumerate(of_rows, first):
                torch.bmm(together, window[row : row + self._height].mT, out=product)
        else:
            windows = window[first:].as_strided(
                (self._height, rows * count, channels), (count * channels, channels, 1)
            )  # they overlap
            products = products.view(self._height, num_left, rows * count)
            torch.bmm(x.flatten(1, 2), windows.mT, out=products)
            of_rows = products.unflatten(2, (rows, count)).permute(2, 0, 1, 3)
        return in_order(of_rows).unflatten(2, x.shape[1:3])


def _largest(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    most = torch.finfo(like.dtype).max if like.is_floating_point() else torch.iinfo(like.dtype).max
    return like.new_full(shape, most)


def _smallest_backward(products: torch.Tensor, first_shift: int) -> torch.Tensor:
    """Return the smallest products of each place on the right, ``(H, ...)``, of those ``(k, H, ...)`` on the left."""
    height = products.shape[1]
    smallest = _largest(products, products.shape[1:])
    for shift, product in enumerate(products, first_shift):
        places = smallest[max(0, shift) : height + min(0, shift)]
        torch.minimum(places, product[max(0, -shift) : height - max(0, shift)], out=places)
    return smallest


def _write(nearest: torch.Tensor, query: Tile, reference: Tile, places: Places, target: torch.Tensor) -> None:
    """Write distances to ``(1, n, m, L)``; what is too small for the products is computed in float64.

    Args:
        nearest: Half the squared distances, ``(W, H, n, m)``; it may be overwritten.
        query: n images.
        reference: m others, or the same.
        places: The grid and the radius.
        target: Where the distances go.
    """
    squared = nearest.to(query.half_norms.dtype).mul_(2).clamp_min_(0)
    if reference is query:
        squared.diagonal(dim1=2, dim2=3).fill_(float("inf"))
    is_spoilt = squared < query.resolution(0).unflatten(1, places.grid).permute(2, 1, 0)[..., None]
    for column, row in is_spoilt.flatten(2).any(dim=2).nonzero().tolist():
        _recompute(squared[column, row], is_spoilt[column, row], query, reference, places, (row, column))
    for image, of_image in enumerate(squared.unbind(dim=2)):  # which stays in the cache
        target[0, image].unflatten(1, places.grid).copy_(of_image.sqrt().permute(2, 1, 0))


def _recompute(
    squared: torch.Tensor,
    is_spoilt: torch.Tensor,
    query: Tile,
    reference: Tile,
    places: Places,
    place: tuple[int, int],
) -> None:
    """Compute squared distances ``(n, m)`` of the patches at a place again where they are spoilt."""
    near = places.near(*place)
    queries, references = (is_spoilt.any(dim=dim).nonzero().flatten() for dim in (1, 0))
    vectors = in_float64(query.patches[queries, place[0] * places.grid[1] + place[1]])  # (n', C)
    for some in references.split(max(1, query.patches.shape[1] // len(near))):  # no more patches than of an image
        others = in_float64(reference.patches[some[:, None], near])  # (m', k, C)
        distances = torch.cdist(vectors, others.flatten(0, 1)).unflatten(1, others.shape[:2]).amin(dim=2)
        pairs = queries[:, None], some
        squared[pairs] = torch.where(is_spoilt[pairs], distances.square().to(squared), squared[pairs])
