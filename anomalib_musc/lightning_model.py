# SPDX-License-Identifier: Apache-2.0
"""MuSc in anomalib: the pool is scored before the loop, then every step hands out its batch's share."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib import LearningType
from anomalib.data import ImageBatch, PredictDataset
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_musc.bank import most_normal
from anomalib_musc.calibration import Calibration
from anomalib_musc.checkpoints import BankCheckpoint
from anomalib_musc.checks import check_count, check_writable, unreadable
from anomalib_musc.exports import BankExport
from anomalib_musc.functional import check_budget
from anomalib_musc.metrics import PaperEvaluator
from anomalib_musc.pool import Pool, PoolSource, as_list, fingerprint, image_names, transform_leaves
from anomalib_musc.pool_scorer import PoolScorer
from anomalib_musc.post_processor import RsCINPostProcessor
from anomalib_musc.prediction_writer import PredictionWriter
from anomalib_musc.references import (
    FOLDER,
    POOL,
    TRAINING_IMAGES,
    check_bank_arguments,
    find_references,
    no_references,
)
from anomalib_musc.torch_model import MuScModel
from anomalib_musc.workarounds import FolderVisualizer, MultiLoaderPreProcessor, NoValidationData

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class MuSc(NoValidationData, BankExport, BankCheckpoint, AnomalibModule):
    """Zero-shot anomaly detection by mutual scoring of unlabelled images (Li et al., ICLR 2024, arXiv 2401.16753).

    The unlabelled images of one dataloader are its pool: when a test, validation or prediction starts, all of them are
    read once, their features are extracted and scored against each other. No training, no prompts, no labels. A pool
    that was just scored, such as a validation set that is the test set, is not scored again.

    Args:
        backbone: Name of an open_clip or timm model, or of the official release's (``ViT-L-14-336``,
            ``dinov2_vitl14``, ...), ``musc-tiny``, whose weights are in the package, or your own module; see
            :class:`~anomalib_musc.MuScModel`.
        pretrained: Weights of a named backbone: ``True`` (its default), a tag, a local file, or ``False`` (random).
        image_size: Side or (height, width) of the input in pixels. Defaults to the backbone's own.
        layers: Blocks of a named backbone, counted from 0. Defaults to the ends of its four quarters
            (of ``musc-tiny`` 0, 1, 2 and 5).
        activation: The activation function of a CLIP given by name: "official", the official release's, with which
            the published figures were made (at the default sizes ``nn.GELU``), or "weights", what the weights were
            trained with (OpenAI's with QuickGELU); see :func:`~anomalib_musc.backbones.create_backbone`. Nobody here
            could measure which is better. Defaults to a checkpoint's, else to "official".
        aggregation_degrees: LNAMD's degrees r, odd numbers.
        interval: Which of the ascending distances to the other images are averaged; a bound below 1 is a
            fraction, of 1 or more a count.
        precision: "exact", or "fast": 8-bit products on processors that have them, 16-bit ones on NVIDIA's GPUs.
        num_subsets: Into how many subsets a large pool is split at random, whose images judge each other; the time
            falls as its inverse.
        memory_budget: GiB that the pool may take, its features and scoring, on the host and on the compute device
            each. What does not fit goes to temporary files. Defaults to half of what is free.
        mode: Who judges: "mutual", the images of the pool each other, as in the paper; "reference", a bank of reference
            images, so that an image's score does not depend on the others; "both", the pool and the bank. A
            checkpoint's takes the place of "mutual".
        references: Folder of images for the bank, normal or unlabelled; those to be judged must not be among them.
            Defaults to the datamodule's training images.
        k_shot: How many of the datamodule's training images to take. Defaults to all.
        bank_size: How many references to keep, the most normal and diverse ones. Defaults to all.
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
        activation: Literal["official", "weights"] | None = None,
        aggregation_degrees: Sequence[int] = (1, 3, 5),
        interval: tuple[float, float] = (0.0, 0.3),
        precision: Literal["exact", "fast"] = "exact",
        num_subsets: int = 1,
        memory_budget: float | None = None,
        mode: Literal["mutual", "reference", "both"] = "mutual",
        references: str | Path | None = None,
        k_shot: int | None = None,
        bank_size: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        prediction_writer: PredictionWriter | bool = True,
    ) -> None:
        check_budget(memory_budget)
        check_bank_arguments(mode, references, k_shot, bank_size)
        if not isinstance(prediction_writer, (bool, PredictionWriter)):
            msg = f"prediction_writer must be True, False or a PredictionWriter, got {prediction_writer!r}."
            raise ValueError(msg)
        model = MuScModel(
            backbone,
            pretrained=pretrained,
            image_size=image_size,
            layers=layers,
            activation=activation,
            aggregation_degrees=aggregation_degrees,
            interval=interval,
            precision=precision,
            num_subsets=num_subsets,
        )
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(model.image_size, model.mean, model.std, model.interpolation)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        self.model: MuScModel = model
        self.memory_budget = memory_budget
        self.mode = mode
        self.references = references
        self.k_shot = k_shot
        self.bank_size = bank_size
        self._writes_by_default = prediction_writer is True
        self.prediction_writer = PredictionWriter() if prediction_writer is True else prediction_writer or None
        self.skipped_images: dict[Path, str] = {}
        self._sources: list[PoolSource] = []
        self._pools: list[Pool] = []
        self._calibration = Calibration()
        self._bank_of = TRAINING_IMAGES if references is None else FOLDER
        self._scored_in_validation = False
        # Lightning would pickle objects into checkpoints, which could not be loaded safely: pass them again on loading.
        given = {"backbone": backbone, "prediction_writer": prediction_writer}
        for name in (name for name, value in given.items() if isinstance(value, (nn.Module, PredictionWriter))):
            vars(self)["_hparams"].pop(name)
            vars(self)["_hparams_initial"].pop(name)

    @property
    def learning_type(self) -> LearningType:
        """Few-shot where a bank is made of a datamodule's normal training images, else zero-shot."""
        is_few_shot = self.mode != "mutual" and self._bank_of == TRAINING_IMAGES
        return LearningType.FEW_SHOT if is_few_shot else LearningType.ZERO_SHOT

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
        own: list[Callback] = [_RestoreOnException()]
        is_given = False
        with suppress(RuntimeError):  # no trainer yet
            given: Any = self.trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
            is_given = any(isinstance(callback, PredictionWriter) for callback in given)
        if self.prediction_writer and not (self._writes_by_default and is_given):
            own.append(self.prediction_writer)  # Lightning would drop the one that a user gave to Engine
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), *own]

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is trained."""

    def on_validation_start(self) -> None:
        """Score the validation pools."""
        self._calibration.forget(self.post_processor, self._calibration.without_labels)
        self._score_pools(self.trainer.val_dataloaders, self.trainer.num_val_batches)

    def on_validation_epoch_end(self) -> None:
        """Find the thresholds that labels have not given, before a checkpoint is written."""
        if self.mode == "reference":
            self.calibrate()

    def teardown(self, stage: str) -> None:
        """Make the bank where there was nothing to validate on, for then Lightning skips all that is above.

        Not in :meth:`setup`, where nobody knows yet whether a checkpoint will bring one.
        """
        super().teardown(stage)
        if stage == "validate" and self.mode != "mutual":
            self._prepare_bank()
            if self.mode == "reference":
                self.calibrate()

    def on_test_start(self) -> None:
        """Score the test pools."""
        self._score_pools(self.trainer.test_dataloaders, self.trainer.num_test_batches)
        self.calibrate()

    def on_predict_start(self) -> None:
        """Score the prediction pools."""
        self._score_pools(self.trainer.predict_dataloaders, self.trainer.num_predict_batches)
        self.calibrate()

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
        # Maps are at most 2, the distance of opposite unit vectors; a bank's scores have no bound.
        scores, anomaly_maps = self._share(batch, dataloader_idx)
        scores = (1 + scores / (1 + scores.abs())) / 2 if self.mode == "reference" else scores / 2
        return batch.update(in_place=False, pred_score=scores, anomaly_map=anomaly_maps / 2)

    def keep_bank(self, size: int = 16) -> None:
        """Make a bank of the most normal and diverse images of the pools that were just scored.

        From then on every image is judged by the bank alone, and thresholds come from it: those of labels were of the
        pool's scale, so validate again for others.

        Args:
            size: How many images to keep.

        Raises:
            RuntimeError: If no pool was scored, or its images have no files.
            ValueError: If ``size`` is no whole number of at least 1.
        """
        check_count("size", size)
        files = [(pool, index) for pool in self._pools for index, name in enumerate(pool.names) if Path(name).is_file()]
        if not files:
            msg = "No pool of image files was scored: call Engine.test or Engine.predict first."
            raise RuntimeError(msg)
        scores = torch.stack([pool.raw_scores[index] for pool, index in files])
        tokens = torch.stack([pool.class_tokens[index] for pool, index in files])
        kept = most_normal(scores, tokens, min(size, len(files)))
        paths = [Path(files[index][0].names[files[index][1]]) for index in kept]
        dataset = PredictDataset(paths[0])
        dataset.image_filenames = paths
        self._scorer.fill_bank(DataLoader(dataset, collate_fn=dataset.collate_fn), None)
        self._pools, self._bank_of = [], POOL
        self.take_mode("reference")
        self._calibration.forget(self.post_processor)
        self.calibrate()

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
        if self.mode != "mutual":
            self._prepare_bank()
        known, self._pools, self._sources = self._pools, [], []
        settings = self._settings()
        for index, (loader, limit) in enumerate(zip(as_list(dataloaders), limits, strict=True)):
            source = PoolSource(loader, limit)
            key = (source.key, settings)
            is_known = source.is_recognised_by_files or self._scored_in_validation
            pool = next((pool for pool in known if is_known and pool.key == key), None)
            if pool is not None and pool.skipped and not source.can_skip:
                raise unreadable(pool.skipped, len(source.all_paths))
            self._pools.append(pool or self._scorer.score(source, key, index))
            known.append(self._pools[-1])
            self._sources.append(source)
            source.skip(self._pools[-1].skipped)
        self._scored_in_validation = self.trainer.validating
        self.skipped_images = {path: reason for pool in self._pools for path, reason in pool.skipped.items()}
        bank = self.model.bank if self.mode == "reference" else None
        for pool in self._pools:
            pool.scores = pool.raw_scores
            if isinstance(self.post_processor, RsCINPostProcessor):
                pool.scores = self.post_processor.rescore(pool.raw_scores, pool.class_tokens, bank)

    def _prepare_bank(self) -> None:
        """Make the bank, or make it anew where its images are not those that it is to be made of now."""
        bank = self.model.bank
        is_gone = self.references is not None and not Path(self.references).exists()
        if len(bank) and (bank.origin is None or is_gone):  # of a checkpoint or by hand, or all there is
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        found = find_references(self.references, datamodule, self.k_shot, self.bank_size)
        if found is None and not len(bank):
            raise no_references(self.mode)
        if found is None or bank.origin == found.origin:
            return
        if len(bank):
            rank_zero_warn("The bank is made anew, as its reference images or their number have changed.")
        device = bank.class_tokens.device
        self.to(self.trainer.strategy.root_device)  # from which Lightning has taken it before teardown
        is_another = len(bank) > 0
        self._scorer.fill_bank(found.loader, self.bank_size)
        if is_another:
            self._calibration.forget(self.post_processor)
        self.to(device)
        bank.origin, self._bank_of = found.origin, found.kind

    @property
    def _scorer(self) -> PoolScorer:
        transform = getattr(self.pre_processor, "transform", None)
        needs_paths = self.visualizer is not None
        return PoolScorer(self.trainer, self.model, self.mode, self.memory_budget, transform, needs_paths)

    def _settings(self) -> list[object]:
        """Return whatever else decides the scores of the same images."""
        model = self.model
        transforms = transform_leaves(getattr(self.pre_processor, "transform", None))
        settings = (model.image_size, model.interval, model.aggregation_degrees, model.precision, model.num_subsets)
        activation = getattr(model.backbone, "activation", None)  # a checkpoint may change it, and no weight shows it
        return [self.trainer.precision, self.mode, *settings, activation, *transforms, fingerprint(model)]

    def calibrate(self) -> None:
        """Find the thresholds that no labels have given: of the bank where it judges alone, else of the pools."""
        if self.mode == "reference":
            may_hold_defects = self._bank_of == FOLDER
            self._calibration.find_on_bank(self.post_processor, self.model, may_hold_defects=may_hold_defects)
        else:
            self._calibration.find_on_pools(self.post_processor, self._pools)


class _RestoreOnException(Callback):
    """Bring back the files that were left out, where a loop ends early."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        del trainer, exception
        pl_module.on_predict_end()
