# SPDX-License-Identifier: Apache-2.0
"""What is known of each image of a prediction, and of the pool as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anomalib_musc.output.regions import Region


@dataclass(frozen=True)
class Prediction:
    """One image.

    Attributes:
        path: Its file; "" where it has none.
        score: Its score as users see it: normalised to [0, 1] where the post-processor does so.
        is_anomalous: Its label; ``None`` where there is no threshold.
        raw_score: The maximum of its anomaly map before normalisation; ``None`` where the model does not tell.
        deviations: How far its score before normalisation lies above the 45th percentile of the pool, in distances of
            the 20th from there, see :func:`~anomalib_musc.decision.thresholds.deviations`.
        size: (width, height) of the original.
        regions: Its anomalous regions, the largest first.
        picture: Where its picture is.
        notes: What went wrong.
        anomaly_map: Shape ``(h, w)``, a small grid.
        thumbnail: A JPEG file.
        similar: Names of the images most like it, the most similar first.
    """

    path: str
    score: float | None = None
    is_anomalous: bool | None = None
    raw_score: float | None = None
    deviations: float | None = None
    size: tuple[int, int] | None = None
    regions: Sequence[Region] = ()
    picture: Path | None = None
    notes: Sequence[str] = ()
    anomaly_map: np.ndarray | None = field(default=None, repr=False)
    thumbnail: bytes | None = field(default=None, repr=False)
    similar: Sequence[str] = ()

    @property
    def label(self) -> str:
        """Its label as a word, "" where nothing decides."""
        return "" if self.is_anomalous is None else ("anomalous" if self.is_anomalous else "normal")

    @property
    def order(self) -> tuple[float, float, str]:
        """Sorts from the most anomalous on: scores that were clipped are told apart by what they were before."""
        unknown = float("-inf")
        score = unknown if self.score is None else self.score
        return -score, -(unknown if self.deviations is None else self.deviations), self.path


@dataclass(frozen=True)
class Decision:
    """Above which score an image is anomalous, and what its regions are.

    Attributes:
        threshold: In the unit of :attr:`Prediction.score`; ``None`` where there is none.
        rule: How it was found, in words.
        argument: Command-line argument that sets it; "" where there is none.
        argument_scale: ``(a, b)``: the argument takes ``a * threshold + b``.
        region_fraction: Regions lie above this share of the maximum of an image's own map ...
        pixel_threshold: ... or above this value, in the unit of :attr:`Prediction.anomaly_map`, where it is given.
    """

    threshold: float | None = None
    rule: str = "no threshold"
    argument: str = ""
    argument_scale: tuple[float, float] = (1.0, 0.0)
    region_fraction: float = 0.8
    pixel_threshold: float | None = None


@dataclass(frozen=True)
class PoolReport:
    """What a model tells of the images that it predicts, beyond its batches.

    Attributes:
        images: What is known of each, by name, before a batch of them is predicted.
        decision: What is anomalous.
        skipped: Files that have no score, and why.
        warnings: What is to be known about the pool.
        settings: The model's.
        groups: Images that belong together: what is said of them, which is among the warnings, and their names.
    """

    images: Mapping[str, Prediction] = field(default_factory=dict)
    decision: Decision = field(default_factory=Decision)
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[tuple[str, Sequence[str]]] = ()
