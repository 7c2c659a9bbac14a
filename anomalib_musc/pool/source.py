# SPDX-License-Identifier: Apache-2.0
"""The pool: the images of one dataloader, what they say of each other, and how the same images are recognised."""

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from anomalib.data import ImageBatch, PredictDataset
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, SequentialSampler, Subset

from anomalib_musc.pool.checks import MIN_IMAGES


@dataclass
class Pool:
    """The scored images of one dataloader.

    Attributes:
        key: What decided the scores; a pool with an equal key need not be scored again.
        names: One name an image, see :func:`image_names`.
        patch_scores: Shape ``(N, h, w)``.
        raw_scores: Maxima of the anomaly maps, shape ``(N,)``.
        class_tokens: Image features, shape ``(N, D)``.
        skipped: Files that are no images, and why.
        scores: Image scores that are handed out, shape ``(N,)``: the raw ones until they are re-scored.
    """

    key: object
    names: Sequence[str]
    patch_scores: torch.Tensor
    raw_scores: torch.Tensor
    class_tokens: torch.Tensor
    skipped: Mapping[Path, str]

    def __post_init__(self) -> None:
        self.scores = self.raw_scores
        self._position = {name: index for index, name in enumerate(self.names)}

    def positions(self, names: Sequence[str]) -> list[int]:
        """Return where the named images stand in the pool.

        Raises:
            RuntimeError: If an image was not there when the pool was scored.
        """
        try:
            return [self._position[name] for name in names]
        except KeyError as error:
            msg = (
                f"Image {error} was not in the pool when it was scored. The dataloader must give the same images each "
                "time it is read: use no random augmentation on images without a path, and no random subset."
            )
            raise RuntimeError(msg) from None


class PoolSource:
    """A dataloader as the source of a pool.

    Where the order is random, any image may be among those that the trainer reads, and the whole loader is the pool.

    Args:
        loader: A dataloader, or any iterable of batches.
        limit: How many batches the trainer reads.
    """

    def __init__(self, loader: Any, limit: float) -> None:
        self.loader = loader
        length = _length(loader)
        self.limit = min(limit, length) if _is_sequential(loader) else length
        self._all_files: Any = None
        self.reads_all = self.limit >= length and not getattr(loader, "drop_last", False)

    @property
    def paths(self) -> list[Path] | None:
        """The image files that will be read, ``None`` if the dataset does not tell."""
        paths = _image_paths(self._dataset)
        if paths is None or self._sampler is not None:
            return None
        return paths if self.reads_all else paths[: max(int(self.limit) * self._batch_size, MIN_IMAGES)]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells these images from others, without reading them.

        Files are known by path, size and modification time, whatever their order.
        """
        paths = _image_paths(self._dataset)
        if paths is None:
            return id(self._dataset), self._sampler, self.limit
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        transforms = [getattr(self._dataset, name, None) for name in ("augmentations", "transform")]
        order = sorted(files) if self.reads_all and self._sampler is None else (files, self.limit, self._batch_size)
        return order, self._sampler, [leaf for transform in transforms for leaf in transform_leaves(transform)]

    @property
    def all_paths(self) -> list[Path]:
        """The image files of the dataset, as far as it tells, beyond the limit too."""
        return _image_paths(self._dataset) or []

    @property
    def num_batches(self) -> float:
        """How many batches will be read, infinite if unknown."""
        return min(self.limit, _length(self.loader))

    @property
    def can_skip(self) -> bool:
        """Whether files can be left out: from a folder for prediction, whose loader has no workers that have it yet."""
        return isinstance(self._dataset, PredictDataset) and getattr(self.loader, "num_workers", 0) == 0

    def skip(self, files: Mapping[Path, str]) -> None:
        """Leave files out, until they are brought back by :meth:`restore`."""
        if files:
            now = self._dataset.image_filenames
            self._all_files = now if self._all_files is None else self._all_files
            self._dataset.image_filenames = [path for path in now if Path(path) not in files]

    def restore(self) -> None:
        """Bring back the files that were left out."""
        if self._all_files is not None:
            self._dataset.image_filenames, self._all_files = self._all_files, None

    @property
    def is_recognised_by_files(self) -> bool:
        """Whether the key notices that an image has changed; other datasets are only known by identity."""
        return _image_paths(self._dataset) is not None

    def batches(self) -> Iterator[ImageBatch]:
        """Read the batches, and beyond the limit until there are enough images to judge each other."""
        num_images = 0
        for index, batch in enumerate(_second_reader(self.loader)):
            if index >= self.limit and num_images >= MIN_IMAGES:
                return
            yield batch
            num_images += len(batch.image)

    @property
    def _dataset(self) -> Any:
        return getattr(self.loader, "dataset", self.loader)

    @property
    def _batch_size(self) -> int:
        return getattr(getattr(self.loader, "batch_sampler", None), "batch_size", 1)

    @property
    def _sampler(self) -> object:
        """A sampler that may leave images out, ``None`` for one that does not."""
        if _is_sequential(self.loader):
            return None
        sampler = _sampler_of(self.loader)
        is_permutation = isinstance(sampler, RandomSampler) and not sampler.replacement
        return None if is_permutation and len(sampler) == _length(self._dataset) else sampler


def image_names(paths: Sequence[str] | None, images: Any) -> list[str]:
    """Name each of the pre-processed images ``(B, 3, H, W)``: by its path, or by a digest where it has none."""
    if paths is not None:
        return [str(path) for path in paths]
    pixels = images.float().cpu().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in pixels]


def fingerprint(module: nn.Module) -> str:
    """Digest a sample of every parameter and buffer: other weights give another digest, another device does not."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 64)].cpu().double()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def transform_leaves(transform: Any) -> list[Any]:
    """Return the transforms of which a composition consists; two are equal only if they are one object."""
    parts = getattr(transform, "transforms", None)
    return [transform] if parts is None else [leaf for part in parts for leaf in transform_leaves(part)]


