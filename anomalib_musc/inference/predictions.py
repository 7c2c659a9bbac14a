# SPDX-License-Identifier: Apache-2.0
"""The predictions of a pool, as Python sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import cv2
import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.functional.arguments import is_number
from anomalib_musc.inference.inputs import Inputs
from anomalib_musc.output.batches import original_size, prediction_of, report_of, with_picture
from anomalib_musc.output.files import MirroredFolder, atomic_write, check_writable
from anomalib_musc.output.picture import draw_picture
from anomalib_musc.output.predictions import Decision, PoolReport, Prediction
from anomalib_musc.output.regions import Region, find_regions
from anomalib_musc.output.results import write_results
from anomalib_musc.output.review.pictures import thumbnail_of
from anomalib_musc.output.summary import summary
from anomalib_musc.output.table import COLUMNS, rows_of
from anomalib_musc.output.visualizer import caption_of
from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.high_bit_depth import read_image_file, to_pixels

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image


@dataclass(frozen=True)
class ImagePrediction:
    """One image, as it is at the threshold of the moment it was asked for.

    Attributes:
        path: Its file, or what it is called.
        score: In [0, 1], 0.5 being the threshold that was found; ``None`` where it could not be read.
        label: "anomalous", "normal", "skipped", or "" where nothing decides.
        regions: Its anomalous regions in pixels of the image, the largest first.
        raw_score: The maximum of its anomaly map before normalisation, a distance from 0 to 2.
        notes: What went wrong.
        entry: What does not change with the threshold.
    """

    path: str
    score: float | None
    label: str
    regions: Sequence[Region]
    raw_score: float | None
    notes: Sequence[str]
    entry: Entry

    @property
    def anomaly_map(self) -> np.ndarray | None:
        """Shape ``(H, W)``, float32, at the image's size; ``None`` where there is none."""
        return self.entry.at_full_size(self.entry.anomaly_map)

    @property
    def mask(self) -> np.ndarray | None:
        """Shape ``(H, W)``, bool, at the image's size."""
        if self.entry.size is None:
            return None
        mask = self.entry.mask if self.label == "anomalous" else None
        width, height = self.entry.size
        if mask is None:
            return np.zeros((height, width), bool)
        return cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)

    @property
    def image(self) -> np.ndarray:
        """Shape ``(H, W, 3)``, uint8, as a viewer shows it.

        Raises:
            OSError: If its file is gone.
        """
        return self.entry.read()


@dataclass(frozen=True)
class Entry:
    """What does not change with the threshold.

    Attributes:
        known: What the model tells; its regions are not used.
        file: Where its pixels are.
        anomaly_map: Shape ``(h, w)``, as users see it.
        mask: Shape ``(h, w)``: what is anomalous of it if it is.
        grey_range: Black and white if it has more than 8 bits.
        reason: Why it was skipped, "" if it was not.
        pixels: Shape ``(H, W, 3)``, uint8, where there is no file.
        keeps: What keeps the file of an image from memory.
    """

    known: Prediction
    file: Path | None
    anomaly_map: torch.Tensor | None = None
    mask: np.ndarray | None = None
    grey_range: GreyRange | None = None
    reason: str = ""
    pixels: np.ndarray | None = None
    keeps: object = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the original."""
        return self.known.size

    def at_full_size(self, values: torch.Tensor | None) -> np.ndarray | None:
        """Return a map at the image's size."""
        if values is None or self.size is None:
            return None
        return cv2.resize(values.numpy(), self.size, interpolation=cv2.INTER_LINEAR)

    def read(self) -> np.ndarray:
        """Return the image ``(H, W, 3)``, uint8."""
        if self.pixels is not None:
            return self.pixels
        if self.file is None:
            msg = f"The pixels of {self.known.path or 'this image'} were not kept."
            raise OSError(msg)
        return to_pixels(read_image_file(self.file).scaled(self.grey_range))


