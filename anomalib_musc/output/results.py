# SPDX-License-Identifier: Apache-2.0
"""The files of a prediction: table, details and page."""

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from anomalib_musc.output.predictions import PoolReport, Prediction
from anomalib_musc.output.review import review_of, write_review
from anomalib_musc.output.table import write_json, write_table


def write_results(
    table: Path, predictions: Sequence[Prediction], report: PoolReport, *, review: bool = True
) -> list[Path]:
    """Write the table, ``predictions.json`` and ``review.html`` beside it.

    Args:
        table: ``predictions.csv``, or a name with the number of a process.
        predictions: From the most anomalous on.
        report: Their pool.
        review: Whether to write the page. Where it cannot be written, a warning says why.

    Returns:
        The page, if there is one, and the table.
    """
    write_table(table, predictions, report)
    write_json(table.with_suffix(".json"), predictions, report)
    shown = review_of(predictions, report) if review else None
    if shown is None:
        return [table]
    page = table.with_name(table.name.replace("predictions", "review")).with_suffix(".html")
    try:
        return [*write_review(page, shown)[:1], table]
    except (OSError, ValueError) as error:
        rank_zero_warn(f"review.html was not written: {error}")
        return [table]
