# SPDX-License-Identifier: Apache-2.0
"""From a source to batches of images that are ready for the backbone; a file is opened and decoded once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from anomalib.data import ImageBatch

from anomalib_musc.distances import Processes, gathered
from anomalib_musc.pool.checks import NO_FILE, describe_fault, unreadable
from anomalib_musc.pool.findings import Findings
from anomalib_musc.pool.grey_range import GreyRange, range_of_images, sample
from anomalib_musc.pool.high_bit_depth import ImageFile, corrected_image, read_image_file, samples_of_files
from anomalib_musc.pool.looks import Look, look_at
from anomalib_musc.pool.orientation import UPRIGHT
from anomalib_musc.pool.pool import image_names
from anomalib_musc.pool.source import PoolSource

_MOST_THREADS = 4  # each holds a decoded image, which may be large

Item = TypeVar("Item")
Result = TypeVar("Result")
Function = Callable[[torch.Tensor], torch.Tensor]


class Prepared(NamedTuple):
    """Images that are ready for the backbone.

    Attributes:
        names: One name an image.
        images: Shape ``(B, 3, H, W)``, on the backbone's device.
    """

    names: list[str]
    images: torch.Tensor


class _Read(NamedTuple):
    """What a thread found in a file.

    ``file`` has lost its values. ``image`` ``(3, H, W)`` and ``look`` are ``None`` where black and white are still to
    be found, of ``samples``.
    """

    size: tuple[int, int]
    file: ImageFile
    samples: torch.Tensor
    image: torch.Tensor | None
    look: Look | None
    thumbnail: bytes | None


class PoolReader:
    """Reads the images of a source and prepares each on its own, so that none depends on those beside it.

    Files are decoded by a few threads, ahead of the backbone.

    Args:
        source: The source.
        transform: Prepares images ``(B, 3, H, W)`` in [0, 1] for the backbone; ``None`` where they are.
        to_device: Brings images to the backbone's device and type.
        batch_size: How many images are joined.
        reason_to_skip: Says why a file is left out, ``None`` where it is not, and leaves broken ones out, too. Without
            it a broken file is an error.
        grey_range: Black and white of grey images of more than 8 bits; ``None`` to find them in the images themselves.
        needs_grey_range: Whether such images are an error where ``grey_range`` is ``None``.
        needs_paths: Whether images without a path are an error.
        thumbnail: Makes a small picture of an image ``(3, H, W)`` in [0, 1].
        processes: Those that read the other images of the pool: black and white are found in all of them.

    Attributes:
        findings: What was found out about the images that were read so far.
        grey_range: Black and white of those of more than 8 bits, ``None`` where none was given or found.
    """

    def __init__(
        self,
        source: PoolSource,
        transform: Function | None,
        to_device: Function,
        batch_size: int,
        *,
        reason_to_skip: Callable[[Path], str | None] | None = None,
        grey_range: GreyRange | None = None,
        needs_grey_range: bool = False,
        needs_paths: bool = False,
        thumbnail: Callable[[torch.Tensor], bytes] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.findings = Findings()
        self.grey_range = grey_range
        self._source = source
        self._transform = transform
        self._to_device = to_device
        self._batch_size = batch_size
        self._reason_to_skip = reason_to_skip
        self._needs_grey_range = needs_grey_range and grey_range is None
        self._digests: dict[str, str] = {}
        self._needs_paths = needs_paths
        self._thumbnail = thumbnail
        self._processes = processes

    def batches(self) -> Iterator[Prepared]:
        """Read, prepare and join the images.

        Raises:
            ValueError: If a file is broken that cannot be left out, or nobody knows which value is white.
        """
        if self._source.has_plain_files:
            yield from self._joined(self._images_of_files())
        else:
            yield from self._batches_of_loader()

    def _images_of_files(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read files in their order; those whose black and white the last of them tells come at the end."""
        waiting: list[Path] = []
        samples: list[torch.Tensor] = []
        for path, found in islice(self._files(self._source.all_paths), self._source.max_images):
            if found.image is not None:
                yield str(path), found.image
            else:
                waiting.append(path)
                samples.append(found.samples)
        self._find_range(waiting, samples)
        yield from ((str(path), found.image) for path, found in self._files(waiting) if found.image is not None)

    def _find_range(self, paths: Sequence[Path], samples: Sequence[torch.Tensor]) -> None:
        """Find black and white of the images of all processes, of samples of those of more than 8 bits."""
        if self.grey_range is not None:
            return
        every = [pair for part in gathered(self._processes, list(zip(paths, samples, strict=True))) for pair in part]
        if every:
            found, outlying = range_of_images([some for _, some in every])
            self._take(found, every[0][0], [every[position][0] for position in outlying])

    def _files(self, paths: Sequence[Path]) -> Iterator[tuple[Path, _Read]]:
        """Read files, and note what they are."""
        for path, found in zip(paths, ahead(self._read, paths), strict=True):
            if isinstance(found, str):
                if self._reason_to_skip is None:
                    raise unreadable({path: found}, len(paths))
                self.findings.skipped[path] = found
            else:
                self._note(str(path), found)
                yield path, found

    def _note(self, name: str, found: _Read) -> None:
        self.findings.sizes[name] = found.size
        if found.file.has_high_bit_depth:
            self.findings.high_bit_depth.add(name)
        if found.file.orientation != UPRIGHT:
            self.findings.orientations[name] = found.file.orientation
        if found.file.num_frames > 1:
            self.findings.notes.setdefault(
                name, f"only the first of {found.file.num_frames} pages or frames is looked at"
            )
        if found.look is not None:
            self.findings.looks[name] = found.look
        if found.thumbnail is not None:
            self.findings.thumbnails[name] = found.thumbnail

    def _read(self, path: Path) -> _Read | str:
        """Read and prepare one file, in a thread; or say why there is no image."""
        if self._reason_to_skip is not None and (reason := self._reason_to_skip(path)) is not None:
            return reason
        if not path.is_file() and path.exists():  # a pipe would be waited for
            return NO_FILE
        try:
            file = read_image_file(path)
        except Exception as error:  # Pillow's decoders raise whatever they like on broken files
            return describe_fault(path, error)
        nothing = torch.empty(0)
        if file.has_high_bit_depth and self.grey_range is None:
            return _Read(file.size, file._replace(values=nothing), sample(file.values), None, None, None)
        image = file.scaled(self.grey_range)
        thumbnail = None if self._thumbnail is None else self._thumbnail(image)
        prepared = self._prepared(image)
        return _Read(file.size, file._replace(values=nothing), nothing, prepared, look_at(image), thumbnail)

    def _batches_of_loader(self) -> Iterator[Prepared]:
        """Read the source by its own dataloader, whose images may be others than its files are."""
        paths = self._source.all_paths if self._source.paths is None else self._source.paths
        samples = samples_of_files(paths) if self.grey_range is None else {}
        self._find_range(list(samples), list(samples.values()))
        batches = self._source.batches()
        first = next(batches, None)
        if first is not None and next(iter(first)).image_path is not None:
            yield from self._joined(pair for batch in chain([first], batches) for pair in self._images_of_items(batch))
        elif first is not None:
            yield from map(self._prepared_without_paths, chain([first], batches))

    def _prepared_without_paths(self, batch: Any) -> Prepared:
        """Prepare a batch as the trainer's will be, whose images are known by their pixels, see :func:`image_names`."""
        if self._needs_paths:
            msg = "The images have no image_path, by which anomalib names its pictures; use visualizer=False."
            raise ValueError(msg)
        collated: Any = ImageBatch.collate(batch) if isinstance(batch, list) else batch
        images = self._prepare(self._to_device(collated.image))
        return Prepared(image_names(None, images), images)

    def _images_of_items(self, items: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for item in items:
            (name,) = image_names([item.image_path], None)
            self._check_distinct(name, item.image)
            is_as_stored = self._source.is_read_by_anomalib
            image, orientation = corrected_image(item, self.grey_range, is_as_stored=is_as_stored)
            if orientation != UPRIGHT:
                self.findings.orientations[name] = orientation
            self.findings.looks[name] = look_at(image)
            yield name, self._prepared(image)

    def _check_distinct(self, name: str, image: torch.Tensor) -> None:
        """Raise a ValueError where different images have one path, by which results are told apart."""
        (digest,) = image_names(None, image[None])
        if self._digests.setdefault(name, digest) != digest:
            msg = (
                f"Different images have the image_path {name}, such as tiles or frames of one file, or one image "
                "augmented at random; results are told apart by path. Write each to a file of its own, or leave "
                "image_path out and use visualizer=False."
            )
            raise ValueError(msg)

    def _take(self, found: GreyRange, path: Path, outlying: Sequence[Path]) -> None:
        """Take black and white that were found, and note what they do not suit.

        Raises:
            ValueError: If they should have been given.
        """
        if self._needs_grey_range and found.white != 1:  # fractions are known
            msg = (
                f"{path} has more than 8 bits and the references have not: nobody knows which value is white. Take "
                "references of the same camera, or name black and white: MuSc(grey_range=(0, 4095))."
            )
            raise ValueError(msg)
        self.grey_range = found
        reason = (
            f"most values lie far from those of the other images, and are clipped to {found.black:g} and "
            f"{found.white:g}, their black and white; MuSc(grey_range=(black, white)) names others"
        )
        self.findings.notes.update({str(path): reason for path in outlying})

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return images if self._transform is None else self._transform(images)

    def _prepared(self, image: torch.Tensor) -> torch.Tensor:
        return self._prepare(image[None])[0]

    def _joined(self, named: Iterator[tuple[str, torch.Tensor]]) -> Iterator[Prepared]:
        """Join images one by one to batches."""
        while batch := list(islice(named, self._batch_size)):
            names, images = zip(*batch, strict=True)
            yield Prepared(list(names), self._to_device(torch.stack(images)))


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply a function to items in a few threads, ahead of whoever takes the results, in the items' order."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    pending: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(threads, "read images")
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
