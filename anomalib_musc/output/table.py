# SPDX-License-Identifier: Apache-2.0
"""Predictions as a table for people, ``predictions.csv``, and in full for programs, ``predictions.json``."""

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anomalib_musc.output.files import atomic_write
from anomalib_musc.output.predictions import PoolReport, Prediction

REGION = ("region_x", "region_y", "region_width", "region_height", "region_area")
COLUMNS = (
    *("path", "rank", "score", "label", "raw_score", "deviations", "threshold", "regions"),
    *REGION,
    *("picture", "note"),
)
_BYTE_ORDER_MARK = "\ufeff"
SCHEMA_VERSION = 1  # of docs/predictions.schema.json


def write_table(path: Path, predictions: Sequence[Prediction], report: PoolReport) -> None:
    """Write ``predictions.csv``: UTF-8 with a mark by which spreadsheets know it, a row for every file.

    Args:
        path: The table.
        predictions: From the most anomalous on.
        report: Their pool; its skipped files come last.
    """
    rows = rows_of(predictions, report, path.parent)
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        file.write(_BYTE_ORDER_MARK)
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(rows)


def rows_of(predictions: Sequence[Prediction], report: PoolReport, folder: Path) -> list[dict[str, object]]:
    """Return the rows of a table that lies in a folder; see :func:`write_table`."""
    rows = [_row(rank, prediction, report, folder) for rank, prediction in enumerate(predictions, 1)]
    rows += [{"path": file, "label": "skipped", "note": reason} for file, reason in report.skipped.items()]
    return rows


def write_json(path: Path, predictions: Sequence[Prediction], report: PoolReport) -> None:
    """Write ``predictions.json``, see ``docs/predictions.schema.json``: all regions, settings, versions, warnings."""
    decision = report.decision
    content = {
        "schema_version": SCHEMA_VERSION,
        "versions": _versions(),
        "settings": {name: _plain(value) for name, value in report.settings.items()},
        "threshold": {
            "score": _finite(decision.threshold),
            "rule": decision.rule,
            "argument": decision.argument,
            "before_normalisation": _finite(before_normalisation(report)),
        },
        "warnings": list(report.warnings),
        "images": [_image(rank, prediction, path.parent) for rank, prediction in enumerate(predictions, 1)],
        "skipped": [{"path": file, "reason": reason} for file, reason in report.skipped.items()],
    }
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="ascii")


def _row(rank: int, prediction: Prediction, report: PoolReport, folder: Path) -> dict[str, object]:
    row: dict[str, object] = {
        "path": prediction.path,
        "rank": rank,
        "score": _text(prediction.score),
        "label": prediction.label,
        "raw_score": _text(prediction.raw_score),
        "deviations": _text(prediction.deviations, 2),
        "threshold": _text(report.decision.threshold),
        "regions": len(prediction.regions),
        "picture": _relative(prediction.picture, folder),
        "note": "; ".join(prediction.notes),
    }
    if prediction.regions:
        row |= dict(zip(REGION, asdict(prediction.regions[0]).values(), strict=True))
    return row


def _image(rank: int, prediction: Prediction, folder: Path) -> dict[str, object]:
    return {
        "path": prediction.path,
        "rank": rank,
        "score": _finite(prediction.score),
        "label": prediction.label or None,
        "raw_score": _finite(prediction.raw_score),
        "deviations": _finite(prediction.deviations),
        "size": None if prediction.size is None else list(prediction.size),
        "regions": [asdict(region) for region in prediction.regions],
        "similar": list(prediction.similar),
        "picture": _relative(prediction.picture, folder) or None,
        "note": "; ".join(prediction.notes),
    }


def before_normalisation(report: PoolReport) -> float | None:
    """Return the threshold of raw scores."""
    slope, offset = report.decision.argument_scale
    if report.decision.threshold is None:
        return None
    raw = slope * report.decision.threshold + offset
    return raw if (slope, offset) == (1.0, 0.0) else min(max(raw, 0.0), 2.0)  # what the argument takes


def _versions() -> dict[str, str]:
    names = ("anomalib-musc", "anomalib", "torch", "timm", "open_clip_torch", "lightning")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            versions[name] = "unknown"
    return versions


def _plain(value: object) -> Any:
    """Return what JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _finite(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _text(value: float | None, digits: int = 6) -> str:
    return "" if _finite(value) is None else f"{value:.{digits}f}"


def _relative(path: Path | None, folder: Path) -> str:
    if path is None:
        return ""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
