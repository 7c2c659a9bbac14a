# SPDX-License-Identifier: Apache-2.0
"""From a dataloader to a scored pool: read and prepare the images, run the backbone, score."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_musc.compat.progress import profile, profiled, progress_bar
from anomalib_musc.functional.peaks import Peaks, find_peaks
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.pool.checks import (
    FEW_IMAGES,
    MIN_IMAGES,
    check_input_size,
    check_size,
    few_images,
    find_fault,
    in_words,
    unreadable,
)
from anomalib_musc.pool.feature_store import FeatureStore
from anomalib_musc.pool.folder import InputFolders, say_notes, say_skipped
from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.groups import find_groups
from anomalib_musc.pool.large_images import how_cut, other_sizes, slow_search
from anomalib_musc.pool.pool import Pool
from anomalib_musc.pool.reader import PoolReader
from anomalib_musc.pool.source import PoolSource
from anomalib_musc.pool.warnings import median_features, shows_nothing, warn_of_pool
from anomalib_musc.torch_model import MuScModel

_PIXELS = 2**23  # of maps that are held at once
_LONG = 60  # seconds of extraction from which on its length is said


class Features(NamedTuple):
    """What the backbone gave for a batch: names, one map ``(B, C, h, w)`` a layer, class tokens ``(B, D)``."""

    names: list[str]
    feature_maps: list[torch.Tensor]
    class_tokens: torch.Tensor


class _Scored(NamedTuple):
    """Names, patch scores ``(N, h, w)``, class tokens ``(N, D)``, median features ``(N, C)``, and peaks if found."""

    names: list[str]
    patch_scores: torch.Tensor
    class_tokens: torch.Tensor
    median_features: torch.Tensor
    peaks: Peaks | None = None


class PoolScorer:
    """Score the images of dataloaders within a running trainer.

    Args:
        trainer: The trainer, whose device, precision, progress bar and profiler are used.
        model: The model.
        mode: "mutual", "reference" or "both", see :class:`~anomalib_musc.MuSc`.
        memory_budget: GiB for features and scoring on the host and on the device each.
        batch_size: How many images the backbone takes at once.
        transform: Prepares images ``(B, 3, H, W)`` in [0, 1] for the backbone.
        needs_paths: Whether images without a path are an error.
        result_folders: Folders of earlier results, which are no input.
        thumbnail: Makes a small picture of each image file, see :class:`~anomalib_musc.pool.reader.PoolReader`.
        grey_range: Black and white of grey images of more than 8 bits; ``None`` to find them in the images.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MuScModel,
        mode: str,
        memory_budget: float | None,
        batch_size: int,
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
        needs_paths: bool,
        result_folders: Collection[Path] = (),
        thumbnail: Callable[[torch.Tensor], bytes] | None = None,
        grey_range: GreyRange | None = None,
    ) -> None:
        self._trainer = trainer
        self._model = model
        self._mode = mode
        self._memory_budget = memory_budget
        self._batch_size = batch_size
        self._transform = transform
        self._needs_paths = needs_paths
        self._result_folders = result_folders
        self._thumbnail = thumbnail
        self.grey_range = grey_range
        self._device = model.bank.class_tokens.device  # not the trainer's, which has moved the model away at its end

    def score(self, source: PoolSource, key: object) -> Pool:
        """Extract the features of a source's images and score them.

        Raises:
            ValueError: If there are too few images, or one cannot be read.
        """
        folder = self._folder(source)
        reader = PoolReader(
            source,
            self._transform,
            self._to_device,
            self._batch_size,
            reason_to_skip=folder.reason_to_skip if folder else None,
            grey_range=self.grey_range,
            needs_grey_range=self._mode == "reference",
            needs_paths=self._needs_paths,
            thumbnail=self._thumbnail,
        )
        self._check_before(source, can_skip=folder is not None)
        found = self._score_by_bank(reader, source) if self._mode == "reference" else self._score_pool(reader, source)
        at_once = max(1, _PIXELS // math.prod(self._model.image_size))
        maps = (self._model.anomaly_maps(part) for part in found.patch_scores.split(at_once))
        raw_scores = torch.cat([part.amax(dim=(1, 2, 3)) for part in maps])
        skipped = reader.skipped | (folder.passed_over() if folder else {})
        references = median_features(self._model.bank.feature_maps) if self._num_references else None
        groups = find_groups(found.names, found.median_features, found.peaks, self._reach)
        warnings = [group.text for group in groups]
        warnings += warn_of_pool(reader.looks, found.median_features, references, raw_scores)
        warnings += other_sizes(self._model, reader.sizes)
        for sentence in [*say_skipped(skipped), *say_notes(reader.notes), *warnings]:
            rank_zero_warn(sentence)
        for sentence in folder.what_was_taken(found.names, skipped) if folder else []:
            rank_zero_info(sentence)
        self._say_how_read(reader)
        if self._model.tiles is not None:
            rank_zero_info(how_cut(self._model))
        return Pool(
            key,
            found.names,
            found.patch_scores,
            found.class_tokens,
            raw_scores=raw_scores,
            scores=raw_scores,
            skipped=skipped,
            sizes=reader.sizes,
            high_bit_depth=frozenset(reader.high_bit_depth),
            thumbnails=reader.thumbnails,
            orientations=reader.orientations,
            notes=reader.notes,
            warnings=tuple(warnings),
            shows_nothing=self._mode != "reference" and shows_nothing(reader.looks, raw_scores),
            given_range=self.grey_range,
            grey_range=reader.grey_range,
            groups=tuple(groups),
        )

    def _say_how_read(self, reader: PoolReader) -> None:
        if self.grey_range is None and reader.grey_range is not None:
            black, white = reader.grey_range
            rank_zero_info(
                f"Grey images of more than 8 bits: {black:g} is black and {white:g} is white, found in all of them; "
                "MuSc(grey_range=(black, white)) names others."
            )
        if reader.orientations:
            rank_zero_info(
                f"{len(reader.orientations)} images are turned as viewers show them, by their EXIF orientation; masks "
                "are taken to lie so, too."
            )

    def _folder(self, source: PoolSource) -> InputFolders | None:
        """Return the folder of a prediction, from which files can be left out; ``None`` for another source."""
        if not self._can_skip(source):
            return None
        return InputFolders(source, self._trainer.default_root_dir, self._result_folders)

    def extract_references(
        self, source: PoolSource, size: int | None
    ) -> tuple[list[tuple[list[torch.Tensor], torch.Tensor]], GreyRange | None]:
        """Return maps and class tokens of reference images, and black and white where one has more than 8 bits.

        Args:
            source: The images.
            size: How many will be kept, ``None`` for all.

        Raises:
            ValueError: If an image cannot be read, or the interval does not suit so many.
        """
        self._look_at_files(source)
        if source.paths and self._mode != "both":
            self._model.check_bank_size(len(source.paths), size)
        reader = PoolReader(source, self._transform, self._to_device, self._batch_size, grey_range=self.grey_range)
        features = [found[1:] for found in self._features(reader, source, "MuSc: extracting references")]
        self._say_how_read(reader)
        return features, reader.grey_range

    def taken_over(self, pool: Pool, source: PoolSource) -> Pool:
        """Return a pool that was scored before; a ValueError where it lacks files that may not be left out now."""
        folder = self._folder(source)
        listed = {path: pool.skipped[path] for path in source.listed(pool.skipped)}
        if listed and folder is None:
            raise unreadable(listed, len(source.all_paths))
        return replace(pool, skipped=listed | (folder.passed_over() if folder else {}))

    def _can_skip(self, source: PoolSource) -> bool:
        return self._trainer.predicting and source.can_skip

    def _check_before(self, source: PoolSource, can_skip: bool) -> None:
        """Find what can be found before the long work starts."""
        if not can_skip:
            self._look_at_files(source)
        if source.paths is not None:
            num_references = self._num_references
            check_size(source.paths, num_references)
            if self._mode != "reference":
                self._model.check_pool_size(len(source.paths), num_references)

    def _look_at_files(self, source: PoolSource) -> None:
        """Raise a ValueError that names all files which are no images."""
        paths = source.paths or []
        faults: dict[Path, str] = {}
        with progress_bar(self._trainer, "MuSc: looking at files", len(paths)) as advance:
            for path in paths:
                reason = find_fault(path)
                faults |= {path: reason} if reason else {}
                advance(1)
        if faults:
            raise unreadable(faults, len(paths))

    def _score_by_bank(self, reader: PoolReader, source: PoolSource) -> _Scored:
        """Compare every image with the bank alone."""
        names: list[str] = []
        scores, tokens, medians = [], [], []
        for features in self._features(reader, source):
            with profile(self._trainer, "[MuSc]score"):
                scores.append(self._model.bank.patch_scores(features.feature_maps))
            tokens.append(features.class_tokens)
            medians.append(median_features(features.feature_maps))
            names += features.names
        self._check_number(names, reader, least=1)
        return _Scored(names, torch.cat(scores), torch.cat(tokens), torch.cat(medians))

    def _score_pool(self, reader: PoolReader, source: PoolSource) -> _Scored:
        """Compare the images of a pool with each other, and with the bank in mode "both"."""
        bank = self._model.bank if self._mode == "both" else None
        names, features, class_tokens, medians = self._extract(reader, source, bank)
        references = range(len(names), len(names) + (len(bank) if bank else 0))
        if len(names) + len(references) < FEW_IMAGES:
            rank_zero_warn(few_images(len(names), len(references)))
        self._model.check_pool_size(len(names), len(references))
        subsets = [[*subset, *references] for subset in self._model.subsets(class_tokens)]
        total = self._model.num_comparisons(subsets, len(features.layers))
        if warning := slow_search(self._model, features.layers, sum(math.comb(len(subset), 2) for subset in subsets)):
            rank_zero_warn(warning)
        budget = features.remaining_budget if self._device.type == "cpu" else self._memory_budget
        with (
            profile(self._trainer, "[MuSc]score"),
            progress_bar(self._trainer, "MuSc: mutual scoring", total) as advance,
        ):
            patch_scores = self._model.score(features.layers, subsets, memory_budget=budget, progress=advance)
        patch_scores, peaks = patch_scores[: len(names)], None
        if self._model.second_interval is not None:  # without it, no defect of many images has a peak
            layers = [maps[: len(names)] for maps in features.layers]
            peaks = find_peaks(layers, patch_scores, 2 * self._reach + 1, device=self._device)
        return _Scored(names, patch_scores, class_tokens, medians, peaks)

    def _extract(
        self, reader: PoolReader, source: PoolSource, bank: ReferenceBank | None
    ) -> tuple[list[str], FeatureStore, torch.Tensor, torch.Tensor]:
        """Return names, feature maps of each layer, on the host, class tokens ``(N, D)``, median features ``(N, C)``.

        The maps of a bank follow those of the pool.
        """
        names: list[str] = []
        tokens: list[torch.Tensor] = []
        medians: list[torch.Tensor] = []
        store: FeatureStore | None = None
        num_images = None if source.paths is None else len(source.paths) + self._num_references
        for features in self._features(reader, source):
            if store is None:
                least = self._model.least_memory(features.feature_maps, num_images or MIN_IMAGES)
                store = FeatureStore(self._memory_budget, features.feature_maps, num_images, least)
            store.append(features.feature_maps)
            medians.append(median_features(features.feature_maps))
            tokens.append(features.class_tokens)
            names += features.names
        self._check_number(names, reader, least=1 if bank else MIN_IMAGES)
        assert store is not None  # noqa: S101  # as there are names
        if bank:
            store.append(bank.feature_maps)
        return names, store, torch.cat(tokens), torch.cat(medians)

    def _features(
        self, reader: PoolReader, source: PoolSource, description: str = "MuSc: extracting features"
    ) -> Iterator[Features]:
        """Run the backbone on what a reader gives."""
        total = float("inf") if source.paths is None else len(source.paths)
        num_skipped, is_first = 0, True
        with progress_bar(self._trainer, description, total) as advance:
            for names, images in profiled(self._trainer, "[MuSc]read_images", reader.batches()):
                check_input_size(images, self._model.image_size)
                start = time.perf_counter()
                with self._trainer.precision_plugin.forward_context(), profile(self._trainer, "[MuSc]extract"):
                    feature_maps, class_tokens = self._model.extract(images)
                if is_first:
                    seconds = (time.perf_counter() - start) * (total / len(names) - 1)
                    is_first = False
                    self._say_how_long(seconds, images)
                yield Features(names, feature_maps, class_tokens)
                advance(len(names) + len(reader.skipped) - num_skipped)
                num_skipped = len(reader.skipped)
            advance(len(reader.skipped) - num_skipped)

    def _say_how_long(self, seconds: float, images: torch.Tensor) -> None:
        """Say how long an extraction will take, where it is long, and whether "fast" precision would help."""
        if not _LONG <= seconds < float("inf"):
            return
        text = f"Extracting the other features will take about {in_words(seconds)} on {self._device}."
        if self._model.precision == "exact":
            with self._trainer.precision_plugin.forward_context():
                gain = self._model.gain_of_half_precision(images)
            if gain > 1:
                text += f" precision='fast' (--fast) would take {1 / gain:.0%} of that."
        rank_zero_info(text)

    def _check_number(self, names: list[str], reader: PoolReader, least: int) -> None:
        if reader.skipped and len(names) < least:
            raise unreadable(reader.skipped, len(names) + len(reader.skipped))
        check_size(names, self._num_references)

    @property
    def _reach(self) -> int:
        """Rows and columns from a place to the border of its window, at the middle one of the degrees; 1 at least."""
        degrees = sorted(self._model.aggregation_degrees)
        return max(1, degrees[len(degrees) // 2] // 2)

    @property
    def _num_references(self) -> int:
        return len(self._model.bank) if self._mode != "mutual" else 0

    def _to_device(self, images: Any) -> torch.Tensor:
        images = self._trainer.precision_plugin.convert_input(images)
        moved: torch.Tensor = self._trainer.strategy.batch_to_device(images, self._device)
        return moved
