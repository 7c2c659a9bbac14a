# SPDX-License-Identifier: Apache-2.0
"""The pool: the images of one dataloader, and what they say of each other."""

import copy
import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from torch.utils.data import DataLoader, SequentialSampler

from anomalib_musc.checks import MIN_IMAGES


@dataclass
class Pool:
    """The scored images of one dataloader.

    Attributes:
        signature: What :func:`pool_signature` said of the images when they were scored.
        names: One name an image, see :func:`image_names`.
        patch_scores: Shape ``(N, h, w)``.
        raw_scores: Maxima of the anomaly maps, shape ``(N,)``.
        class_tokens: Image features, shape ``(N, D)``.
        scores: Image scores that are handed out, shape ``(N,)``: the raw ones until they are re-scored.
    """

    signature: Hashable
    names: Sequence[str]
    patch_scores: torch.Tensor
    raw_scores: torch.Tensor
    class_tokens: torch.Tensor

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


def image_names(paths: Sequence[str] | None, images: Any) -> list[str]:
    """Name each of the pre-processed images ``(B, 3, H, W)``: by its path, or by a digest where it has none."""
    if paths is not None:
        return [str(path) for path in paths]
    pixels = images.float().cpu().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in pixels]


def num_batches(loader: Any, limit: float) -> float:
    """Return how many batches of a loader make the pool when the trainer reads ``limit`` of them.

    Where the order is random, any image may be among those that the trainer reads, and the whole loader is the pool.
    """
    if _is_sequential(loader):
        return limit
    return len(loader) if hasattr(loader, "__len__") else float("inf")


def read_batches(loader: Any, limit: float) -> Iterator[ImageBatch]:
    """Read the pool's batches, and beyond ``limit`` until there are enough images to judge each other."""
    num_images = 0
    for index, batch in enumerate(_second_reader(loader)):
        if index >= limit and num_images >= MIN_IMAGES:
            return
        yield batch
        num_images += len(batch.image)


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


def pool_signature(loader: Any, limit: float) -> Hashable:
    """Describe the images of a loader without reading them, so that the same images are recognised.

    Files are known by path, size and modification time, whatever their order; a dataset that does not list its files
    is known by itself.
    """
    dataset = getattr(loader, "dataset", loader)
    extent = None if _covers_all(loader, limit) else (limit, getattr(loader.batch_sampler, "batch_size", None))
    paths = image_paths(loader)
    if paths is None:
        return dataset, extent
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    transforms = repr(getattr(dataset, "augmentations", None)), repr(getattr(dataset, "transform", None))
    return tuple(stats if extent else sorted(stats)), transforms, extent


def image_paths(loader: Any) -> list[Path] | None:
    """Return the image files of a loader over one of anomalib's datasets, in their order; else ``None``."""
    dataset = getattr(loader, "dataset", loader)
    if hasattr(dataset, "image_filenames"):  # PredictDataset
        return [Path(path) for path in dataset.image_filenames]
    if hasattr(dataset, "samples") and "image_path" in dataset.samples:  # AnomalibDataset
        return [Path(path) for path in dataset.samples["image_path"]]
    return None


def _is_sequential(loader: Any) -> bool:
    if not isinstance(loader, DataLoader):
        return True
    # Not loader.sampler: Lightning rebuilds loaders around the batch sampler alone.
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, SequentialSampler)


def _covers_all(loader: Any, limit: float) -> bool:
    if getattr(loader, "drop_last", False):
        return False
    return not hasattr(loader, "__len__") or limit >= len(loader)
