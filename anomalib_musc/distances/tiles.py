# SPDX-License-Identifier: Apache-2.0
"""Images that are held at once, ready to be compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from anomalib_musc.distances.rounding import Encoded, Rounding
from anomalib_musc.distances.windows import TINY_NORM, window_sum, window_sums, window_sums_at

# Below this squared distance (relative to the squared norm) the difference |x|² + |y|² - 2xy has lost the digits
# that the result needs in float32, and the distance is computed again in float64.
CANCELLATION = 2.5e-4
# How much longer the terms of a window may be than their sum; the error of a product grows with the square of it.
_CONDITION = 10
# Patches are taken for equal whose coordinates on so many random axes are, in units of a tenth of the bound of 1e-4.
_AXES, _EQUAL = 16, 1e-5
_ALL = slice(None)


@dataclass
class Origin:
    r"""What was subtracted from patches whose windows are still to be summed, as it is where most of them lie.

    The unit vector :math:`x_p` of a window of :math:`n_p` patches, whose sum is :math:`\hat g_p + n_p o` and scaled by
    :math:`s_p`, is compared as a vector that is small where :math:`x_p` is like the origin:

    .. math:: x_p - o / \lVert o \rVert = u_p + \alpha_p o, \qquad u_p = s_p \hat g_p, \qquad
              \alpha_p = s_p n_p - 1 / \lVert o \rVert

    Attributes:
        point: o, ``(C,)``.
        along: :math:`o \cdot u_p`, ``(D, b, L)``.
        alpha: :math:`\alpha_p`, ``(D, b, L)``.
        half_norms: Half the squared norms of what is compared, ``(D, b, L)``.
    """

    point: torch.Tensor
    along: torch.Tensor
    alpha: torch.Tensor
    half_norms: torch.Tensor

    def complete(
        self, index: int, image: int, right: "Origin", images: slice, similarities: torch.Tensor
    ) -> torch.Tensor:
        r"""Turn products into halves of negative squared distances, in place.

        .. math:: (u_p + \alpha_p o) \cdot (u_q + \alpha_q o) = u_p \cdot u_q + (o \cdot u_p) \alpha_q
                  + \alpha_p (o \cdot u_q + \alpha_q \lVert o \rVert^2)

        Args:
            index: That of the degree.
            image: One of this tile, with patches p.
            right: That of another tile, or the same.
            images: c images of that tile, with patches q.
            similarities: :math:`u_p \cdot u_q`, shape ``(c, L, L)`` over q then p.
        """
        alpha, alpha_right = self.alpha[index, image], right.alpha[index, images]
        minus_one, one = -torch.ones_like(alpha), torch.ones_like(alpha_right)
        of_left = torch.stack([self.along[index, image], alpha, minus_one, -self.half_norms[index, image]])  # (4, L)
        along_right = right.along[index, images] + alpha_right * self.point.square().sum()
        of_right = torch.stack([alpha_right, along_right, right.half_norms[index, images], one], dim=-1)  # (c, L, 4)
        return similarities.baddbmm_(of_right, of_left.expand(len(of_right), -1, -1))


@dataclass
class Tile:
    """Images that are held on the compute device, ready to be compared at D degrees.

    Attributes:
        patches: Patches of b images, shape ``(b, L, C)``.
        grid: Height and width of their map, where windows are still to be summed.
        degrees: The D degrees; ``(1,)`` for patches that are compared as they are.
        operands: The patches as the kernel takes them.
        scales: What the product with a window's sum is multiplied by, ``(D, b, L)``; ``None`` for ones.
        half_norms: Half the squared norms of what is compared, ``(D, b, L)``, see :func:`_half_norms`.
        sizes: Half the squared lengths of what is added up in products, ``(D, b, L)``, which decide their error.
        origin: What was subtracted from patches whose windows are still to be summed; ``None`` for nothing.
        is_static: Whether the patches at the same place of two images are compared apart from the products, as they may
            be too close for them.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    degrees: tuple[int, ...]
    operands: Encoded
    scales: torch.Tensor | None
    half_norms: torch.Tensor
    sizes: torch.Tensor
    origin: Origin | None = None
    is_static: bool = False
    _equals: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def _farthest(self) -> torch.Tensor:
        """Half the largest squared norm of what is compared, ``(D,)``."""
        return self.half_norms.amax(dim=(1, 2))

    @cached_property
    def _axes(self) -> torch.Tensor:
        """Random axes, ``(C, axes)``."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.patches.shape[2], _AXES, generator=generator).to(self.patches)

    def resolution(self, index: int, images: slice = _ALL, places: slice = _ALL) -> torch.Tensor:
        """Return the squared distances below which the products are too coarse, ``(n, places)``.

        Between patches that are this much closer to what was subtracted than the farthest one, the root of their error
        is small enough.

        Args:
            index: That of the degree.
            images: Some of the images.
            places: Some of their places.
        """
        sizes = self.sizes[index, images, places]
        if sizes.dtype == torch.float64:
            return torch.zeros_like(sizes)
        return torch.where(sizes > CANCELLATION * self._farthest[index], 2 * CANCELLATION * sizes, 0.0)

    def negligible(self, index: int) -> torch.Tensor:
        """Return the squared distance that is as good as none at the degree of that index."""
        return 2 * _EQUAL**2 * self._farthest[index]

    def fine(self, index: int) -> torch.Tensor:
        """Return the squared norm up to which products err by no more than what is as good as none."""
        return 4 * CANCELLATION * self._farthest[index]

    def places(self, most: int) -> list[slice]:
        """Return all places, at most so many at a time: a row of the map, where windows are still to be summed."""
        num_patches, width = self.patches.shape[1], most if self.scales is None else self.grid[1]
        return [slice(start, min(start + width, num_patches)) for start in range(0, num_patches, width)]

    def vectors_at(self, places: slice, images: slice, index: int) -> torch.Tensor:
        """Return what is compared at some :meth:`places` at the degree of that index, ``(n, places, C)``."""
        if self.scales is None:
            return self.patches[images, places]
        row, radius = places.start // self.grid[1], self.degrees[index] // 2
        rows = self.patches[images].unflatten(1, self.grid)[:, max(0, row - radius) : row + radius + 1]
        sums = rows.sum(dim=1)  # (n, W, C)
        if self.origin is not None:
            sums += rows.shape[1] * self.origin.point
        return window_sum(sums, 1, radius).mul_(self.scales[index, images, places, None])

    def vectors_of(self, images: torch.Tensor, places: torch.Tensor, index: int) -> torch.Tensor:
        """Return what is compared of some patches at the degree of that index, ``(n, C)``.

        Args:
            images: Positions in the tile, ``(n,)``.
            places: Those of the patches in their images, ``(n,)``.
            index: That of the degree.
        """
        if self.scales is None:
            return self.patches[images, places]
        maps = self.patches.unflatten(1, self.grid)
        sums, counts = window_sums_at(maps, self.degrees[index], images, places)
        if self.origin is not None:
            sums.addcmul_(counts, self.origin.point)
        return sums.mul_(self.scales[index, images, places, None])

    def equals(self, images: slice, index: int) -> torch.Tensor:
        """Return the first patch of the same image that each equals, ``(n, L)``, as those of a plain background do."""
        key = images.start, images.stop, index
        if key not in self._equals:
            coordinates = self.patches[images] @ self._axes  # (n, L, axes)
            if self.origin is not None:
                coordinates += self.origin.point @ self._axes
            if self.scales is not None:
                sums = window_sums(coordinates.unflatten(1, self.grid), self.degrees[index])
                coordinates = sums * self.scales[index, images, :, None]
            self._equals[key] = _equals(coordinates, 2 * self._farthest[index])
        return self._equals[key]


def tile_of_vectors(
    storage: torch.Tensor,
    channels: int,
    rounding: Rounding,
    memory: torch.Tensor | None = None,
    at_once: int = 1,
    load: Callable[[slice], object] | None = None,
) -> Tile:
    """Make a tile of prepared vectors that are compared as they are.

    Args:
        storage: Vectors ``(b, L, C)``, and the rounding's channels for norms after theirs.
        channels: C.
        rounding: How they are rounded.
        memory: Bytes for the rounded vectors. Defaults to new ones.
        at_once: Images that are loaded and rounded together, while they are in the cache.
        load: Writes the vectors of some images. Defaults to nothing: all are there.
    """
    vectors = storage[..., :channels]
    operands = rounding.allocate(storage, memory)
    half_norms = vectors.new_empty(vectors.shape[:2])
    spare = vectors[:at_once]
    if rounding.number_bytes:
        spare = torch.empty_like(spare, memory_format=torch.contiguous_format)
    for first in range(0, len(vectors), at_once):
        images = slice(first, min(first + at_once, len(vectors)))
        if load is not None:
            load(images)
        some = tuple(part[images] for part in operands)
        rounding.encode(storage[images], some)
        rounded = rounding.decode(some, spare[: images.stop - first])
        half_norms[images] = _half_norms(vectors[images], rounded)
        rounding.write_norms(some, half_norms[images])
    return Tile(vectors, (1, vectors.shape[1]), (1,), operands, None, half_norms[None], half_norms[None])


class CancellingWindowsError(ArithmeticError):
    """The patches of a window cancel each other, so that sums of their products would lose too many digits."""


def tile_of_maps(
    patches: torch.Tensor,
    degrees: tuple[int, ...],
    rounding: Rounding,
    origin: torch.Tensor | None = None,
    memory: torch.Tensor | None = None,
) -> Tile:
    """Make a tile of prepared patches ``(b, H, W, C)`` that are compared at several degrees.

    Args:
        patches: The patches, less the origin.
        degrees: The D degrees.
        rounding: How they are rounded.
        origin: See :class:`Tile`.
        memory: Bytes for the rounded patches. Defaults to new ones.

    Raises:
        CancellingWindowsError: If the sum of a window is much smaller than its terms.
    """
    vectors = patches.flatten(1, 2)
    operands = rounding.allocate(vectors, memory)
    numbers = patches.new_empty(5, len(degrees), *vectors.shape[:2])
    spare = torch.empty_like(vectors[:1]) if rounding.number_bytes else vectors[:1]
    for image, patch_map in enumerate(patches):
        some = tuple(part[image : image + 1] for part in operands)
        rounding.encode(vectors[image : image + 1], some)
        rounded = rounding.decode(some, spare)
        rounded_map = patch_map if rounded is None else rounded.view_as(patch_map)
        for index, degree in enumerate(degrees):
            numbers[:, index, image] = _numbers_of_windows(patch_map, rounded_map, degree, origin)
    scales, half_norms, sizes, along, alpha = numbers
    grid = (patches.shape[1], patches.shape[2])
    of_tile = None if origin is None else Origin(origin, along, alpha, half_norms)
    return Tile(vectors, grid, degrees, operands, scales, half_norms, sizes, of_tile)


def _numbers_of_windows(
    patches: torch.Tensor, rounded: torch.Tensor, degree: int, origin: torch.Tensor | None
) -> torch.Tensor:
    """Return scales, half norms, sizes, and what :class:`Origin` has, ``(5, L)``, of the windows of ``(H, W, C)``."""
    sums = window_sums(patches, degree)
    rounded_sums = sums if rounded is patches else window_sums(rounded, degree)
    counts = window_sums(torch.ones_like(patches[..., :1]), degree)  # (L, 1)
    lengths = window_sums(torch.linalg.vector_norm(patches, dim=-1, keepdim=True), degree)[:, 0]
    norms = torch.linalg.vector_norm(sums if origin is None else torch.addcmul(sums, counts, origin), dim=-1)
    if bool((lengths > _CONDITION * norms).any()):
        raise CancellingWindowsError
    scales = norms.clamp_min(TINY_NORM * degree**2).reciprocal()
    is_whole = origin is None and rounded is patches
    squared = ((norms if is_whole else torch.linalg.vector_norm(rounded_sums, dim=-1)) * scales).square()
    if rounded is not patches:  # see _half_norms
        squared -= (torch.linalg.vector_norm(rounded_sums - sums, dim=-1) * scales).square()
    if origin is None:
        zeros = torch.zeros_like(scales)
        return torch.stack([scales, squared / 2, squared / 2, zeros, zeros])
    length, along = torch.linalg.vector_norm(origin), (rounded_sums @ origin) * scales
    alpha = scales * counts[:, 0] - 1 / length
    squared += 2 * alpha * along + (alpha * length).square()  # of the sum of a window and alpha times the origin
    sizes = (lengths * scales + alpha.abs() * length).square() / 2
    return torch.stack([scales, squared / 2, sizes, along, alpha])


def _half_norms(exact: torch.Tensor, rounded: torch.Tensor | None) -> torch.Tensor:
    r"""Return half the squared norms of ``(..., C)``, as they have to be where products are those of rounded vectors.

    With the errors :math:`e = x - \tilde x`, which are as good as orthogonal to each other, it is

    .. math:: \lVert x - y \rVert^2 \approx \lVert \tilde x - \tilde y \rVert^2 - \lVert e_x \rVert^2
              - \lVert e_y \rVert^2, \qquad
              e_x = x - \tilde x

    Its error does not grow where the distance is small; with the true norms it would. The rounded vectors are
    overwritten.
    """
    if rounded is None:
        return torch.linalg.vector_norm(exact, dim=-1).square_() / 2
    squared = torch.linalg.vector_norm(rounded, dim=-1).square_()
    return (squared - torch.linalg.vector_norm(rounded.sub_(exact), dim=-1).square_()) / 2


def _equals(coordinates: torch.Tensor, largest_squared_norm: torch.Tensor) -> torch.Tensor:
    """Return the first patch of the image that each equals, ``(n, L)``, by coordinates on axes, ``(n, L, axes)``."""
    unit = largest_squared_norm.sqrt() * _EQUAL
    cells = (coordinates / unit.clamp_min(torch.finfo(unit.dtype).tiny)).round().nan_to_num(0.0).cpu().long()
    odd = torch.randint(2**62, (_AXES + 1,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    hashed = (cells * odd[1:]).sum(dim=2) + odd[0] * torch.arange(len(cells))[:, None]  # modulo 2**64
    kinds, equals = hashed.flatten().unique(return_inverse=True)
    first = torch.full_like(kinds, len(equals)).scatter_reduce_(0, equals, torch.arange(len(equals)), "amin")
    return (first[equals] % hashed.shape[1]).view_as(hashed).to(coordinates.device)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, on the host where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
