# SPDX-License-Identifier: Apache-2.0
"""Same-place search: a patch is compared with those near its own place in the other images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from anomalib_musc.distances.kernels.plain import reuse_buffer
from anomalib_musc.distances.rounding import exchange_norms, in_order
from anomalib_musc.distances.tiles import Tile, in_float64


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
    def num_columns(self) -> int:
        """Places of a row of the grid that a patch is compared with."""
        return min(2 * self.radius + 1, self.grid[1])

    def pair_numbers(self) -> int:
        """Return how many numbers of working memory it takes to compare two images."""
        rows = min(2 * self.radius + 1, self.grid[0])
        return self.grid[1] * (2 * rows + 2 * self.num_columns + 3)

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
    targets: tuple[torch.Tensor, torch.Tensor],
    progress: Callable[[int], object] | None,
) -> None:
    """Compare every image of a tile with every image of another, or of itself, place by place.

    A row of the grid on the right is multiplied with the rows near it on the left: each of their places with a window
    of the row, all images at once. A product serves both directions, and in a tile's comparison with itself a pair of
    places is multiplied once.

    Args:
        left: n images, whose operands have norms.
        right: m others, or the same.
        places: The grid and the radius.
        norm_channels: See :class:`~anomalib_musc.distances.rounding.Rounding`.
        targets: Where the distances go, ``(1, n, m, L)`` to the right and ``(1, m, n, L)`` to the left; one and the
            same where the tiles are.
        progress: Called with the number of image pairs just compared.
    """
    height, radius, is_same = places.grid[0], places.radius, right is left
    x, y = _by_place(left, places), _by_place(right, places)
    multiply = _RowProduct(places, norm_channels)
    forward: dict[int, torch.Tensor] = {}  # by row, (W, n, m): |x - y|² / 2 of the nearest patches so far
    backward: dict[int, torch.Tensor] = {}
    num_pairs = len(left.patches) * (len(left.patches) - 1) // 2 if is_same else len(left.patches) * len(right.patches)
    for row in range(height):
        window = multiply.window(y[row])
        last = row if is_same else min(height - 1, row + radius)
        for other in range(max(0, row - radius), last + 1):
            first = radius if is_same and other == row else 0
            products = multiply(x[other], window, first)  # (W, n, k, m)
            _keep_smaller(forward, other, products.amin(dim=2))
            _keep_smaller(backward, row, _smallest_backward(products, first - radius))
        complete = range(row - radius, row - radius + 1) if row < height - 1 else range(row - radius, height)
        for done in complete[max(0, radius - row) :]:
            nearest = forward.pop(done)
            if is_same:
                nearest = torch.minimum(nearest, backward.pop(done).mT)
            _write(nearest.view(x.dtype), left, right, places, done, targets[0])
        if not is_same:
            _write(backward.pop(row).view(x.dtype).mT, right, left, places, row, targets[1])
        if progress is not None:
            progress(num_pairs * (row + 1) // height - num_pairs * row // height)


class _RowProduct:
    """Multiplies each place of a row with a window of another row, of all images, in memory that is used again."""

    def __init__(self, places: Places, norm_channels: int) -> None:
        self._width, self._radius, self._norm_channels = places.grid[1], places.radius, norm_channels
        self._products = self._window = torch.empty(0)

    def window(self, row: torch.Tensor) -> torch.Tensor:
        """Return a row ``(W, m, C)`` that faces others, between places that no patch is near.

        The next call overwrites it.
        """
        if not self._window.numel():
            self._window = row.new_zeros(self._width + 2 * self._radius, *row.shape[1:])
            self._window[..., -self._norm_channels // 2] = torch.finfo(row.dtype).max / 4
        exchange_norms(row, self._norm_channels, out=self._window[self._radius : self._radius + self._width])
        return self._window

    def __call__(self, x: torch.Tensor, window: torch.Tensor, first: int) -> torch.Tensor:
        """Multiply a row ``(W, n, C)`` with windows, from their column ``first`` on: ``(W, n, columns, m)``."""
        places, count, channels = window.shape
        columns = places - self._width + 1 - first
        size = self._width * x.shape[1] * columns * count
        self._products = reuse_buffer(self._products, size, x)
        products = self._products[:size]
        if x.element_size() == 2:  # where windows overlap, oneDNN is slow
            of_columns = products.view(columns, self._width, x.shape[1], count)
            for column, product in enumerate(of_columns, first):
                torch.bmm(x, window[column : column + self._width].mT, out=product)
            return in_order(of_columns.permute(1, 2, 0, 3))
        windows = window[first:].as_strided(
            (self._width, columns * count, channels), (count * channels, channels, 1)
        )  # they overlap
        products = torch.bmm(x, windows.mT, out=products.view(self._width, x.shape[1], columns * count))
        return in_order(products).unflatten(2, (columns, count))


def _keep_smaller(minima: dict[int, torch.Tensor], row: int, values: torch.Tensor) -> None:
    minima[row] = torch.minimum(minima[row], values, out=minima[row]) if row in minima else values


def _smallest_backward(products: torch.Tensor, first_shift: int) -> torch.Tensor:
    """Return the smallest product of each place on the right, ``(W, n, m)``, of those ``(W, n, k, m)`` on the left."""
    width = len(products)
    largest = torch.finfo(products.dtype).max if products.is_floating_point() else torch.iinfo(products.dtype).max
    smallest = products.new_full((width, products.shape[1], products.shape[3]), largest)
    for shift, product in enumerate(products.unbind(dim=2), first_shift):
        if abs(shift) < width:
            places = smallest[max(0, shift) : width + min(0, shift)]
            torch.minimum(places, product[max(0, -shift) : width - max(0, shift)], out=places)
    return smallest


def _by_place(tile: Tile, places: Places) -> torch.Tensor:
    """Return a tile's operands as ``(H, W, b, C)``."""
    return tile.operands[0].transpose(0, 1).contiguous().unflatten(0, places.grid)


def _write(nearest: torch.Tensor, query: Tile, reference: Tile, places: Places, row: int, target: torch.Tensor) -> None:
    """Write the distances of a row, ``(W, n, m)``; what is too small for the products is computed in float64."""
    squared = nearest.to(query.half_norms.dtype).mul_(2).clamp_min_(0)
    if reference is query:
        squared.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    positions = slice(row * places.grid[1], (row + 1) * places.grid[1])
    is_spoilt = squared < query.resolution(0, places=positions).T[..., None]
    for column in is_spoilt.flatten(1).any(dim=1).nonzero().flatten().tolist():
        near = places.near(row, column)
        queries, references = (is_spoilt[column].any(dim=dim).nonzero().flatten() for dim in (1, 0))
        vectors = in_float64(query.patches[queries, positions.start + column])  # (n', C)
        for some in references.split(max(1, query.patches.shape[1] // len(near))):  # no more patches than of an image
            others = in_float64(reference.patches[some[:, None], near])  # (m', k, C)
            distances = torch.cdist(vectors, others.flatten(0, 1)).unflatten(1, others.shape[:2]).amin(dim=2)
            pairs = column, queries[:, None], some
            squared[pairs] = torch.where(is_spoilt[pairs], distances.square().to(squared), squared[pairs])
    target[0, :, :, positions] = squared.sqrt_().permute(1, 2, 0)
