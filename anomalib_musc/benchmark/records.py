# SPDX-License-Identifier: Apache-2.0
"""What a cell of a benchmark leaves on disk: a record and the predictions, each whole or absent."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_musc.files import whole_file

METRICS = {
    "image_auroc": "image AUROC",
    "image_f1max": "image F1-max",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_f1max": "pixel F1-max",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
}


@dataclass
class Predictions:
    """What a model said of the N test images of a cell, before any normalisation.

    Attributes:
        paths: Paths of the images, ``(N,)``.
        labels: 1 where anomalous, ``(N,)``.
        scores: Image scores, ``(N,)``.
        rescored: The same after RsCIN, ``(N,)``, or ``None``.
        maps: Small anomaly maps ``(N, S, S)`` from 0 to 255 over the range of the cell without its outermost
            half percents, or ``None``.
        masks: Small true masks ``(N, S, S)``, or ``None``.
        pro_curve: False positive rates up to 0.3 and the regions' mean overlaps, ``(2, K)``, or ``None``.
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    rescored: np.ndarray | None = None
    maps: np.ndarray | None = None
    masks: np.ndarray | None = None
    pro_curve: np.ndarray | None = None


@dataclass
class Record:
    """A finished cell: a model on a category with a seed. Metrics are fractions, times seconds, memory bytes.

    Attributes:
        error: Why the cell failed, or ``None``; without metrics then.
        metrics: By the names of ``METRICS``; what a dataset has no labels or masks for is missing.
        rscin: Of the second row "+ RsCIN": ``backbone``, ``windows``, ``seconds`` and the image ``metrics``.
        seconds: ``setup``, ``fit`` and ``test``.
        peak_host_bytes: Beyond what the process held when the cell began.
        setting: Name of the published row whose setting this is, or ``None``.
    """

    key: str
    model: str
    dataset: str
    category: str
    seed: int
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    rscin: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    num_train: int = 0
    num_test: int = 0
    map_size: list[int] | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    setting: str | None = None
    configuration: dict[str, Any] = field(default_factory=dict)


class Store:
    """The folder of a benchmark.

    Args:
        folder: Holds ``cells/KEY/record.json`` and ``cells/KEY/predictions.npz``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, record: Record, predictions: Predictions | None) -> None:
        """Write a cell; its record last, by which it counts as finished.

        Raises:
            OSError: If the folder cannot be written.
        """
        if predictions is not None:
            arrays = {name: value for name, value in vars(predictions).items() if value is not None}
            with whole_file(self._cell(record.key) / "predictions.npz") as part:
                np.savez_compressed(part, **arrays)
        with whole_file(self._cell(record.key) / "record.json") as part:
            part.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def begin(self, key: str) -> None:
        """Note that a cell is being run.

        Raises:
            OSError: If the folder cannot be written.
        """
        self._cell(key).mkdir(parents=True, exist_ok=True)
        (self._cell(key) / "begun").touch()

    def was_interrupted(self, key: str) -> bool:
        """Return whether a cell was begun and neither finished nor failed: the process died."""
        return (self._cell(key) / "begun").is_file() and self.record(key) is None

    def is_finished(self, key: str) -> bool:
        """Return whether a cell needs no run: it has a record, and not of a failure."""
        record = self.record(key)
        return record is not None and record.error is None

    def record(self, key: str) -> Record | None:
        """Read a cell's record, ``None`` where there is none."""
        path = self._cell(key) / "record.json"
        return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def records(self, keys: list[str]) -> Iterator[Record]:
        """Read the records of those cells that have one."""
        yield from filter(None, map(self.record, keys))

    def predictions(self, key: str) -> Predictions | None:
        """Read a cell's predictions, ``None`` where there are none."""
        path = self._cell(key) / "predictions.npz"
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            return Predictions(
                paths=arrays["paths"].tolist(), **{name: arrays[name] for name in arrays if name != "paths"}
            )

    def _cell(self, key: str) -> Path:
        return self.folder / "cells" / key
