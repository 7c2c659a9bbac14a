# SPDX-License-Identifier: Apache-2.0
"""What the review page shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anomalib_musc.output.regions import Region


@dataclass(frozen=True)
class Card:
    """One image of the pool.

    Attributes:
        path: Its file; "" where it has none.
        score: Its anomaly score, in the units of :attr:`Review.threshold`.
        anomaly_map: Shape ``(h, w)``, a small grid of finite values, of which the browser draws heatmap and outline.
            The first and last values lie on the image's edges, as in ``interpolate(..., align_corners=True)``. A grid
            of more than 64 x 64 is reduced to that.
        image: What is shown: RGB ``(H, W, 3)`` or grey ``(H, W)``, uint8, or the JPEG file that
            :func:`~anomalib_musc.output.review.encode_thumbnail` returns. ``None``: ``path`` is read.
        size: (width, height) of the original. Defaults to those of ``image``, or of the file.
        similar: The most similar other images, as indices into :attr:`Review.cards`, the most similar first; three are
            shown.
        note: Anything to be said about the image.
        regions: Its anomalous regions in pixels of the original, the largest first.
    """

    path: str | Path
    score: float
    anomaly_map: np.ndarray
    image: np.ndarray | bytes | None = None
    size: tuple[int, int] | None = None
    similar: Sequence[int] = ()
    note: str = ""
    regions: Sequence[Region] = ()


@dataclass(frozen=True)
class Review:
    """A pool that was predicted.

    An image is flagged where its score is above the threshold. The outline of a flagged image encloses what lies above
    ``region_fraction`` times the maximum of its own map, or above ``pixel_threshold``, at whatever threshold; other
    images have none.

    Attributes:
        cards: The images, in any order.
        threshold: The score above which an image is flagged.
        rule: In one sentence, how the threshold was found.
        name: What the pool is called.
        argument: Command-line argument that sets the threshold; "": the page shows none to paste.
        argument_scale: ``(a, b)`` where that argument takes ``a * threshold + b``, for scores that were normalised.
        region_fraction: See above.
        pixel_threshold: The value of the maps that the outline encloses instead, where it is given.
        map_range: The values at both ends of the heatmaps' colour scale, one for the pool. Defaults to the median and
            the maximum over all maps.
        warnings: What is to be known about the pool.
        skipped: Images that have no prediction, and why.
        groups: Images that belong together, which the page shows side by side: what is said of them, and their indices
            into :attr:`cards`.

    Raises:
        ValueError: If a number is not finite or out of range, a map is not a grid, or ``similar`` or a group names no
            card.
    """

    cards: Sequence[Card]
    threshold: float
    rule: str
    name: str
    argument: str = "--model.post_processor.image_threshold"
    argument_scale: tuple[float, float] = (1.0, 0.0)
    region_fraction: float = 0.8
    pixel_threshold: float | None = None
    map_range: tuple[float, float] | None = None
    warnings: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[tuple[str, Sequence[int]]] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            msg = f"threshold must be a finite number, got {self.threshold!r}."
            raise ValueError(msg)
        if not 0 < self.region_fraction <= 1:
            msg = f"region_fraction must be above 0 and at most 1, got {self.region_fraction!r}."
            raise ValueError(msg)
        slope, offset = self.argument_scale
        if not (slope > 0 and math.isfinite(slope) and math.isfinite(offset)):
            msg = f"argument_scale must be two finite numbers, the first above 0, got {self.argument_scale!r}."
            raise ValueError(msg)
        for text, members in self.groups:
            if not all(0 <= index < len(self.cards) for index in members):
                msg = f"The group {text!r} must hold indices of the {len(self.cards)} cards, got {list(members)}."
                raise ValueError(msg)
        for card in self.cards:
            _check_card(card, len(self.cards))


def _check_card(card: Card, num_cards: int) -> None:
    if not math.isfinite(card.score):
        msg = f"score of {str(card.path)!r} must be a finite number, got {card.score!r}."
        raise ValueError(msg)
    if card.anomaly_map.ndim != 2 or not card.anomaly_map.size or not np.isfinite(card.anomaly_map).all():
        msg = f"anomaly_map of {str(card.path)!r} must be a grid (h, w) of finite values; its shape is "
        raise ValueError(msg + f"{card.anomaly_map.shape}.")
    if not all(0 <= other < num_cards for other in card.similar):
        msg = f"similar of {str(card.path)!r} must hold indices of the {num_cards} cards, got {list(card.similar)}."
        raise ValueError(msg)