def as_list(dataloaders: Any) -> list[Any]:
    """Return the dataloaders that a trainer holds, whatever their collection."""
    if isinstance(dataloaders, dict):
        return list(dataloaders.values())
    return list(dataloaders) if isinstance(dataloaders, (list, tuple)) else [dataloaders]


def image_paths(dataloaders: Any) -> list[Path]:
    """Return the image files that dataloaders read, as far as their datasets tell."""
    datasets = [getattr(loader, "dataset", loader) for loader in as_list(dataloaders)]
    return [path for dataset in datasets for path in _image_paths(dataset) or []]


def _length(sized: Any) -> float:
    try:
        return len(sized)
    except TypeError:  # iterable datasets, and the loaders over them
        return float("inf")


def _sampler_of(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return None
    # Not loader.sampler: Lightning rebuilds loaders around the batch sampler alone.
    batches = loader.batch_sampler
    return loader.sampler if batches is None else getattr(batches, "sampler", batches)


def _is_sequential(loader: Any) -> bool:
    return isinstance(_sampler_of(loader), (SequentialSampler, NoneType))


def _image_paths(dataset: Any) -> list[Path] | None:
    """Return the image files of anomalib's datasets in their order; ``None`` for a dataset of another kind."""
    if isinstance(dataset, Subset):
        paths = _image_paths(dataset.dataset)
        return None if paths is None else [paths[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_image_paths(part) for part in dataset.datasets]
        return None if None in parts else [path for part in parts for path in part or []]
    if hasattr(dataset, "image_filenames"):  # PredictDataset
        return [Path(path) for path in dataset.image_filenames]
    if hasattr(dataset, "samples") and "image_path" in dataset.samples:  # AnomalibDataset
        return [Path(path) for path in dataset.samples["image_path"]]
    return None


def _second_reader(loader: Any) -> Any:
    """Return a loader of the same batches that can be read while the trainer is reading the first one.

    The trainer's iteration would be exhausted otherwise: persistent workers share one iterator, and so does the batch
    sampler that Lightning wraps for prediction.
    """
    if not isinstance(loader, DataLoader):
        return loader
    reader = copy.copy(loader)
    vars(reader).update(_iterator=None, batch_sampler=copy.copy(loader.batch_sampler))
    return reader