class Predictions(Sequence[ImagePrediction]):
    """The predictions of images that were scored together, in the order in which they were given.

    Made by :func:`~anomalib_musc.predict`, or of what ``Engine.predict`` returns by :meth:`from_engine`.

    Example:
        >>> from anomalib_musc import predict
        >>> images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        >>> predictions = predict(images, backbone="musc-tiny", image_size=32)
        >>> len(predictions), predictions[0].anomaly_map.shape
        (6, (32, 32))
        >>> predictions.threshold = 1.0
        >>> set(predictions.labels)
        {'normal'}
    """

    def __init__(self, entries: Sequence[Entry], report: PoolReport) -> None:
        self._entries = list(entries)
        self._report = report

    @classmethod
    def from_engine(cls, batches: Iterable[Any], model: Any, inputs: Inputs | None = None) -> Predictions:
        """Return what ``Engine.predict`` returned as predictions.

        Args:
            batches: What ``Engine.predict`` returned; of several dataloaders the batches of each.
            model: The model that predicted, before its next run.
            inputs: What the images are called, and in which order they were given.
        """
        report = report_of(model)
        names = {str(file): name for file, name in inputs.items} if inputs else {}
        entries = {entry.known.path: entry for entry in _entries(batches, report, model)}
        for path, reason in report.skipped.items():
            if inputs is not None and Path(path) in inputs.files:
                entries[path] = Entry(Prediction(path, notes=[reason]), Path(path), reason=reason)
        order = [(str(file), name) for file, name in inputs.items] if inputs else [(path, path) for path in entries]
        keeps = inputs.folder if inputs else None
        named = [replace(_renamed(entries[path], name, names), keeps=keeps) for path, name in order if path in entries]
        skipped = {names.get(path, path): reason for path, reason in report.skipped.items()}
        warnings = [inputs.in_words(text) if inputs else text for text in report.warnings]
        return cls(named, replace(report, skipped=skipped, warnings=warnings, images={}))

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> ImagePrediction: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImagePrediction]: ...
    def __getitem__(self, index: int | slice) -> ImagePrediction | list[ImagePrediction]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        entry = self._entries[index]
        now = self._now(entry)
        label = "skipped" if entry.reason else now.label
        return ImagePrediction(now.path, now.score, label, now.regions, now.raw_score, now.notes, entry)

    def __repr__(self) -> str:
        found = sorted((prediction for _, prediction in self._scored()), key=lambda prediction: prediction.order)
        return summary(found, self._report, [])

    @property
    def scores(self) -> np.ndarray:
        """Image scores ``(N,)``, NaN where an image was skipped."""
        return np.array([np.nan if entry.known.score is None else entry.known.score for entry in self._entries])

    @property
    def labels(self) -> list[str]:
        """Labels, see :class:`ImagePrediction`."""
        return ["skipped" if entry.reason else self._now(entry, with_regions=False).label for entry in self._entries]

    @property
    def skipped(self) -> Mapping[str, str]:
        """Files that have no score, and why."""
        return self._report.skipped

    @property
    def warnings(self) -> Sequence[str]:
        """Signs that the pool is not what one thinks it is."""
        return self._report.warnings

    @property
    def threshold(self) -> float | None:
        """Above which score an image is anomalous; setting it labels anew and scores nothing."""
        return self._report.decision.threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not is_number(value):
            msg = f"threshold must be a number in the unit of the scores, got {value!r}."
            raise ValueError(msg)
        decision: Decision = self._report.decision
        changed = replace(decision, threshold=float(value), rule="by hand")
        self._report = replace(self._report, decision=changed)

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows of ``predictions.csv``, from the most anomalous image on, as a ``pandas.DataFrame``."""
        import pandas as pd

        frame = pd.DataFrame(rows_of(self._ranked(), self._report, Path()), columns=list(COLUMNS))
        numbers = [column for column in COLUMNS if column not in ("path", "label", "picture", "note")]
        frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce")
        return frame

    def show(self, index: int) -> Image.Image:
        """Return the picture of one image: itself, its heatmap with the outline of its mask, the region in detail."""
        shown, entry = self[index], self._entries[index]
        mask = entry.mask if shown.label == "anomalous" else None
        caption = caption_of(Path(shown.path).name, shown.score, shown.label)
        return draw_picture(shown.image, caption, entry.anomaly_map, mask, None, shown.regions)

    def save(self, folder: str | Path, *, pictures: bool = True, review: bool = True) -> Path:
        """Write table, page and pictures.

        Args:
            folder: Where to; it is made. One that holds a table is refused.
            pictures: Whether to write a picture an image.
            review: Whether to write ``review.html``.

        Returns:
            The table.

        Raises:
            FileExistsError: If there is a table already.
        """
        folder = Path(folder)
        check_writable(folder, "folder")
        table = folder / "predictions.csv"
        if table.exists():
            msg = f"{table} is there already; save to another folder."
            raise FileExistsError(msg)
        drawn, failures = self._draw(folder / "images") if pictures else ({}, {})
        ranked = [with_picture(prediction, drawn, failures) for prediction in self._ranked(review)]
        write_results(table, ranked, self._report, review=review)
        return table

    def _draw(self, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
        """Write the pictures; returns where they are, and why one is not, by path."""
        drawn: dict[str, Path] = {}
        failures: dict[str, str] = {}
        places = MirroredFolder(folder, [Path(entry.known.path) for entry in self._entries])
        for index, entry in enumerate(self._entries):
            if entry.reason or entry.file is None:
                continue
            try:
                picture = self.show(index)
                with atomic_write(place := places.place(entry.known.path, ".png")) as part:
                    picture.save(part, compress_level=1)
            except Exception as error:  # Pillow's decoders raise whatever they like, and a name may be no file's
                failures[entry.known.path] = f"no picture: {error}"
            else:
                drawn[entry.known.path] = place
        return drawn, failures

    def _scored(self) -> Iterator[tuple[Entry, Prediction]]:
        return ((entry, self._now(entry)) for entry in self._entries if not entry.reason)

    def _ranked(self, with_thumbnails: bool = False) -> list[Prediction]:
        """Return what the table tells of each image, from the most anomalous on."""
        found = [
            replace(now, thumbnail=_thumbnail(entry)) if with_thumbnails and now.thumbnail is None else now
            for entry, now in self._scored()
        ]
        return sorted(found, key=lambda prediction: prediction.order)

    def _now(self, entry: Entry, *, with_regions: bool = True) -> Prediction:
        """Return what is known of an image at the present threshold."""
        threshold, score = self._report.decision.threshold, entry.known.score
        is_anomalous = entry.known.is_anomalous
        if threshold is not None and score is not None and is_anomalous is not None:
            is_anomalous = score > threshold
        has_regions = with_regions and is_anomalous and entry.mask is not None and entry.size is not None
        regions = find_regions(entry.mask, entry.size) if has_regions else []  # type: ignore[arg-type]
        return replace(entry.known, is_anomalous=is_anomalous, regions=regions)


def _entries(batches: Iterable[Any], report: PoolReport, model: Any) -> Iterator[Entry]:
    ranges = {name: pool.grey_range for pool in getattr(model, "pools", ()) for name in pool.high_bit_depth}
    for batch in batches:
        if isinstance(batch, list):  # those of one of several dataloaders
            yield from _entries(batch, report, model)
            continue
        for item in batch:
            told = prediction_of(item, None)
            known = report.images.get(told.path, told)
            size = known.size or original_size(item)
            known = replace(known, size=size, is_anomalous=told.is_anomalous, score=told.score)
            values = None if item.anomaly_map is None else item.anomaly_map.detach().float().cpu().squeeze()
            file = Path(told.path).absolute() if told.path else None
            mask = None if values is None else _mask(known, values, report)
            yield Entry(known, file, values, mask, ranges.get(told.path))


def _mask(known: Prediction, values: torch.Tensor, report: PoolReport) -> np.ndarray:
    """Return what is anomalous of a map ``(h, w)`` if the image is, as the page finds it."""
    decision = report.decision
    if known.path in report.images and known.anomaly_map is not None:  # patch scores, before normalisation
        grid = torch.from_numpy(known.anomaly_map)[None, None]
        values = F.interpolate(grid, values.shape, mode="bilinear", align_corners=True)[0, 0]
    bound = decision.pixel_threshold
    if bound is None:
        return (values >= decision.region_fraction * values.max()).numpy()
    return (values > bound).numpy()


def _renamed(entry: Entry, name: str, names: Mapping[str, str]) -> Entry:
    similar = [names.get(path, path) for path in entry.known.similar]
    return replace(entry, known=replace(entry.known, path=name, similar=similar))


def _thumbnail(entry: Entry) -> bytes | None:
    with suppress(Exception):  # gone, or broken, since it was scored: the page does without
        return thumbnail_of(torch.from_numpy(entry.read()).permute(2, 0, 1) / 255)
    return None
