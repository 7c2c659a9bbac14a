# SPDX-License-Identifier: Apache-2.0
"""The review page's pool from predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anomalib_musc.output.predictions import PoolReport, Prediction
from anomalib_musc.output.review.records import Card, Review
from anomalib_musc.pool.loaders import common_folder


def review_of(predictions: Sequence[Prediction], report: PoolReport) -> Review | None:
    """Return what the page shows of predictions; ``None`` where there is nothing to show.

    Args:
        predictions: From the most anomalous on.
        report: Their pool.
    """
    shown = [prediction for prediction in predictions if math.isfinite(_score_of(prediction))]
    if not shown:
        return None
    positions = {prediction.path: index for index, prediction in enumerate(shown)}
    cards = [_card(prediction, positions) for prediction in shown]
    decision = report.decision
    root = common_folder([Path(prediction.path) for prediction in shown if prediction.path])
    has_threshold = decision.threshold is not None
    return Review(
        cards,
        threshold=float(decision.threshold or 0.0) if has_threshold else max(card.score for card in cards),
        rule=decision.rule if has_threshold else "there is no threshold: drag one",
        name=root.name if root is not None else "",
        argument=decision.argument,
        argument_scale=decision.argument_scale,
        region_fraction=decision.region_fraction,
        pixel_threshold=decision.pixel_threshold,
        warnings=[warning for warning in report.warnings if warning not in {text for text, _ in report.groups}],
        skipped=report.skipped,
        groups=[(text, [positions[name] for name in names if name in positions]) for text, names in report.groups],
    )


def _score_of(prediction: Prediction) -> float:
    return math.nan if prediction.score is None else prediction.score


def _card(prediction: Prediction, positions: dict[str, int]) -> Card:
    anomaly_map = prediction.anomaly_map
    return Card(
        prediction.path,
        _score_of(prediction),
        np.zeros((2, 2)) if anomaly_map is None or not np.isfinite(anomaly_map).all() else anomaly_map,
        image=prediction.thumbnail,
        size=prediction.size,
        similar=[positions[name] for name in prediction.similar if name in positions],
        note="; ".join(prediction.notes),
        regions=prediction.regions,
    )
