# SPDX-License-Identifier: Apache-2.0
"""What a cell of a benchmark leaves on disk: a record and the predictions, each whole or absent."""

import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from anomalib_musc.output.files import atomic_write

METRICS = {
    "image_auroc": "image AUROC",
    "image_f1max": "image F1-max",
    "image_ap": "image AP",
    "pixel_auroc": "pixel AUROC",
    "pixel_f1max": "pixel F1-max",
    "pixel_ap": "pixel AP",
    "aupro": "AUPRO",
    "aupro_official": "AUPRO (official)",
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
        rscin: Of the second row "+ RsCIN": ``backbone``, ``windows``, ``seconds`` and the image ``metrics``, or
            ``error``.
        seconds: ``setup``, ``fit`` and ``test``.
        peak_host_bytes: Beyond what the cell's own process held when all packages were loaded.
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

    @property
    def failure(self) -> str | None:
        """Why the cell, or its second row alone, failed."""
        return self.error or (self.rscin or {}).get("error")


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
            with atomic_write(self._cell(record.key) / "predictions.npz") as part:
                np.savez_compressed(part, **arrays)
        with atomic_write(self._cell(record.key) / "record.json") as part:
            part.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def forget(self, key: str) -> None:
        """Remove a cell's record, so that one that is found later is of a new run."""
        (self._cell(key) / "record.json").unlink(missing_ok=True)

    def is_finished(self, key: str) -> bool:
        """Return whether a cell needs no run: it has a record, not of a failure, and its predictions."""
        record = self.record(key)
        return record is not None and record.failure is None and self.predictions(key) is not None

    def record(self, key: str) -> Record | None:
        """Read a cell's record, ``None`` where there is none that can be read."""
        path = self._cell(key) / "record.json"
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
        except (ValueError, TypeError) as error:  # cut short, or of another version
            warnings.warn(f"{path} cannot be read ({error}): its cell counts as not run.", stacklevel=2)
            return None

    def predictions(self, key: str) -> Predictions | None:
        """Read a cell's predictions, ``None`` where there are none that can be read."""
        path = self._cell(key) / "predictions.npz"
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                values = {name: arrays[name] for name in arrays}
            return Predictions(**{**values, "paths": values["paths"].tolist()})
        except (ValueError, TypeError, KeyError, EOFError, BadZipFile) as error:
            warnings.warn(f"{path} cannot be read ({error}): its cell counts as not run.", stacklevel=2)
            return None

    def _cell(self, key: str) -> Path:
        return self.folder / "cells" / key
