# SPDX-License-Identifier: Apache-2.0
"""What dataloaders tell of themselves: their image files, their order, and readers of the same images."""

import copy
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch, ImageItem, PredictDataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

logger = logging.getLogger(__name__)


def as_list(dataloaders: Any) -> list[Any]:
    """Return the dataloaders that a trainer holds, whatever their collection."""
    if isinstance(dataloaders, dict):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]


def image_paths(dataloaders: Any) -> list[Path]:
    """Return the image files that dataloaders read, as far as their datasets tell."""
    datasets = [dataset_of(loader) for loader in as_list(dataloaders)]
    return [path for dataset in datasets for path in dataset_paths(dataset) or []]


def common_folder(paths: Sequence[Path]) -> Path | None:
    """Return the deepest folder that holds all files, ``None`` where there is none."""
    try:
        return Path(os.path.commonpath([path.parent for path in paths]))
    except ValueError:  # no files, or on several drives
        return None


def dataset_of(loader: Any) -> Any:
    """Return what a dataloader reads; an iterable of batches is its own dataset."""
    return getattr(loader, "dataset", loader)


def length(sized: Any) -> float:
    """Return how long something is, infinite if unknown."""
    try:
        return len(sized)
    except TypeError:  # iterable datasets, and the loaders over them
        return float("inf")


def sampler_of(loader: Any) -> Any:
    """Return what orders the images of a dataloader, or its batches where nothing else does."""
    if not isinstance(loader, DataLoader):
        return None
    # Not loader.sampler: Lightning rebuilds loaders around the batch sampler alone.
    batches = loader.batch_sampler
    return loader.sampler if batches is None else getattr(batches, "sampler", batches)


def is_sequential(loader: Any) -> bool:
    """Whether a dataloader reads its images in their order."""
    return isinstance(sampler_of(loader), (SequentialSampler, NoneType))


def is_permutation(loader: Any) -> bool:
    """Whether a dataloader reads every image once, in a random order."""
    sampler = sampler_of(loader)
    is_random = isinstance(sampler, RandomSampler) and not sampler.replacement
    return is_random and len(sampler) == length(dataset_of(loader))


def dataset_paths(dataset: Any) -> list[Path] | None:
    """Return the image files of anomalib's datasets in their order; ``None`` for a dataset of another kind."""
    if isinstance(dataset, Subset):
        paths = dataset_paths(dataset.dataset)
        return None if paths is None else [paths[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [dataset_paths(part) for part in dataset.datasets]
        return None if None in parts else [path for part in parts for path in part or []]
    if hasattr(dataset, "image_filenames"):  # PredictDataset
        return [Path(path) for path in dataset.image_filenames]
    if hasattr(dataset, "samples") and "image_path" in dataset.samples:  # AnomalibDataset
        return [Path(path) for path in dataset.samples["image_path"]]
    return None


def has_plain_files(dataset: Any) -> bool:
    """Whether the images of a dataset are its files as anomalib reads them, with nothing done to them."""
    changes = [getattr(part, name, None) for part in _parts(dataset) for name in ("transform", "augmentations")]
    return is_read_by_anomalib(dataset) and all(change is None for change in changes)


def is_read_by_anomalib(dataset: Any) -> bool:
    """Whether anomalib reads the files of a dataset, rather than code of a user's."""
    return all(_is_read_by_anomalib(part) for part in _parts(dataset))


def _parts(dataset: Any) -> list[Any]:
    """Return the datasets that others are made of."""
    if isinstance(dataset, Subset):
        return _parts(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [leaf for part in dataset.datasets for leaf in _parts(part)]
    return [dataset]


def _is_read_by_anomalib(dataset: Any) -> bool:
    kinds = (PredictDataset, AnomalibDataset)
    return any(isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__ for kind in kinds)


def second_reader(loader: Any) -> Any:
    """Return a loader of the same batches that can be read while the trainer is reading the first one.

    The trainer's iteration would be exhausted otherwise: persistent workers share one iterator, and so does the batch
    sampler that Lightning wraps for prediction. Where anomalib would join the images of a batch, they come as a list,
    as it enlarges the smaller ones to the largest.
    """
    if not isinstance(loader, DataLoader):
        return loader
    reader = copy.copy(loader)
    vars(reader).update(_iterator=None, batch_sampler=copy.copy(loader.batch_sampler))
    if loader.collate_fn == ImageBatch.collate:
        reader.collate_fn = list
    return reader


class ScoredFiles(Dataset[Any]):
    """Files whose scores are known, so that one which has vanished since, or is broken now, ends nothing.

    Args:
        dataset: anomalib's. In place of an image that cannot be read any more it gives a black pixel.
    """

    def __init__(self, dataset: PredictDataset) -> None:
        self._dataset = dataset
        self.image_filenames = dataset.image_filenames

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception:  # Pillow's decoders raise whatever they like
            path = str(self.image_filenames[index])
            logger.warning("%s has a score but could not be read again.", path)
            return ImageItem(image=torch.zeros(3, 1, 1), image_path=path)


def without_files(loader: "DataLoader[Any]", files: Collection[Path]) -> "DataLoader[Any]":
    """Return a new dataloader of a folder for prediction that leaves files out, and survives the loss of others."""
    dataset: Any = copy.copy(loader.dataset)
    dataset.image_filenames = [path for path in dataset.image_filenames if Path(path) not in files]
    return DataLoader(
        ScoredFiles(dataset),
        batch_size=getattr(loader.batch_sampler, "batch_size", loader.batch_size),
        shuffle=not is_sequential(loader),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=getattr(loader.batch_sampler, "drop_last", loader.drop_last),
        generator=getattr(sampler_of(loader), "generator", None),
    )


def share_of(loader: Any, rank: int, number: int) -> Any:
    """Return a new dataloader of every so many-th image of a dataloader, in order; the loader itself where all are one.

    Args:
        loader: A dataloader that reads every image once.
        rank: Which share, from 0.
        number: How many shares there are.

    Raises:
        ValueError: If the loader chooses images on its own, or its dataset has no length.
    """
    if number == 1:
        return loader
    if not isinstance(loader, DataLoader) or not (is_sequential(loader) or is_permutation(loader)):
        msg = (
            f"{number} processes share the images of a dataloader that reads each of them once; got "
            f"{type(loader).__name__} with a sampler or batches of its own. Leave the sampler out, or use devices=1."
        )
        raise ValueError(msg)
    images = range(rank, len(loader.dataset), number)  # type: ignore[arg-type]
    dataset: Any = loader.dataset
    if isinstance(dataset, PredictDataset):  # stays one, from which files can be left out
        dataset = copy.copy(dataset)
        dataset.image_filenames = [dataset.image_filenames[index] for index in images]
    else:
        dataset = Subset(dataset, images)
    return DataLoader(
        dataset,
        batch_size=getattr(loader.batch_sampler, "batch_size", loader.batch_size),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=getattr(loader.batch_sampler, "drop_last", loader.drop_last),
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        timeout=loader.timeout,
    )
