# SPDX-License-Identifier: Apache-2.0
"""A dataloader as the source of a pool."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from torch import nn

from anomalib_musc.compat.paths import folders_of, is_dangling
from anomalib_musc.distances import Processes
from anomalib_musc.pool.checks import MIN_IMAGES
from anomalib_musc.pool.loaders import (
    dataset_of,
    dataset_paths,
    has_plain_files,
    is_permutation,
    is_read_by_anomalib,
    is_sequential,
    length,
    sampler_of,
    second_reader,
    share_of,
    without_files,
)


class PoolSource:
    """A dataloader as the source of a pool.

    Where the order is random, any image may be among those that the trainer reads, and the whole loader is the pool.

    Args:
        loader: A dataloader, or any iterable of batches.
        limit: How many batches the trainer reads.

    Attributes:
        reads_all: Whether the pool is all of the dataset.
        has_plain_files: Whether the images are those of :attr:`all_paths`, as anomalib reads them.
        is_read_by_anomalib: Whether anomalib reads them, whatever is done to them then.
    """

    def __init__(self, loader: Any, limit: float = float("inf")) -> None:
        self.loader = loader
        self._given_limit = limit
        self.limit = min(limit, length(loader)) if is_sequential(loader) else length(loader)
        self.reads_all = self.limit >= length(loader) and not getattr(loader, "drop_last", False)
        self.has_plain_files = self._sampler is None and has_plain_files(self._dataset)
        self.is_read_by_anomalib = is_read_by_anomalib(self._dataset)

    def share(self, processes: Processes | None) -> "PoolSource":
        """Return a source of the images that this process is to read; of all where it is alone."""
        if processes is None:
            return self
        return PoolSource(share_of(self.loader, processes.rank, processes.size), self._given_limit)

    @property
    def all_paths(self) -> list[Path]:
        """The image files of the dataset, as far as it tells, beyond the limit too."""
        return dataset_paths(self._dataset) or []

    @property
    def paths(self) -> list[Path] | None:
        """The image files that will be read, ``None`` if the dataset does not tell."""
        paths = dataset_paths(self._dataset)
        if paths is None or self._sampler is not None:
            return None
        return paths[: self.max_images]

    @property
    def max_images(self) -> int | None:
        """How many images will be read at most; ``None`` for all of them."""
        return None if self.reads_all else max(int(self.limit) * self._batch_size, MIN_IMAGES)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells these images from others, without reading them.

        Files are known by path, size and modification time, whatever their order.
        """
        paths = dataset_paths(self._dataset)
        if paths is None:
            return id(self._dataset), self._sampler, self.limit
        stats = [path.lstat() if is_dangling(path) else path.stat() for path in paths]
        files = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
        transforms = [getattr(self._dataset, name, None) for name in ("augmentations", "transform")]
        order = sorted(files) if self.reads_all and self._sampler is None else (files, self.limit, self._batch_size)
        return order, self._sampler, [leaf for transform in transforms for leaf in transform_leaves(transform)]

    @property
    def is_recognised_by_files(self) -> bool:
        """Whether the key notices that an image has changed; other datasets are only known by identity."""
        return dataset_paths(self._dataset) is not None

    @property
    def can_skip(self) -> bool:
        """Whether files can be left out: from a folder for prediction."""
        return isinstance(self._dataset, PredictDataset) and self._sampler is None

    @property
    def folders(self) -> tuple[Path, ...] | None:
        """The folders of a prediction, none of single files; ``None`` where that is not known."""
        return folders_of(self._dataset) if self.can_skip else None

    def listed(self, skipped: Collection[Path]) -> set[Path]:
        """Return those of skipped files that the dataset lists."""
        return set(skipped) & set(self.all_paths)

    def without(self, files: Collection[Path]) -> Any:
        """Return the dataloader; of a folder for prediction a new one, without files, that survives broken ones."""
        return without_files(self.loader, files) if self.can_skip else self.loader

    def batches(self) -> Iterator[Any]:
        """Read batches, or lists of items, and beyond the limit until there are enough images to be compared."""
        num_images = 0
        for index, batch in enumerate(second_reader(self.loader)):
            if index >= self.limit and num_images >= MIN_IMAGES:
                return
            _check_batch(batch)
            yield batch
            num_images += len(batch) if isinstance(batch, list) else len(batch.image)

    @property
    def _dataset(self) -> Any:
        return dataset_of(self.loader)

    @property
    def _batch_size(self) -> int:
        return getattr(getattr(self.loader, "batch_sampler", None), "batch_size", 1)

    @property
    def _sampler(self) -> object:
        """A sampler that may leave images out, ``None`` for one that does not."""
        return None if is_sequential(self.loader) or is_permutation(self.loader) else sampler_of(self.loader)


def _check_batch(batch: Any) -> None:
    """Raise a TypeError unless a dataloader gives anomalib's batches, or lists of its items."""
    items = batch if isinstance(batch, list) else [batch]
    if not items or not all(hasattr(item, "image_path") for item in items):
        kind = type(batch).__name__ + (f" of {type(items[0]).__name__}" if batch is items and items else "")
        msg = (
            f"dataloaders must give anomalib's ImageBatch, got {kind}. Let the dataset return ImageItem(image=...) and "
            "pass DataLoader(dataset, collate_fn=ImageBatch.collate), both of anomalib.data; or predict a folder: "
            "predict(data_path=...)."
        )
        raise TypeError(msg)


def transform_leaves(transform: nn.Module | Any) -> list[Any]:
    """Return the transforms of which a composition consists; two are equal only if they are one object."""
    parts = getattr(transform, "transforms", None)
    return [transform] if parts is None else [leaf for part in parts for leaf in transform_leaves(part)]
