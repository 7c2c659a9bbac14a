# SPDX-License-Identifier: Apache-2.0
"""MuSc in plain torch: a frozen backbone and the first two steps of the method, without anomalib or Lightning."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones.base import Activation
from anomalib_musc.backbones.extractor import Extractor
from anomalib_musc.backbones.tiles import Tiles
from anomalib_musc.distances import Processes, least_memory
from anomalib_musc.functional import (
    Precision,
    check_degrees,
    check_interval,
    check_precision,
    check_search_radius,
)
from anomalib_musc.functional.arguments import check_count
from anomalib_musc.functional.layer_scoring import interval_scores, larger_of
from anomalib_musc.functional.second_interval import check_second_interval
from anomalib_musc.functional.subsets import count_subsets, split_into_subsets
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.memory_bank.coreset import select_coreset


class PoolPrediction(NamedTuple):
    """What comparing images with a pool, or with a bank, gives.

    Attributes:
        pred_score: Raw image scores, the maximum of each anomaly map, shape ``(N,)``.
        anomaly_map: Anomaly maps at input size, shape ``(N, 1, H, W)``.
        class_tokens: Image features for :func:`~anomalib_musc.functional.rscin`, shape ``(N, D)``.
        bank: The bank, which re-scores them; ``None`` where the images are a pool.
    """

    pred_score: torch.Tensor
    anomaly_map: torch.Tensor
    class_tokens: torch.Tensor
    bank: ReferenceBank | None = None


class MuScModel(Extractor):
    """Score a pool of unlabelled images against itself (Li et al., ICLR 2024, arXiv 2401.16753, sections 3.1, 3.2).

    Once it has a bank, see :meth:`build_bank`, it scores each image on its own against that.

    Args:
        backbone: Name for :func:`~anomalib_musc.backbones.create_backbone`, or your own module that maps images
            ``(B, 3, H, W)`` to a list of feature maps ``(B, C, h, w)``, one a layer, and an image feature
            ``(B, D)``. Maps of different grids are resized bilinearly to the first one's. Your own module may
            carry ``image_size``, ``mean``, ``std`` and ``interpolation`` ("bilinear" or "bicubic"), which say how
            its images are prepared.
        pretrained: Weights of a named backbone: ``True`` (its default), a tag, a local file, or ``False`` (random).
        image_size: Side or (height, width) of the input in pixels. Defaults to the backbone's own.
        tile_size: Side or (height, width) of the tiles into which images are cut after they were resized to
            ``image_size``, which then is to be given and rounded to whole patches; the backbone takes one tile at a
            time, at its size, and the maps are joined. Defaults to no tiles.
        tile_overlap: How far neighbouring tiles overlap, in pixels. Defaults to a quarter of a tile.
        layers: Blocks of a named backbone, counted from 0. Defaults to the ends of its four quarters
            (of ``musc-tiny`` 0, 1, 2 and 5).
        activation: The activation function of a CLIP given by name: ``"official"``, the official release's, with which
            the published figures were made (at the default sizes ``nn.GELU``), or ``"weights"``, what the weights were
            trained with (OpenAI's with QuickGELU); see :func:`~anomalib_musc.backbones.create_backbone`. Default first.
        aggregation_degrees: LNAMD's degrees r, odd numbers.
        interval: Which of the ascending distances to the other images are averaged, see
            :func:`~anomalib_musc.functional.mutual_scores`.
        second_interval: Another one beyond it, such as ``(0.4, 0.7)``, for defects that many images share, see
            :func:`~anomalib_musc.functional.larger_score`; not of the paper.
        search_radius: Within how many rows and columns of its own place, in patches, a patch is sought in the other
            images, where camera and product do not move; not of the paper. Defaults to the whole image, as there.
        precision: "exact", or "fast" arithmetic where a trial finds the device faster with it: the backbone in 16-bit
            numbers, unless a trainer has a precision of its own, and distances as
            :func:`~anomalib_musc.functional.mutual_scores` says.
        num_subsets: Into how many subsets a pool is split, at random, each scored on its own, as the
            paper does for large ones: the time falls as its inverse. Fewer where one would hold less than 5.

    Raises:
        ValueError: If an argument is out of range or does not fit the backbone.

    Example:
        >>> import torch
        >>> model = MuScModel("vit_tiny_patch16_224", pretrained=False, image_size=64)
        >>> prediction = model(torch.rand(3, 3, 64, 64))
        >>> prediction.pred_score.shape, prediction.anomaly_map.shape
        (torch.Size([3]), torch.Size([3, 1, 64, 64]))
    """

    second_interval: tuple[float, float] | None = None  # of a pickled model of version 0.1
    search_radius: int | None = None

    def __init__(
        self,
        backbone: str | nn.Module = "ViT-L-14-336",
        *,
        pretrained: bool | str | Path = True,
        image_size: int | tuple[int, int] | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_overlap: int | tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        activation: Activation | None = None,
        aggregation_degrees: Sequence[int] = (1, 3, 5),
        interval: tuple[float, float] = (0.0, 0.3),
        second_interval: tuple[float, float] | None = None,
        search_radius: int | None = None,
        precision: Precision = "exact",
        num_subsets: int = 1,
    ) -> None:
        check_interval(interval)
        check_second_interval(second_interval, interval)
        check_search_radius(search_radius)
        check_precision(precision)
        check_count("num_subsets", num_subsets)
        check_degrees(aggregation_degrees, "aggregation_degrees")
        super().__init__(
            backbone,
            pretrained=pretrained,
            image_size=image_size,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            layers=layers,
            activation=activation,
            is_fast=precision == "fast",
        )
        self.aggregation_degrees = tuple(aggregation_degrees)
        self.interval = (float(interval[0]), float(interval[1]))
        self.second_interval = (
            None if second_interval is None else (float(second_interval[0]), float(second_interval[1]))
        )
        self.search_radius = search_radius
        self.precision = precision
        self.num_subsets = num_subsets
        self.bank = ReferenceBank(self.aggregation_degrees, self.interval, search_radius, self.second_interval)

    @property
    def settings(self) -> tuple[object, ...]:
        """What decides patch scores beside the backbone's weights."""
        activation = getattr(self.backbone, "activation", None)  # a checkpoint may change it, and no weight shows it
        intervals = self.interval, self.second_interval
        search = self.aggregation_degrees, self.search_radius, self.precision, self.num_subsets
        return self.image_size, self.tiles, *intervals, *search, activation

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.device_or(self.bank.class_tokens.device)

    def check_new_tiles(self, tiles: Tiles | None) -> None:
        """Raise a ValueError where there is a bank, which was made with other tiles."""
        if len(self.bank):
            msg = f"tiler gives {tiles}, with others than which the bank was made; make it anew, or keep its tiles."
            raise ValueError(msg)

    def forward(self, images: torch.Tensor) -> PoolPrediction:
        """Compare images with the bank where there is one; else take them as a pool and compare them with each other.

        Args:
            images: Normalised images, shape ``(N, 3, H, W)``; N of at least 2 where there is no bank.

        Returns:
            Scores, maps and image features of the N images.
        """
        if len(self.bank):
            feature_maps, class_tokens = self.extract(images)
            anomaly_map = self.anomaly_maps(self.bank.patch_scores(feature_maps))
            return PoolPrediction(anomaly_map.amax(dim=(1, 2, 3)), anomaly_map, class_tokens, self.bank)
        if len(images) < 2:
            msg = (
                f"images must hold at least 2 images, which are compared; got {len(images)}. "
                "With a bank, see build_bank, one is enough."
            )
            raise ValueError(msg)
        feature_maps, class_tokens = self.extract(images)
        anomaly_map = self.anomaly_maps(self.score(feature_maps, self.subsets(class_tokens)))
        return PoolPrediction(anomaly_map.amax(dim=(1, 2, 3)), anomaly_map, class_tokens)

    @torch.no_grad()
    def build_bank(self, batches: Iterable[torch.Tensor], size: int | None = None) -> None:
        """Make a bank of reference images of the same product, normal or unlabelled, in place of the one there is.

        Args:
            batches: Normalised images, batches of shape ``(B, 3, H, W)``.
            size: How many to keep. They are drawn from the less anomalous half of the images, compared with each other,
                each as unlike those before it as possible. Defaults to all.

        Raises:
            ValueError: If there is no image, ``size`` is no whole number of at least 1, or the interval does not suit.

        Example:
            >>> model = MuScModel("vit_tiny_patch16_224", pretrained=False, image_size=64)
            >>> model.build_bank([torch.rand(4, 3, 64, 64)], size=2)
            >>> model(torch.rand(1, 3, 64, 64)).anomaly_map.shape
            torch.Size([1, 1, 64, 64])
        """
        self.fill_bank((self.extract(images) for images in batches if len(images)), size)

    @torch.no_grad()
    def fill_bank(
        self,
        batches: Iterable[tuple[Sequence[torch.Tensor], torch.Tensor]],
        size: int | None = None,
        *,
        is_alone: bool = True,
        grey_range: tuple[float, float] = (0.0, 0.0),
        origin: object = None,
    ) -> None:
        """Make a bank of features, see :meth:`build_bank`.

        Args:
            batches: Feature maps and image features, as :meth:`extract` returns them.
            size: How many images to keep. Defaults to all.
            is_alone: Whether images are compared with the bank alone, without a pool.
            grey_range: See :class:`~anomalib_musc.memory_bank.bank.ReferenceBank`.
            origin: Likewise.
        """
        check_count("size", size, none="all")
        extracted = list(batches)
        if not extracted:
            msg = "batches must hold at least one image, got none."
            raise ValueError(msg)
        layers = [torch.cat(maps) for maps in zip(*(feature_maps for feature_maps, _ in extracted), strict=True)]
        tokens = torch.cat([class_tokens for _, class_tokens in extracted])
        if is_alone:
            self.check_bank_size(len(tokens), size)
        raw_scores, patch_scores, ratios = self._scores_of_each_other(layers)
        if size is not None and size < len(tokens):
            kept = select_coreset(raw_scores, tokens, size)
            layers, tokens = [maps[kept] for maps in layers], tokens[kept]
            raw_scores, patch_scores, ratios = self._scores_of_each_other(layers)
        self.bank.fill(layers, tokens, raw_scores, patch_scores, ratios=ratios, grey_range=grey_range, origin=origin)

    def check_bank_size(self, num_images: int, size: int | None) -> None:
        """Raise a ValueError where the intervals do not suit a bank of ``size`` of the images, without a pool."""
        num_compared = min(size or num_images, num_images) + 1
        check_interval(self.interval, num_compared)
        check_second_interval(self.second_interval, self.interval, num_compared)

    def check_pool_size(self, num_images: int, num_references: int = 0) -> None:
        """Raise a ValueError where the intervals do not suit a pool of so many images, and references besides."""
        num_compared = num_images // count_subsets(self.num_subsets, num_images) + num_references
        check_interval(self.interval, num_compared)
        check_second_interval(self.second_interval, self.interval, num_compared)

    def _scores_of_each_other(
        self, feature_maps: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return raw scores ``(N,)``, patch scores ``(N, h, w)`` and ratios ``(layers,)``; 0 for an image alone."""
        patch_scores = torch.zeros_like(feature_maps[0][:, 0])
        ratios = torch.full((len(feature_maps),), torch.inf)
        if len(patch_scores) > 1:
            scores, found = zip(*(self._layer_scores(maps) for maps in feature_maps), strict=True)
            patch_scores, ratios = torch.stack(scores).mean(dim=0).view(patch_scores.shape), torch.stack(found)
        return self.anomaly_maps(patch_scores).amax(dim=(1, 2, 3)), patch_scores, ratios

    def subsets(self, class_tokens: torch.Tensor) -> list[list[int]]:
        """Split a pool of image features ``(N, D)`` at random into ``num_subsets`` of equal size, give or take one.

        Returns:
            The indices of each subset's images, see :func:`~anomalib_musc.functional.split_into_subsets`.
        """
        return split_into_subsets(class_tokens, self.num_subsets)

    @torch.no_grad()
    def score(
        self,
        feature_maps: Sequence[torch.Tensor],
        subsets: Sequence[Sequence[int]] | None = None,
        *,
        memory_budget: float | None = None,
        processes: Processes | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """LNAMD and mutual scoring, averaged over layers and degrees.

        Args:
            feature_maps: One map ``(N, C, h, w)`` a layer, of the whole pool; on the host where memory is short.
            subsets: See :meth:`subsets`. Defaults to one, the whole pool.
            memory_budget: GiB that this may take beside the maps, see
                :func:`~anomalib_musc.functional.mutual_scores`.
            processes: Those that hold the other images of the pool, each its share.
            progress: Called with the number of image pairs just compared; :meth:`num_comparisons` in all.

        Returns:
            Patch scores, shape ``(N, h, w)``.
        """
        device = self.device_or(feature_maps[0].device)
        num_images, _, height, width = feature_maps[0].shape
        total = torch.zeros(num_images, height * width, device=device)
        for feature_map in feature_maps:
            for subset in subsets or [range(num_images)]:
                how = {"memory_budget": memory_budget, "processes": processes, "progress": progress}
                scores, _ = self._layer_scores(feature_map, subset, **how)
                total[torch.as_tensor(subset, dtype=torch.long, device=device)] += scores
        return (total / len(feature_maps)).view(num_images, height, width)

    def _layer_scores(
        self, feature_map: torch.Tensor, images: Sequence[int] | None = None, **how: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's patch scores ``(n, h * w)`` and the median ratio of two intervals, infinite of one."""
        means = interval_scores(
            feature_map,
            self.aggregation_degrees,
            [self.interval] if self.second_interval is None else [self.interval, self.second_interval],
            images=images,
            search_radius=self.search_radius,
            precision=self.precision,
            device=self.device_or(feature_map.device),
            **how,
        )
        return larger_of(means, how.get("processes"))

    def least_memory(self, feature_maps: Sequence[torch.Tensor], num_images: int) -> int:
        """Return the bytes without which :meth:`score` cannot compare ``num_images`` images of such maps."""
        degrees, device = self.aggregation_degrees, self.device_or(feature_maps[0].device)
        shapes = {(num_images, *feature_map.shape[1:]) for feature_map in feature_maps}
        return max(least_memory(shape, degrees, self.precision, device, self.search_radius) for shape in shapes)

    def num_comparisons(self, subsets: Sequence[Sequence[int]], num_layers: int) -> int:
        """Return how many times :meth:`score` compares two images, counting each degree."""
        pairs = sum(len(subset) * (len(subset) - 1) // 2 for subset in subsets)
        return num_layers * len(self.aggregation_degrees) * pairs

    def anomaly_maps(self, patch_scores: torch.Tensor) -> torch.Tensor:
        """Enlarge patch scores ``(B, h, w)`` bilinearly (``align_corners=True``) to maps ``(B, 1, H, W)``."""
        return F.interpolate(patch_scores[:, None], self.image_size, mode="bilinear", align_corners=True)
