# SPDX-License-Identifier: Apache-2.0
"""The last lines of a prediction on standard output."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from anomalib_musc.output.files import printable
from anomalib_musc.output.predictions import PoolReport, Prediction
from anomalib_musc.output.table import before_normalisation

_SHOWN = 5


def summary(predictions: Sequence[Prediction], report: PoolReport, files: Sequence[Path]) -> str:
    """Say in a few lines what was found: counts, threshold and rule, the most anomalous images, warnings and files.

    Args:
        predictions: From the most anomalous on.
        report: Their pool.
        files: What was written.

    Example:
        >>> print(summary([Prediction("a.png", 0.9, True)], PoolReport(), [Path("predictions.csv")]))
        1 image: 1 anomalous. Threshold: no threshold.
          0.900  anomalous  a.png
        Written: predictions.csv
    """
    counts = Counter(prediction.label or "unlabelled" for prediction in predictions)
    if report.skipped:
        counts["skipped"] = len(report.skipped)
    number = len(predictions) + len(report.skipped)
    decision = report.decision
    threshold = "" if decision.threshold is None else f"{decision.threshold:.3g}, "
    if threshold and decision.argument_scale != (1.0, 0.0):
        threshold = f"{decision.threshold:.3g} ({before_normalisation(report):.4g} on raw scores), "
    found = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    lines = [f"{number} image{'s' * (number != 1)}: {found}. Threshold: {threshold}{decision.rule}."]
    for prediction in predictions[:_SHOWN]:
        score = "  -  " if prediction.score is None else f"{prediction.score:.3f}"
        lines.append(f"  {score}  {prediction.label or '-':9}  {printable(prediction.path)}")
    lines += [f"Warning: {warning}" for warning in report.warnings]
    troubled = [prediction for prediction in predictions if prediction.notes]
    if troubled:
        have = "image has" if len(troubled) == 1 else "images have"
        lines.append(f"Warning: {len(troubled)} {have} a note in the table, such as: {troubled[0].notes[0]}")
    if files:
        lines.append(f"Written: {', '.join(map(str, files))}")
    return "\n".join(lines)
