# SPDX-License-Identifier: Apache-2.0
"""From a dataloader to a scored pool: look at the files, read and pre-process them, run the backbone, score."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from anomalib_musc.functional import check_interval
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.output.files import common_folder
from anomalib_musc.output.prediction_writer import PredictionWriter
from anomalib_musc.output.progress import profile, profiled, progress_bar
from anomalib_musc.pool.checks import (
    FEW_IMAGES,
    MIN_IMAGES,
    check_readable,
    check_size,
    closed_folders,
    few_images,
    find_fault,
    unreadable,
)
from anomalib_musc.pool.feature_store import FeatureStore
from anomalib_musc.pool.high_bit_depth import DeepImages
from anomalib_musc.pool.source import Pool, PoolSource, image_names
from anomalib_musc.torch_model import MuScModel


class PoolScorer:
    """Score the images of dataloaders within a running trainer.

    Args:
        trainer: The trainer, whose device, precision, progress bar and profiler are used.
        model: The model.
        mode: "mutual", "reference" or "both", see :class:`~anomalib_musc.MuSc`.
        memory_budget: GiB for features and scoring on the host and on the device each.
        transform: Prepares images ``(B, 3, H, W)`` in [0, 1] for the backbone.
        needs_paths: Whether images without a path are an error.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MuScModel,
        mode: str,
        memory_budget: float | None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
        needs_paths: bool,
    ) -> None:
        self._trainer = trainer
        self._model = model
        self._mode = mode
        self._memory_budget = memory_budget
        self._transform = transform
        self._needs_paths = needs_paths
        self._device = model.bank.class_tokens.device  # not the trainer's, which has moved the model away at its end

    def score(self, source: PoolSource, key: object, dataloader_idx: int) -> Pool:
        """Extract the features of a loader's images and score them against each other."""
        is_folder = self._can_skip(source) and len(source.all_paths) > 1  # one path may be that of a file
        closed = closed_folders(common_folder(source.all_paths)) if is_folder else {}
        skipped = self._skip_faults(source, lambda path: find_fault(path) or self._reason_of_result(path))
        _warn_of(closed)
        skipped |= closed
        try:
            return self._score(source, key, dataloader_idx, skipped)
        except (OSError, SyntaxError, ValueError):  # Pillow's on files that look whole, which it does not name
            broken = self._skip_faults(source, lambda path: find_fault(path, decode=True))
            if not broken:
                raise
            return self._score(source, key, dataloader_idx, {**skipped, **broken})
        finally:
            source.restore()

    def _score(self, source: PoolSource, key: object, dataloader_idx: int, skipped: dict[Path, str]) -> Pool:
        paths = source.paths
        judges = len(self._model.bank) if self._mode != "mutual" else 0
        if paths is not None:
            check_size(paths, judges)
        if paths is not None and self._mode != "reference":
            check_interval(self._model.interval, len(paths) // self._model.count_subsets(len(paths)) + judges)
        score = self._score_by_bank if self._mode == "reference" else self._score_mutually
        names, patch_scores, class_tokens = score(source, dataloader_idx)
        raw_scores = [self._model.anomaly_maps(chunk).amax(dim=(1, 2, 3)) for chunk in patch_scores.split(32)]
        return Pool(key, names, patch_scores, torch.cat(raw_scores), class_tokens, skipped)

    def _score_by_bank(self, source: PoolSource, dataloader_idx: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Return names, patch scores ``(N, h, w)`` and class tokens, every image judged by the bank alone."""
        names: list[str] = []
        scores, tokens = [], []
        for batch_names, feature_maps, class_tokens in self._features(
            source, dataloader_idx, self._deep_images(source)
        ):
            with profile(self._trainer, "[MuSc]score"):
                scores.append(self._model.bank.patch_scores(feature_maps))
            tokens.append(class_tokens)
            names += batch_names
        check_size(names, len(self._model.bank))
        return names, torch.cat(scores), torch.cat(tokens)

    def _score_mutually(self, source: PoolSource, dataloader_idx: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Return names, patch scores ``(N, h, w)`` and class tokens of a pool, a bank's images as judges besides."""
        bank = self._model.bank if self._mode == "both" else None
        names, features, class_tokens = self._extract(source, dataloader_idx, bank)
        judges = range(len(names), len(names) + (len(bank) if bank else 0))
        check_size(names, len(judges))
        if len(names) + len(judges) < FEW_IMAGES:
            rank_zero_warn(few_images(len(names), len(judges)))
        subsets = [[*subset, *judges] for subset in self._model.subsets(class_tokens)]
        total = self._model.num_comparisons(subsets, len(features.layers))
        budget = features.remaining_budget if self._device.type == "cpu" else self._memory_budget
        with (
            profile(self._trainer, "[MuSc]score"),
            progress_bar(self._trainer, "MuSc: mutual scoring", total) as advance,
        ):
            patch_scores = self._model.score(features.layers, subsets, memory_budget=budget, progress=advance)
        return names, patch_scores[: len(names)], class_tokens

    def fill_bank(self, loader: "DataLoader[Any]", size: int | None) -> None:
        """Extract reference images and keep them."""
        source = PoolSource(loader, float("inf"))
        check_readable(source.paths or [])
        if source.paths and self._mode != "both":
            self._model.check_bank_size(len(source.paths), size)
        deep_images = DeepImages(source.all_paths)
        batches = self._features(source, 0, deep_images, "MuSc: extracting references")
        white = self._model.bank.white.item()  # which a user may have named
        self._model.fill_bank(((maps, tokens) for _, maps, tokens in batches), size, is_alone=self._mode != "both")
        self._model.bank.white.fill_(deep_images.white or white)

    def _skip_faults(self, source: PoolSource, find: Callable[[Path], str | None]) -> dict[Path, str]:
        """Leave broken files out where that is possible and enough remain; else raise a ValueError that names them."""
        can_skip = self._can_skip(source)
        paths = source.all_paths if can_skip else source.paths or []
        faults: dict[Path, str] = {}
        with progress_bar(self._trainer, "MuSc: looking at files", len(paths)) as advance:
            for path in paths:
                reason = find(path)
                faults |= {path: reason} if reason else {}
                advance(1)
        least = 1 if self._mode != "mutual" else MIN_IMAGES
        if faults and (not can_skip or len(paths) - len(faults) < least):
            raise unreadable(faults, len(paths))
        source.skip(faults)
        _warn_of(faults)
        return faults

    def _can_skip(self, source: PoolSource) -> bool:
        return self._trainer.predicting and source.can_skip

    def _reason_of_result(self, path: Path) -> str | None:
        """Say so where a file is a picture of an earlier prediction."""
        is_result = any(folder in path.parents for folder in self._result_folders)
        return "a result of an earlier prediction" if self._trainer.predicting and is_result else None

    @cached_property
    def _result_folders(self) -> set[Path]:
        results = Path(self._trainer.default_root_dir)
        folders = {results / "images", results / "heatmaps"}
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
            if isinstance(callback, PredictionWriter):
                folders.add(callback.folder(self._trainer) / "heatmaps")
            elif isinstance(callback, ImageVisualizer) and callback.output_dir is not None:
                folders.add(Path(callback.output_dir))
        return {folder.resolve() for folder in folders}

    def _extract(
        self, source: PoolSource, dataloader_idx: int, bank: ReferenceBank | None
    ) -> tuple[list[str], FeatureStore, torch.Tensor]:
        """Return the names, the feature maps of each layer, on the host, and the class tokens ``(N, D)``.

        The maps of a bank follow those of the pool.
        """
        names: list[str] = []
        tokens: list[torch.Tensor] = []
        features: FeatureStore | None = None
        judges = len(bank) if bank else 0
        num_images = None if source.paths is None else len(source.paths) + judges
        for batch_names, feature_maps, class_tokens in self._features(
            source, dataloader_idx, self._deep_images(source)
        ):
            if features is None:
                least = self._model.least_memory(feature_maps, num_images or MIN_IMAGES)
                features = FeatureStore(self._memory_budget, feature_maps, num_images, least)
            features.append(feature_maps)
            tokens.append(class_tokens)
            names += batch_names
        check_size(names, judges)
        assert features is not None  # noqa: S101  # as there are names
        if bank:
            features.append(bank.feature_maps)
        return names, features, torch.cat(tokens)

    def _deep_images(self, source: PoolSource) -> DeepImages:
        """The deep images of a source; a bank's have decided what is white, so that no score depends on the others."""
        white = self._model.bank.white.item() if self._mode != "mutual" else 0
        deep_images = DeepImages(source.all_paths if source.paths is None else source.paths, white or None)
        if self._mode == "reference" and not white and deep_images.white not in (None, 1.0):  # fractions are known
            msg = (
                f"{min(deep_images.paths)} has more than 8 bits and the references have not: nobody knows which value "
                "is white. Take references of the same camera, or name the value: model.model.bank.white.fill_(4095)."
            )
            raise ValueError(msg)
        return deep_images

    def _features(
        self,
        source: PoolSource,
        dataloader_idx: int,
        deep_images: DeepImages,
        description: str = "MuSc: extracting features",
    ) -> Iterator[tuple[list[str], list[torch.Tensor], torch.Tensor]]:
        """Read a source and run the backbone; yields names, maps ``(B, C, h, w)`` and class tokens ``(B, D)``."""
        for names, images in self._images(source, dataloader_idx, deep_images, description):
            with self._trainer.precision_plugin.forward_context(), profile(self._trainer, "[MuSc]extract"):
                feature_maps, class_tokens = self._model.extract(images)
            yield names, feature_maps, class_tokens

    def _images(
        self, source: PoolSource, dataloader_idx: int, deep_images: DeepImages, description: str
    ) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Read a source; yields names and pre-processed images ``(B, 3, H, W)``."""
        with progress_bar(self._trainer, description, source.num_batches) as advance:
            for batch in profiled(self._trainer, "[MuSc]read_images", source.batches()):
                images = self._prepare(batch, deep_images, dataloader_idx)
                yield image_names(batch.image_path, images), images
                advance(1)

    def _prepare(self, batch: ImageBatch, deep_images: DeepImages, dataloader_idx: int) -> torch.Tensor:
        """Bring a batch to the device and pre-process it as anomalib's callbacks will."""
        if batch.image_path is None and self._needs_paths:
            msg = "The images have no image_path, by which anomalib names its pictures; use visualizer=False."
            raise ValueError(msg)
        images = self._trainer.precision_plugin.convert_input(deep_images.correct(batch))
        images = self._trainer.strategy.batch_to_device(images, self._device, dataloader_idx)
        images = self._transform(images) if self._transform else images
        if tuple(images.shape[-2:]) != self._model.image_size:
            msg = (
                f"pre_processor gives images of size {tuple(images.shape[-2:])}, but image_size is "
                f"{self._model.image_size}; use the default pre_processor, or one that resizes to image_size."
            )
            raise ValueError(msg)
        return images


def _warn_of(skipped: dict[Path, str]) -> None:
    for path, reason in skipped.items():
        rank_zero_warn(f"Skipped {path}: {reason}.")
