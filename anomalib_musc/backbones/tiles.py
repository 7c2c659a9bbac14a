# SPDX-License-Identifier: Apache-2.0
"""Large images: cut into overlapping tiles for the backbone, whose maps are joined to one grid without a seam."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones.base import resolve_image_size

_CELL = 32  # pixels a patch, as the last stage of most convolutional networks has them, where a backbone has no patches


@dataclass(frozen=True)
class Tiles:
    """Where an image is cut. All sizes are (height, width) in pixels of the image as it was resized.

    Attributes:
        image_size: Of the image.
        tile_size: Of a tile, as the backbone takes it.
        stride: From a tile to the next; the last one of a row or column ends with the image.
    """

    image_size: tuple[int, int]
    tile_size: tuple[int, int]
    stride: tuple[int, int]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Top and left of each tile, row by row."""
        sides = zip(self.image_size, self.tile_size, self.stride, strict=True)
        rows, columns = ([*range(0, image - tile, stride), image - tile] for image, tile, stride in sides)
        return list(product(rows, columns))

    @property
    def overlap(self) -> tuple[int, int]:
        """How far neighbouring tiles overlap."""
        return self.tile_size[0] - self.stride[0], self.tile_size[1] - self.stride[1]

    def extract(
        self, run: Callable[[torch.Tensor], tuple[list[torch.Tensor], torch.Tensor]], images: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run a backbone on the tiles of images ``(B, 3, H, W)``.

        Args:
            run: Returns maps ``(B, C, h, w)`` on one grid and image features ``(B, D)`` of tiles. It is given as many
                at once as there are images; in an export all.
            images: The images.

        Returns:
            Maps of the images, and the means of their tiles' features, of unit length.
        """
        tiles = self.cut(images)
        parts = [tiles] if torch.compiler.is_compiling() else tiles.split(len(images))
        maps, tokens = zip(*(run(part) for part in parts), strict=True)
        joined = [self.join(torch.cat(layer)) for layer in zip(*maps, strict=True)]
        means = torch.cat(tokens).unflatten(0, (images.shape[0], len(self.offsets))).mean(dim=1)
        return joined, F.normalize(means, dim=-1)

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """Cut images ``(B, 3, H, W)`` into T tiles each: ``(B * T, 3, h, w)``, image by image."""
        height, width = self.tile_size
        tiles = [images[..., top : top + height, left : left + width] for top, left in self.offsets]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def join(self, maps: torch.Tensor) -> torch.Tensor:
        """Join the maps of tiles, ``(B * T, C, h, w)``, to those of images, ``(B, C, H, W)``.

        Where tiles overlap, their maps are averaged with weights that fall linearly to a tile's edge.

        Raises:
            ValueError: If tiles do not begin where a patch does.
        """
        offsets = self.offsets
        rows, row_weights = self._places(maps.shape[2], axis=0)
        columns, column_weights = self._places(maps.shape[3], axis=1)
        weights = row_weights[:, None] * column_weights  # (h, w)
        weights = weights.to(maps)
        num_images = maps.shape[0] // len(offsets)  # which stays open in an export
        of_tiles = maps.unflatten(0, (num_images, len(offsets))) * weights  # (B, T, C, h, w)
        joined = maps.new_zeros(num_images, maps.shape[1], rows[-1] + maps.shape[2], columns[-1] + maps.shape[3])
        total = maps.new_zeros(joined.shape[2:])
        for index, (top, left) in enumerate(product(rows, columns)):
            place = (..., slice(top, top + maps.shape[2]), slice(left, left + maps.shape[3]))
            joined[place] += of_tiles[:, index]
            total[place] += weights
        return joined / total

    def _places(self, num_patches: int, axis: int) -> tuple[list[int], torch.Tensor]:
        """Return where tiles begin on the joined grid, along an axis, and the weights of a tile's patches."""
        starts = sorted({offset[axis] for offset in self.offsets})
        if any(start * num_patches % self.tile_size[axis] for start in starts):
            msg = (
                f"tile_size and tile_overlap give tiles that begin at {starts[1:]} pixels, which the patches of this "
                f"backbone, {self.tile_size[axis] / num_patches:g} pixels wide, do not divide; choose an image_size, a "
                "tile_size and a tile_overlap that are multiples of it."
            )
            raise ValueError(msg)
        ascending = torch.arange(1, num_patches + 1)
        return [start * num_patches // self.tile_size[axis] for start in starts], torch.minimum(
            ascending, ascending.flip(0)
        )


def check_tiles(
    image_size: int | tuple[int, int] | None,
    tile_size: int | tuple[int, int] | None,
    tile_overlap: int | tuple[int, int] | None,
) -> tuple[int, int] | None:
    """Return (height, width) of images that are to be cut into tiles, ``None`` where they are not.

    Raises:
        ValueError: If an argument is missing.
    """
    if tile_size is None:
        if tile_overlap is not None:
            msg = f"tile_overlap={tile_overlap} is of tiles; give tile_size, too."
            raise ValueError(msg)
        return None
    tile = _sides("tile_size", tile_size, least=1)
    if tile_overlap is not None:
        _sides("tile_overlap", tile_overlap, least=0)
    if image_size is None:
        msg = (
            f"tile_size={tile_size} needs image_size, to which images are resized before they are cut. "
            "anomalib_musc.predict and the command take the size that most of the images have."
        )
        raise ValueError(msg)
    size = resolve_image_size(image_size, native=(1, 1), patch_size=None)
    _check_not_smaller(size, tile)
    return size


def _sides(name: str, value: object, least: int) -> tuple[int, int]:
    """Return (height, width) of one number or two; a ValueError that calls the argument ``name`` for others."""
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
        msg = f"{name} must be a whole number of at least {least}, or two (height, width), got {value!r}."
        raise ValueError(msg)
    return sides[0], sides[1]


def _check_not_smaller(image_size: tuple[int, int], tile_size: tuple[int, int]) -> None:
    if any(side < tile for side, tile in zip(image_size, tile_size, strict=True)):
        msg = (
            f"image_size must be at least tile_size={tile_size}, got {image_size}; choose smaller tiles, or leave "
            "tile_size out."
        )
        raise ValueError(msg)


def make_tiles(
    image_size: tuple[int, int],
    tile_size: tuple[int, int],
    tile_overlap: int | Sequence[int] | None,
    patch_size: tuple[int, int] | None,
) -> Tiles:
    """Return where images are cut, whose size is rounded to whole patches.

    Args:
        image_size: (height, width) in pixels.
        tile_size: Likewise; the backbone's own image size.
        tile_overlap: Of neighbouring tiles, one number or (rows, columns). Defaults to a quarter of a tile.
        patch_size: The backbone's; ``None`` where it has none.

    Raises:
        ValueError: If an image is smaller than a tile, or a size is no multiple of the patch.
    """
    cell = patch_size or (_CELL, _CELL)
    if tile_overlap is None:
        overlap = tuple(
            max(1, tile // 4 // side) * side if tile > side else 0 for tile, side in zip(tile_size, cell, strict=True)
        )
    else:
        overlap = _sides("tile_overlap", tile_overlap, least=0)
    sizes = {"tile_size": tile_size, "tile_overlap": overlap}
    for name, size in sizes.items():
        if any(side % patch for side, patch in zip(size, cell, strict=True)):
            msg = f"{name} must be multiples of the backbone's patch size {cell}, got {size}."
            raise ValueError(msg)
    if any(of_tile <= 0 for of_tile in (tile - shared for tile, shared in zip(tile_size, overlap, strict=True))):
        msg = f"tile_overlap must be smaller than tile_size={tile_size}, got {overlap}."
        raise ValueError(msg)
    rounded = tuple(max(1, round(side / patch)) * patch for side, patch in zip(image_size, cell, strict=True))
    _check_not_smaller((rounded[0], rounded[1]), tile_size)
    stride = tile_size[0] - overlap[0], tile_size[1] - overlap[1]
    return Tiles((rounded[0], rounded[1]), tile_size, stride)


def overlap_of(tiler: Any) -> tuple[int, int]:
    """Return how far the tiles of anomalib's ``Tiler`` overlap."""
    return tiler.tile_size_h - tiler.stride_h, tiler.tile_size_w - tiler.stride_w
