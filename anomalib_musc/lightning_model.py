# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib: the pool is scored before the loop, then every step hands out its batch's share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_musc.checks import (
    FEW_IMAGES,
    MIN_IMAGES,
    check_readable,
    check_size,
    check_writable,
    closed_folders,
    few_images,
    find_fault,
    unreadable,
)
from anomalib_musc.deep_images import DeepImages
from anomalib_musc.features import FeatureStore
from anomalib_musc.files import common_folder
from anomalib_musc.functional import check_budget, check_interval
from anomalib_musc.metrics import PaperEvaluator
from anomalib_musc.pool import Pool, PoolSource, as_list, fingerprint, image_names, transform_leaves
from anomalib_musc.post_processor import RsCINPostProcessor, calibrate_on_pool, forget_calibration, uncalibrated
from anomalib_musc.prediction_writer import PredictionWriter
from anomalib_musc.progress import profile, profiled, progress_bar
from anomalib_musc.torch_model import MuScModel
from anomalib_musc.workarounds import FolderVisualizer, MultiLoaderPreProcessor, NoValidationData

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MuSc(NoValidationData, AnomalibModule):  # type: ignore[misc]  # anomalib's own bases disagree on to_onnx
    """Zero-shot anomaly detection by mutual scoring of unlabelled images (Li et al., ICLR 2024, arXiv 2401.16753).

    The unlabelled images of one dataloader are its pool: when a test, validation or prediction starts, all of them are
    read once, their features are extracted and scored against each other. No training, no prompts, no labels. A pool
    that was just scored, such as a validation set that is the test set, is not scored again.

    Args:
        backbone: Name of an open_clip or timm model, or of the official release's (``ViT-L-14-336``,
            ``dinov2_vitl14``, ...), or your own module; see :class:`~anomalib_musc.MuScModel`.
        pretrained: Weights of a named backbone: ``True`` (its default), a tag, a local file, or ``False`` (random).
        image_size: Side or (height, width) of the input in pixels. Defaults to the backbone's own.
        layers: Blocks of a named backbone, counted from 0. Defaults to the ends of its four quarters.
        aggregation_degrees: LNAMD's degrees r, odd numbers.
        interval: Which of the ascending distances to the other images are averaged; a bound below 1 is a
            fraction, of 1 or more a count.
        precision: "exact", or "fast": 8-bit products on processors that have them, 16-bit ones on NVIDIA's GPUs.
        num_subsets: Into how many subsets a large pool is split at random, whose images judge each other; the time
            falls as its inverse.
        memory_budget: GiB that the pool may take, its features and scoring, on the host and on the compute device
            each. What does not fit goes to temporary files. Defaults to half of what is free.
        pre_processor: anomalib's component, or whether to use the default: resize and normalise as the backbone asks.
        post_processor: Likewise; the default is :class:`~anomalib_musc.RsCINPostProcessor`.
        evaluator: Likewise; the default reports the paper's metrics.
        visualizer: Likewise; the default is anomalib's ``ImageVisualizer``, with names of its own for the pictures.
        prediction_writer: Likewise; the default writes ``predictions.csv`` when predicting, see
            :class:`~anomalib_musc.PredictionWriter`.

    Raises:
        ValueError: If an argument is out of range or does not fit the backbone.
        WeightsUnavailableError: If the weights can neither be found nor downloaded.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> model = MuSc(backbone="vit_tiny_patch16_224", pretrained=False)
        >>> model.name, model.learning_type.value
        ('MuSc', 'zero_shot')
        >>> Engine().test(model, datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str | nn.Module = "ViT-L-14-336",
        pretrained: bool | str | Path = True,
        image_size: int | tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        aggregation_degrees: Sequence[int] = (1, 3, 5),
        interval: tuple[float, float] = (0.0, 0.3),
        precision: Literal["exact", "fast"] = "exact",
        num_subsets: int = 1,
        memory_budget: float | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        prediction_writer: PredictionWriter | bool = True,
    ) -> None:
        model = MuScModel(
            backbone,
            pretrained=pretrained,
            image_size=image_size,
            layers=layers,
            aggregation_degrees=aggregation_degrees,
            interval=interval,
            precision=precision,
            num_subsets=num_subsets,
        )
        check_budget(memory_budget)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(model.image_size, model.mean, model.std, model.interpolation)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model: MuScModel = model
        self.memory_budget = memory_budget
        self.prediction_writer = PredictionWriter() if prediction_writer is True else prediction_writer or None
        self.skipped_images: dict[Path, str] = {}
        self._sources: list[PoolSource] = []
        self._pools: list[Pool] = []
        self._calibrated_on_pool: list[str] = []
        self._scored_in_validation = False
        if isinstance(backbone, nn.Module):
            # Lightning would pickle it into checkpoints, which could not be loaded safely: pass it again on loading.
            for name in ("_hparams", "_hparams_initial"):
                vars(self)[name].pop("backbone")

    @property
    def learning_type(self) -> LearningType:
        """Zero-shot: nothing is learned from normal images."""
        return LearningType.ZERO_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One device, as all images must meet in one process."""
        return {"devices": 1, "num_sanity_val_steps": 0}

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
        interpolation: str = "bicubic",
    ) -> PreProcessor:
        """Create the pre-processor of a backbone; the default is that of the default backbone.

        Args:
            image_size: (height, width) in pixels; ``(518, 518)`` if ``None``.
            mean: Channel means of RGB in [0, 1].
            std: Channel standard deviations.
            interpolation: "bicubic" or "bilinear"; always antialiased, never cropped.
        """
        resize = Resize(image_size or (518, 518), interpolation=InterpolationMode(interpolation), antialias=True)
        return MultiLoaderPreProcessor(transform=Compose([resize, Normalize(mean=list(mean), std=list(std))]))

    @staticmethod
    def configure_post_processor() -> RsCINPostProcessor:
        """Create the default post-processor."""
        return RsCINPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Create the default evaluator, with the paper's metrics."""
        return PaperEvaluator()

    @staticmethod
    def configure_visualizer() -> ImageVisualizer:
        """Create the default visualizer."""
        return FolderVisualizer()

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Add the writer to anomalib's components, after the post-processor."""
        callbacks = super().configure_callbacks()
        writers = [self.prediction_writer] if self.prediction_writer else []
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), *writers]

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is trained."""

    def on_validation_start(self) -> None:
        """Score the validation pools."""
        if isinstance(self.post_processor, PostProcessor):
            forget_calibration(self.post_processor, self._calibrated_on_pool)
        self._calibrated_on_pool = []
        self._score_pools(self.trainer.val_dataloaders, self.trainer.num_val_batches)

    def on_test_start(self) -> None:
        """Score the test pools."""
        self._score_pools(self.trainer.test_dataloaders, self.trainer.num_test_batches)
        self._calibrate()

    def on_predict_start(self) -> None:
        """Score the prediction pools."""
        self._score_pools(self.trainer.predict_dataloaders, self.trainer.num_predict_batches)
        self._calibrate()

    def on_predict_end(self) -> None:
        """Leave the datasets as they were found."""
        for source in self._sources:
            source.restore()

    def validation_step(  # type: ignore[override]
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ImageBatch:
        """Hand out the batch's share of its pool: ``pred_score (B,)`` and ``anomaly_map (B, H, W)``."""
        del batch_idx
        scores, anomaly_maps = self._share(batch, dataloader_idx)
        return batch.update(pred_score=scores, anomaly_map=anomaly_maps)

    def test_step(  # type: ignore[override]
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ImageBatch:
        """Hand out the batch's share of its pool."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(  # type: ignore[override]
        self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> ImageBatch:
        """Hand out the batch's share of its pool."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def unclipped(self, batch: ImageBatch, dataloader_idx: int = 0) -> ImageBatch:
        """Return a copy of a finished batch whose scores and maps are in [0, 1] but were never clipped.

        Args:
            batch: A batch that a step of the running loop has returned.
            dataloader_idx: The dataloader that it came from.
        """
        scores, anomaly_maps = self._share(batch, dataloader_idx)  # at most 2, the distance of opposite unit vectors
        return batch.update(in_place=False, pred_score=scores / 2, anomaly_map=anomaly_maps / 2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which of the thresholds come from a pool, as another pool needs others."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["calibrated_on_pool"] = self._calibrated_on_pool

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over where the thresholds came from."""
        super().on_load_checkpoint(checkpoint)
        self._calibrated_on_pool = checkpoint.get("calibrated_on_pool", [])

    def _share(self, batch: ImageBatch, dataloader_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image scores ``(B,)`` and anomaly maps ``(B, H, W)`` of a batch."""
        pool = self._pools[dataloader_idx]
        positions = pool.positions(image_names(batch.image_path, batch.image))
        patch_scores = pool.patch_scores[positions].to(self.device)
        return pool.scores[positions].to(self.device), self.model.anomaly_maps(patch_scores).squeeze(1)

    def _score_pools(self, dataloaders: Any, limits: Sequence[float]) -> None:
        """Make one pool of each dataloader, taking over those that hold the same images as before."""
        if self.trainer.world_size > 1:
            msg = f"MuSc compares all images in one process, got {self.trainer.world_size}; use devices=1, num_nodes=1."
            raise ValueError(msg)
        if self.visualizer is not None:
            check_writable(Path(getattr(self.visualizer, "output_dir", None) or self.trainer.default_root_dir))
        known, self._pools, self._sources = self._pools, [], []
        settings = self._settings()
        for index, (loader, limit) in enumerate(zip(as_list(dataloaders), limits, strict=True)):
            source = PoolSource(loader, limit)
            key = (source.key, settings)
            is_known = source.is_recognised_by_files or self._scored_in_validation
            pool = next((pool for pool in known if is_known and pool.key == key), None)
            self._pools.append(pool or self._score_pool(source, key, index))
            known.append(self._pools[-1])
            self._sources.append(source)
            source.skip(self._pools[-1].skipped)
        self._scored_in_validation = self.trainer.validating
        self.skipped_images = {path: reason for pool in self._pools for path, reason in pool.skipped.items()}
        for pool in self._pools:
            pool.scores = pool.raw_scores
            if isinstance(self.post_processor, RsCINPostProcessor):
                pool.scores = self.post_processor.rescore(pool.raw_scores, pool.class_tokens)

    def _score_pool(self, source: PoolSource, key: object, dataloader_idx: int) -> Pool:
        """Extract the features of a loader's images and score them against each other."""
        skipped = self._skip(source)
        paths = source.paths
        if paths is not None:
            check_size(paths)
            check_interval(self.model.interval, len(paths) // self.model.count_subsets(len(paths)))
        try:
            names, features, class_tokens = self._extract(source, dataloader_idx)
        except (OSError, SyntaxError):  # Pillow's, which do not name a truncated file
            check_readable(paths or [])
            raise
        if len(names) < FEW_IMAGES:
            rank_zero_warn(few_images(len(names)))
        subsets = self.model.subsets(class_tokens)
        total = self.model.num_comparisons(subsets, len(features.layers))
        budget = features.remaining_budget if self.device.type == "cpu" else self.memory_budget
        with profile(self.trainer, "[MuSc]score"), progress_bar(self.trainer, "MuSc: mutual scoring", total) as advance:
            patch_scores = self.model.score(features.layers, subsets, memory_budget=budget, progress=advance)
        raw_scores = [self.model.anomaly_maps(chunk).amax(dim=(1, 2, 3)) for chunk in patch_scores.split(32)]
        source.restore()
        return Pool(key, names, patch_scores, torch.cat(raw_scores), class_tokens, skipped)

    def _skip(self, source: PoolSource) -> dict[Path, str]:
        """Leave broken files out where that is possible and enough remain; else raise a ValueError that names them."""
        paths = source.paths or []
        faults: dict[Path, str] = {}
        with progress_bar(self.trainer, "MuSc: looking at files", len(paths)) as advance:
            for path in paths:
                reason = find_fault(path)
                faults |= {path: reason} if reason else {}
                advance(1)
        can_skip = self.trainer.predicting and source.can_skip
        if faults and (not can_skip or len(paths) - len(faults) < MIN_IMAGES):
            raise unreadable(faults, len(paths))
        source.skip(faults)
        skipped = {**faults, **(closed_folders(common_folder(paths)) if can_skip else {})}
        for path, reason in skipped.items():
            rank_zero_warn(f"Skipped {path}: {reason}.")
        return skipped

    def _extract(self, source: PoolSource, dataloader_idx: int) -> tuple[list[str], FeatureStore, torch.Tensor]:
        """Return the names, the feature maps of each layer, on the host, and the class tokens ``(N, D)``."""
        names: list[str] = []
        tokens: list[torch.Tensor] = []
        features: FeatureStore | None = None
        num_images = None if source.paths is None else len(source.paths)
        deep_images = DeepImages(source.paths or [])
        with progress_bar(self.trainer, "MuSc: extracting features", source.num_batches) as advance:
            for batch in profiled(self.trainer, "[MuSc]read_images", source.batches()):
                images = self._prepare(batch, deep_images, dataloader_idx)
                with self.trainer.precision_plugin.forward_context(), profile(self.trainer, "[MuSc]extract"):
                    feature_maps, class_tokens = self.model.extract(images)
                if features is None:
                    least = self.model.least_memory(feature_maps, num_images or MIN_IMAGES)
                    features = FeatureStore(self.memory_budget, feature_maps, num_images, least)
                features.append(feature_maps)
                tokens.append(class_tokens)
                names += image_names(batch.image_path, images)
                advance(1)
        check_size(names)
        assert features is not None  # noqa: S101  # as there are names
        return names, features, torch.cat(tokens)

    def _prepare(self, batch: ImageBatch, deep_images: DeepImages, dataloader_idx: int) -> torch.Tensor:
        """Bring a batch to the device and pre-process it as anomalib's callbacks will."""
        if batch.image_path is None and self.visualizer is not None:
            msg = "The images have no image_path, by which anomalib names its pictures; use visualizer=False."
            raise ValueError(msg)
        images = self.trainer.precision_plugin.convert_input(deep_images.correct(batch))
        images = self.trainer.strategy.batch_to_device(images, dataloader_idx=dataloader_idx)
        transform = getattr(self.pre_processor, "transform", None)
        images = transform(images) if transform else images
        if tuple(images.shape[-2:]) != self.model.image_size:
            msg = (
                f"pre_processor gives images of size {tuple(images.shape[-2:])}, but image_size is "
                f"{self.model.image_size}; use the default pre_processor, or one that resizes to image_size."
            )
            raise ValueError(msg)
        return images

    def _settings(self) -> list[object]:
        """Return whatever else decides the scores of the same images."""
        model = self.model
        transforms = transform_leaves(getattr(self.pre_processor, "transform", None))
        settings = (model.image_size, model.interval, model.aggregation_degrees, model.precision, model.num_subsets)
        return [self.trainer.precision, *settings, *transforms, fingerprint(model)]

    def _calibrate(self) -> None:
        """Find the thresholds that no validation has found on those pools."""
        if isinstance(self.post_processor, PostProcessor):
            levels = uncalibrated(self.post_processor) | set(self._calibrated_on_pool)
            calibrate_on_pool(self.post_processor, self._pools, levels)
            self._calibrated_on_pool = sorted(levels)
