# SPDX-License-Identifier: Apache-2.0
"""From a dataloader to a scored pool: read and prepare the images, run the backbone, score."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from anomalib_musc.compat.progress import progress_bar
from anomalib_musc.distances import gathered, together
from anomalib_musc.pool.checks import check_size, find_fault, unreadable
from anomalib_musc.pool.extraction import extract
from anomalib_musc.pool.findings import Findings
from anomalib_musc.pool.folder import InputFolders, say_notes, say_skipped
from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.groups import find_groups
from anomalib_musc.pool.large_images import how_cut, other_sizes
from anomalib_musc.pool.pool import Pool
from anomalib_musc.pool.reader import PoolReader
from anomalib_musc.pool.scoring import ImageScorer
from anomalib_musc.pool.source import PoolSource
from anomalib_musc.pool.warnings import median_features, shows_nothing, warn_of_pool

_PIXELS = 2**23  # of maps that are held at once


class PoolScorer:
    """Score the images of dataloaders within a running trainer.

    Args:
        images: Extracts and scores the images that are read.
        batch_size: How many images the backbone takes at once.
        transform: Prepares images ``(B, 3, H, W)`` in [0, 1] for the backbone.
        needs_paths: Whether images without a path are an error.
        result_folders: Folders of earlier results, which are no input.
        thumbnail: Makes a small picture of each image file, see :class:`~anomalib_musc.pool.reader.PoolReader`.
        grey_range: Black and white of grey images of more than 8 bits; ``None`` to find them in the images.
    """

    def __init__(
        self,
        images: ImageScorer,
        batch_size: int,
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
        needs_paths: bool,
        result_folders: Collection[Path] = (),
        thumbnail: Callable[[torch.Tensor], bytes] | None = None,
        grey_range: GreyRange | None = None,
    ) -> None:
        self._images = images
        self._batch_size = batch_size
        self._transform = transform
        self._needs_paths = needs_paths
        self._result_folders = result_folders
        self._thumbnail = thumbnail
        self.grey_range = grey_range

    def score(self, source: PoolSource, key: object) -> Pool:
        """Extract the features of a source's images and score them.

        Raises:
            ValueError: If there are too few images, or one cannot be read.
        """
        folder = self._folder(source)
        share = source.share(self._images.processes)
        reader = PoolReader(
            share,
            self._transform,
            self._to_device,
            self._batch_size,
            reason_to_skip=folder.reason_to_skip if folder else None,
            grey_range=self.grey_range,
            needs_grey_range=self._images.mode == "reference",
            needs_paths=self._needs_paths,
            thumbnail=self._thumbnail,
            processes=self._images.processes,
        )
        together(self._images.processes, lambda: self._check_before(share, can_skip=folder is not None))
        num_images = None if share.paths is None else len(share.paths)
        score = self._images.by_bank if self._images.mode == "reference" else self._images.by_each_other
        found = score(reader, num_images)
        at_once = max(1, _PIXELS // math.prod(self._images.model.image_size))
        maps = (self._images.model.anomaly_maps(part) for part in found.patch_scores.split(at_once))
        raw_scores = torch.cat([part.amax(dim=(1, 2, 3)) for part in maps])
        findings = Findings.joined(gathered(self._images.processes, reader.findings))
        skipped = findings.skipped | (folder.passed_over() if folder else {})
        references = median_features(self._images.model.bank.feature_maps) if self._images.num_references else None
        features = found.median_features.cpu()
        groups = find_groups(found.names, features, found.peaks, self._images.reach)
        warnings = [group.text for group in groups]
        warnings += warn_of_pool(findings.looks, features, references, raw_scores)
        warnings += other_sizes(self._images.model, findings.sizes)
        for sentence in [*say_skipped(skipped), *say_notes(findings.notes), *warnings]:
            rank_zero_warn(sentence)
        for sentence in folder.what_was_taken(found.names, skipped) if folder else []:
            rank_zero_info(sentence)
        self._say_how_read(reader.grey_range, findings)
        return Pool(
            key,
            found.names,
            found.patch_scores,
            found.class_tokens,
            raw_scores=raw_scores,
            scores=raw_scores,
            skipped=skipped,
            sizes=findings.sizes,
            high_bit_depth=frozenset(findings.high_bit_depth),
            thumbnails=findings.thumbnails,
            orientations=findings.orientations,
            notes=findings.notes,
            warnings=tuple(warnings),
            shows_nothing=self._images.mode != "reference" and shows_nothing(findings.looks, raw_scores),
            given_range=self.grey_range,
            grey_range=reader.grey_range,
            groups=tuple(groups),
        )

    def _say_how_read(self, grey_range: GreyRange | None, findings: Findings) -> None:
        if self.grey_range is None and grey_range is not None:
            black, white = grey_range
            rank_zero_info(
                f"Grey images of more than 8 bits: {black:g} is black and {white:g} is white, found in all of them; "
                "MuSc(grey_range=(black, white)) names others."
            )
        if findings.orientations:
            rank_zero_info(
                f"{len(findings.orientations)} images are turned as viewers show them, by their EXIF orientation; "
                "masks are taken to lie so, too."
            )
        if self._images.model.tiles is not None:
            rank_zero_info(how_cut(self._images.model))

    def _folder(self, source: PoolSource) -> InputFolders | None:
        """Return the folder of a prediction, from which files can be left out; ``None`` for another source."""
        if not self._can_skip(source):
            return None
        return InputFolders(source, self._images.trainer.default_root_dir, self._result_folders)

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
        if source.paths and self._images.mode != "both":
            self._images.model.check_bank_size(len(source.paths), size)
        reader = PoolReader(source, self._transform, self._to_device, self._batch_size, grey_range=self.grey_range)
        num_images = None if source.paths is None else len(source.paths)
        found = extract(self._images.trainer, self._images.model, reader, num_images, "MuSc: extracting references")
        features = [batch[1:] for batch in found]
        self._say_how_read(reader.grey_range, reader.findings)
        return features, reader.grey_range

    def taken_over(self, pool: Pool, source: PoolSource) -> Pool:
        """Return a pool that was scored before; a ValueError where it lacks files that may not be left out now."""
        folder = self._folder(source)
        listed = {path: pool.skipped[path] for path in source.listed(pool.skipped)}
        if listed and folder is None:
            raise unreadable(listed, len(source.all_paths))
        return replace(pool, skipped=listed | (folder.passed_over() if folder else {}))

    def _can_skip(self, source: PoolSource) -> bool:
        return self._images.trainer.predicting and source.can_skip

    def _check_before(self, source: PoolSource, can_skip: bool) -> None:
        """Find what can be found before the long work starts."""
        if not can_skip:
            self._look_at_files(source)
        shares = gathered(self._images.processes, source.paths)
        if None not in shares:
            paths = [path for share in shares for path in share or ()]
            num_references = self._images.num_references
            check_size(paths, num_references)
            if self._images.mode != "reference":
                self._images.model.check_pool_size(len(paths), num_references)

    def _look_at_files(self, source: PoolSource) -> None:
        """Raise a ValueError that names all files which are no images."""
        paths = source.paths or []
        faults: dict[Path, str] = {}
        with progress_bar(self._images.trainer, "MuSc: looking at files", len(paths)) as advance:
            for path in paths:
                reason = find_fault(path)
                faults |= {path: reason} if reason else {}
                advance(1)
        if faults:
            raise unreadable(faults, len(paths))

    def _to_device(self, images: Any) -> torch.Tensor:
        images = self._images.trainer.precision_plugin.convert_input(images)
        moved: torch.Tensor = self._images.trainer.strategy.batch_to_device(images, self._images.device)
        return moved
