# SPDX-License-Identifier: Apache-2.0
"""From images to features: a frozen backbone on whole images or on tiles, in the arithmetic that was asked for."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones.base import Activation
from anomalib_musc.backbones.half_precision import HalfPrecision
from anomalib_musc.backbones.own import check_images, check_output, resized, resolve_backbone
from anomalib_musc.backbones.tiles import Tiles, check_tiles, make_tiles, overlap_of

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Extractor(nn.Module):
    """A frozen backbone, and how its images are prepared.

    Args:
        backbone: Its name, or a module of the user's own, see :func:`~anomalib_musc.backbones.own.resolve_backbone`.
        pretrained: Likewise.
        image_size: Likewise; or the size of images that are cut into tiles.
        tile_size: Of the tiles; ``None`` for whole images.
        tile_overlap: Of neighbouring tiles.
        layers: As ``pretrained``.
        activation: Likewise.
        is_fast: Whether to run in 16 bits where a trial finds the device faster with them.
    """

    tiles: Tiles | None = None  # these of a pickled model of version 0.1, too
    is_fast = False
    _tiler: Any = None

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        pretrained: bool | str | Path,
        image_size: int | tuple[int, int] | None,
        tile_size: int | tuple[int, int] | None,
        tile_overlap: int | tuple[int, int] | None,
        layers: Sequence[int] | None,
        activation: Activation | None,
        is_fast: bool,
    ) -> None:
        super().__init__()
        self.is_fast = is_fast
        self.half_precision = HalfPrecision()
        size_to_cut = check_tiles(image_size, tile_size, tile_overlap)
        self._make_backbone = partial(
            resolve_backbone, backbone, pretrained=pretrained, layers=layers, activation=activation
        )
        self.backbone, self.image_size = self._make_backbone(image_size=tile_size if size_to_cut else image_size)
        if size_to_cut is not None:
            self.tiles = make_tiles(size_to_cut, self.image_size, tile_overlap, self._patch_size)
            self.image_size = self.tiles.image_size
        self.mean: tuple[float, float, float] = getattr(self.backbone, "mean", _IMAGENET_MEAN)
        self.std: tuple[float, float, float] = getattr(self.backbone, "std", _IMAGENET_STD)
        self.interpolation: str = getattr(self.backbone, "interpolation", "bilinear")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"half_precision": HalfPrecision(), **state})

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that make this network of a backbone given by name, with their defaults filled in."""
        return {"image_size": self.image_size, "layers": list(getattr(self.backbone, "layers", ()))}

    @property
    def tiler(self) -> Any:
        """The ``Tiler`` of anomalib's ``TilerConfigurationCallback``, which does what ``tile_size`` does."""
        return self._tiler

    @tiler.setter
    def tiler(self, tiler: Any) -> None:
        tiles = None if tiler is None else self._tiles_of(tiler)
        if tiles != self.tiles and (tiler is not None or self._tiler is not None):
            self.check_new_tiles(tiles)
            before, after = (self.image_size if cut is None else cut.tile_size for cut in (self.tiles, tiles))
            if before != after:
                device = self.device_or(torch.device("cpu"))
                self.backbone = resized(self.backbone, self._make_backbone, after).to(device)
            self.tiles = tiles
        self._tiler = tiler

    def _tiles_of(self, tiler: Any) -> Tiles:
        tile_size = tiler.tile_size_h, tiler.tile_size_w
        tiles = make_tiles(self.image_size, tile_size, overlap_of(tiler), self._patch_size)
        if tiles.image_size != self.image_size:
            msg = f"tiler needs an image_size in whole patches, such as {tiles.image_size}, got {self.image_size}."
            raise ValueError(msg)
        return tiles

    def check_new_tiles(self, tiles: Tiles | None) -> None:
        """Raise a ValueError where features are kept that were extracted otherwise; here are none."""

    @property
    def _patch_size(self) -> tuple[int, int] | None:
        return getattr(self.backbone, "patch_size", None)

    def device_or(self, other: torch.device) -> torch.device:
        """Return where the backbone is; another device where it has no parameters."""
        return next((parameter.device for parameter in self.parameters()), other)

    @torch.no_grad()
    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Run the frozen backbone.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            One map ``(B, C, h, w)`` a layer, all on the first one's grid, and image features ``(B, D)``; float32.

        Raises:
            ValueError, TypeError: If the images are others, or the backbone returns others, or a value is not finite.
        """
        self.backbone.eval()
        if not torch.compiler.is_compiling():
            check_images(images, self.image_size)
        return self._run_backbone(images) if self.tiles is None else self.tiles.extract(self._run_backbone, images)

    def _run_backbone(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return maps on one grid and image features of images, or of tiles."""
        with self.half_precision.autocast(self.backbone, images) if self.is_fast else nullcontext():
            output = self.backbone(images)
        if not torch.compiler.is_compiling():  # an exported model takes what it gets
            check_output(output, len(images))
        feature_maps, class_tokens = output
        grid = feature_maps[0].shape[-2:]
        maps = [
            features if features.shape[-2:] == grid else F.interpolate(features, grid, mode="bilinear")
            for features in (features.float() for features in feature_maps)
        ]
        return maps, class_tokens.float()

    def gain_of_half_precision(self, images: torch.Tensor) -> float:
        """Return how many times faster the backbone is in 16 bits, by a trial on one image, or tile; at least 1."""
        tiles = images if self.tiles is None else self.tiles.cut(images[:1])
        return self.half_precision.trial(self.backbone, tiles).gain
