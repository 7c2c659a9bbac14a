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

    tiles: Tiles | None = None  # these three of a pickled model of version 0.1, too
    half_precision = HalfPrecision()
    is_fast = False

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
        self._tiler: Any = None
        self.is_fast = is_fast
        self.half_precision = HalfPrecision()
        size_to_cut = check_tiles(image_size, tile_size, tile_overlap)
        self._make_backbone = partial(
            resolve_backbone, backbone, pretrained=pretrained, layers=layers, activation=activation
        )
        self.backbone, self.image_size = self._make_backbone(image_size=tile_size if size_to_cut else image_size)
        if size_to_cut is not None:
            self._cut_into_tiles(size_to_cut, self.image_size, tile_overlap)
        self.mean: tuple[float, float, float] = getattr(self.backbone, "mean", _IMAGENET_MEAN)
        self.std: tuple[float, float, float] = getattr(self.backbone, "std", _IMAGENET_STD)
        self.interpolation: str = getattr(self.backbone, "interpolation", "bilinear")

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
        self._tiler = tiler
        if tiler is None:
            return
        tile_size, image_size = (tiler.tile_size_h, tiler.tile_size_w), self.image_size
        if tile_size != (self.image_size if self.tiles is None else self.tiles.tile_size):
            self.check_new_tiles(tile_size)
            device = self.device_or(torch.device("cpu"))
            self.backbone = resized(self.backbone, self._make_backbone, tile_size).to(device)
        self._cut_into_tiles(image_size, tile_size, overlap_of(tiler))
        if self.image_size != image_size:
            msg = f"tiler needs an image_size in whole patches, such as {self.image_size}, got {image_size}."
            raise ValueError(msg)

    def check_new_tiles(self, tile_size: tuple[int, int]) -> None:
        """Raise a ValueError where features are kept that were extracted otherwise; here are none."""

    def _cut_into_tiles(
        self, image_size: tuple[int, int], tile_size: tuple[int, int], overlap: int | tuple[int, int] | None
    ) -> None:
        self.tiles = make_tiles(image_size, tile_size, overlap, getattr(self.backbone, "patch_size", None))
        self.image_size = self.tiles.image_size

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
