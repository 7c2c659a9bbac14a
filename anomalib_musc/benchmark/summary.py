# SPDX-License-Identifier: Apache-2.0
"""From records to rows of a table: second rows with RsCIN, means over seeds and categories, the best of each metric."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from anomalib_musc.benchmark.records import METRICS, Record

MEAN = "mean"


@dataclass
class Row:
    """A model, with or without RsCIN, on a category or on the mean of all: means over seeds.

    Attributes:
        category: A category's name, or ``MEAN``.
        metrics: By the names of ``METRICS``, fractions.
        spreads: Their standard deviations over seeds, where there are several.
        seconds: Of set-up, fit and test together, the re-scoring included.
        images_per_second: Of the test alone.
        peak_host_bytes: The largest.
        setting: Name of the published row whose setting this is, or ``None``.
        num_categories: How many categories a mean is of.
    """

    model: str
    dataset: str
    category: str
    metrics: dict[str, float]
    spreads: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float = 0.0
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    setting: str | None = None
    num_categories: int = 1


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Return the rows of finished cells by dataset and category, the mean of each dataset last.

    A model that failed on a category has no mean: the means of others would be over more categories.

    Args:
        records: Finished cells in the order of the benchmark, failed ones included.
    """
    seeds: dict[tuple[str, str, str], list[Row]] = {}
    failed = set()
    for record in records:
        if record.failure is not None:
            failed.add((record.dataset, with_rscin(record.model)))
        if record.error is not None:
            failed.add((record.dataset, record.model))
            continue
        for row in _rows_of_cell(record):
            seeds.setdefault((row.dataset, row.category, row.model), []).append(row)
    rows = [_mean_over_seeds(group) for group in seeds.values()]
    result = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        here = [row for row in rows if row.dataset == dataset]
        for category in dict.fromkeys(row.category for row in here):
            result += [row for row in here if row.category == category]
        for model in dict.fromkeys(row.model for row in here):
            if (dataset, model) not in failed:
                result.append(_mean_over_categories([row for row in here if row.model == model]))
    return result


def best_of(rows: Iterable[Row]) -> dict[str, float]:
    """Return the largest value of every metric, as it is printed: to a tenth of a percent."""
    best: dict[str, float] = {}
    for row in rows:
        for metric, value in row.metrics.items():
            best[metric] = max(best.get(metric, 0.0), round(value, 3))
    return best


def with_rscin(model: str) -> str:
    """Return the name of a model's second row."""
    return f"{model} + RsCIN"


def _rows_of_cell(record: Record) -> list[Row]:
    seconds, test = sum(record.seconds.values()), record.seconds["test"]
    first = Row(
        model=record.model,
        dataset=record.dataset,
        category=record.category,
        metrics=record.metrics,
        seconds=seconds,
        images_per_second=record.num_test / test,
        peak_host_bytes=record.peak_host_bytes,
        peak_device_bytes=record.peak_device_bytes,
        setting=record.setting,
    )
    if record.rscin is None or "error" in record.rscin:
        return [first]
    changed = {
        "model": with_rscin(record.model),
        "metrics": {**record.metrics, **record.rscin["metrics"]},
        "seconds": seconds + record.rscin["seconds"],
        "images_per_second": record.num_test / (test + record.rscin["seconds"]),
        "setting": None,
    }
    return [first, Row(**{**vars(first), **changed})]


def _mean_over_seeds(rows: list[Row]) -> Row:
    mean = _mean_over_categories(rows)
    mean.category, mean.num_categories = rows[0].category, 1
    mean.seconds /= len(rows)
    if len(rows) > 1:
        mean.spreads = {name: statistics.stdev(row.metrics[name] for row in rows) for name in mean.metrics}
    return mean


def _mean_over_categories(rows: list[Row]) -> Row:
    settings = {row.setting for row in rows}
    return Row(
        model=rows[0].model,
        dataset=rows[0].dataset,
        category=MEAN,
        metrics={
            name: statistics.fmean(row.metrics[name] for row in rows)
            for name in METRICS
            if all(name in row.metrics for row in rows)
        },
        seconds=sum(row.seconds for row in rows),
        images_per_second=statistics.harmonic_mean([row.images_per_second for row in rows]),
        setting=settings.pop() if len(settings) == 1 else None,
        num_categories=len(rows),
        peak_host_bytes=max((row.peak_host_bytes for row in rows if row.peak_host_bytes is not None), default=None),
        peak_device_bytes=max(
            (row.peak_device_bytes for row in rows if row.peak_device_bytes is not None), default=None
        ),
    )
