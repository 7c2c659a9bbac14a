# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark: one HTML file that needs no network, with tables, charts and a gallery a dataset."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from anomalib_musc.benchmark.charts import bars, curves, histogram, key_of, roc_curve
from anomalib_musc.benchmark.gallery import Ranking, gallery, rankings_of
from anomalib_musc.benchmark.published import AUPRO_NOTE, Published, published_rows
from anomalib_musc.benchmark.records import METRICS, Record, Store
from anomalib_musc.benchmark.summary import MEAN, Row, best_of
from anomalib_musc.output.files import atomic_write

# Over how many categories published means are.
_ALL_CATEGORIES = {"MVTec AD": 15, "VisA": 12, "BTAD": 3, "MVTec 3D-AD": 10}
_COSTS = ("images/s", "seconds", "host GiB", "GPU GiB")
_SPAN = 1 + len(METRICS) + len(_COSTS)
_DASH = "&ndash;"
_LONG_TABLE = 20


def write_report(path: Path, title: str, rows: list[Row], records: list[Record], store: Store) -> None:
    """Write the report of a benchmark.

    Args:
        path: The HTML file.
        title: Its title.
        rows: Those of the tables, from :func:`~anomalib_musc.benchmark.summary.rows_of` of the records.
        records: Those of all cells in the order of the benchmark, failed ones included.
        store: Has their predictions; cells without any are left out of charts and galleries.

    Raises:
        OSError: If it cannot be written; nothing is left then.
    """
    numbers = {model: number for number, model in enumerate(dict.fromkeys(row.model for row in rows))}
    sections = []
    for dataset in dict.fromkeys(record.dataset for record in records):
        here = [record for record in records if record.dataset == dataset]
        sections.append(_dataset(dataset, [row for row in rows if row.dataset == dataset], here, store, numbers))
    style = files("anomalib_musc.benchmark").joinpath("report.css").read_text(encoding="utf-8")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{_head(title, records)}
{"".join(sections)}</main>
</body>
</html>
"""
    with atomic_write(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")


def _head(title: str, records: list[Record]) -> str:
    versions: dict[str, list[str]] = {}
    for record in records:
        for name, version in record.versions.items():
            versions.setdefault(name, []).append(version)
    failed = sum(record.failure is not None for record in records)
    facts = {
        "Written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Device": _joined(record.device for record in records),
        "Versions": ", ".join(f"{name} {_joined(values)}" for name, values in versions.items()),
        "Cells": f"{len(records) - failed} finished, {failed} failed",
    }
    datasets = dict.fromkeys(record.dataset for record in records)
    links = "".join(f'<li><a href="#{_anchor(dataset)}">{escape(dataset)}</a></li>' for dataset in datasets)
    return f"<h1>{escape(title)}</h1>{_facts(facts)}<nav><ul>{links}</ul></nav>"


def _dataset(dataset: str, rows: list[Row], records: list[Record], store: Store, numbers: Mapping[str, int]) -> str:
    seeds = list(dict.fromkeys(record.seed for record in records))
    first = [record for record in records if record.seed == seeds[0] and record.error is None]
    images = {record.category: record.num_test for record in records if record.error is None}
    facts = {
        "Categories": _joined(record.category for record in records),
        "Test images": f"{sum(images.values())}",
        "Seeds": ", ".join(map(str, seeds)),
    }
    shown = f"<p>Charts and images are those of seed {seeds[0]}.</p>" if len(seeds) > 1 else ""
    parts = [
        f'<section id="{_anchor(dataset)}"><h2>{escape(dataset)}</h2>{_facts(facts)}{_failures(records)}',
        _means(dataset, rows),
        _per_category([row for row in rows if row.category != MEAN]),
        _bar_charts([row for row in rows if row.category == MEAN], numbers),
        f"<h3>Scores, curves and images</h3>{shown}" if images else "",
    ]
    for place, category in enumerate(images):
        rankings = []
        for record in first:
            predictions = store.predictions(record.key) if record.category == category else None
            rankings += [] if predictions is None else rankings_of(record.model, predictions)
        parts.append(_category(category, rankings, numbers, is_open=place == 0))
    return "\n".join([*parts, "</section>\n"])


def _failures(records: list[Record]) -> str:
    items = [
        f"<li><b>{escape(record.model)}</b> on {escape(record.category)}, seed {record.seed}: "
        f"<code>{escape(record.failure)}</code></li>"
        for record in records
        if record.failure is not None
    ]
    if not items:
        return ""
    return (
        f'<div class="failures"><p>{len(items)} of {len(records)} cells failed. A model has no mean where one of its '
        f"cells failed.</p><ul>{''.join(items)}</ul></div>"
    )


def _means(dataset: str, rows: list[Row]) -> str:
    """Return the table of means, measured rows and then published ones, under what has to be known to compare them."""
    means = [row for row in rows if row.category == MEAN]
    published = published_rows(dataset)
    covered = len({row.category for row in rows if row.category != MEAN})
    comparable = [row for row in means if row.num_categories == covered]
    best = best_of(comparable) if len(comparable) > 1 else {}
    notes = ["Metrics are in percent, seconds those of set-up, fit and test together."]
    notes += ["Figures of a category are means over seeds."] if any(row.spreads for row in rows) else []
    notes += ["The best measured figure of a column is bold."] if best else []
    notes += [_coverage(published[0].dataset, covered), AUPRO_NOTE] if published and means else []
    body = "" if means else f'<tr><td colspan="{_SPAN}">No model finished all of its cells.</td></tr>'
    for row in means:
        of_setting = [line for line in published if line.method == row.setting]
        mark = ' <span class="mark">the setting is the paper\'s</span>' if of_setting else ""
        if row.num_categories < covered:
            mark += f' <span class="mark">{row.num_categories} of {covered} categories</span>'
        head = f'<th scope="row">{escape(row.model)}{mark}</th>'
        body += f"<tr>{head}{_metrics(row, best if row in comparable else {})}{_costs(row)}</tr>"
        body += "".join(map(_published, of_setting))
    settings = {row.setting for row in means}
    others = "".join(_published(line) for line in published if line.method not in settings)
    if others:
        head = f'<th class="published" colspan="{_SPAN}" scope="rowgroup">Published by others, not measured here</th>'
        others = f"<tbody><tr>{head}</tr>{others}</tbody>"
    table = _table("Means", ["model"], f'<tbody class="measured">{body}</tbody>{others}')
    return f"<h3>Means over categories</h3><p>{' '.join(notes)}</p>{table}"


def _coverage(dataset: str, covered: int) -> str:
    total = _ALL_CATEGORIES[dataset]
    if covered >= total:
        return f"Measured and published figures are means over all {total} categories."
    categories = "1 category" if covered == 1 else f"{covered} categories"
    return (
        f"<em>Only {covered} of the {total} categories of {escape(dataset)} were run: measured figures are the mean of "
        f"{categories}; published figures are over all {total}.</em>"
    )


def _per_category(rows: list[Row]) -> str:
    if not rows:
        return ""
    bodies = ""
    for category in dict.fromkeys(row.category for row in rows):
        here = [row for row in rows if row.category == category]
        best = best_of(here) if len(here) > 1 else {}
        head = f'<th scope="rowgroup" rowspan="{len(here)}">{escape(category)}</th>'
        lines = [f'<th scope="row">{escape(row.model)}</th>{_metrics(row, best)}{_costs(row)}</tr>' for row in here]
        bodies += f"<tbody><tr>{head}{'<tr>'.join(lines)}</tbody>"
    several = " ± is the standard deviation over seeds." if any(row.spreads for row in rows) else ""
    note = f"<p>The best figure of a category is bold.{several}</p>"
    table = note + _table("Categories", ["category", "model"], bodies)
    if len(rows) > _LONG_TABLE:
        return f"<details><summary><h3>Each category</h3></summary>{table}</details>"
    return f"<h3>Each category</h3>{table}"


def _table(name: str, heads: list[str], bodies: str) -> str:
    names = [name.replace("-", "&#8209;") for name in METRICS.values()]
    columns = "".join(f'<th scope="col" class="text">{head}</th>' for head in heads)
    columns += "".join(f'<th scope="col">{head}</th>' for head in [*names, *_COSTS])
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="figures">'
        f"<thead><tr>{columns}</tr></thead>{bodies}</table></div>"
    )


def _metrics(row: Row | Published, best: Mapping[str, float]) -> str:
    cells = ""
    for name in METRICS:
        value = row.metrics.get(name)
        text = _percent(value)
        if value is not None and round(value, 3) == best.get(name):
            text = f"<strong>{text}</strong>"
        if isinstance(row, Published) and name == "aupro" and value is not None:
            text += " ?"
        if isinstance(row, Row) and name in row.spreads:
            text += f" <small>±{_percent(row.spreads[name])}</small>"
        cells += f"<td>{text}</td>"
    return cells


def _costs(row: Row) -> str:
    sizes = [_DASH if size is None else f"{size / 2**30:.1f}" for size in (row.peak_host_bytes, row.peak_device_bytes)]
    return "".join(f"<td>{text}</td>" for text in (_number(row.images_per_second), _number(row.seconds), *sizes))


def _published(row: Published) -> str:
    return (
        f'<tr class="published"><th scope="row">{escape(row.method)} <small><span class="mark">published</span> '
        f"{escape(row.setting)}, {escape(row.venue)}</small></th>{_metrics(row, {})}"
        f'<td class="source" colspan="{len(_COSTS)}">{escape(row.source)}</td></tr>'
    )


def _bar_charts(means: list[Row], numbers: Mapping[str, int]) -> str:
    charts = []
    for metric, name in METRICS.items():
        values = {row.model: row.metrics[metric] for row in means if metric in row.metrics}
        charts += [_figure(name, bars(name, values, numbers))] if values else []
    return f'<h3>Means as bars</h3><div class="charts">{"".join(charts)}</div>' if charts else ""


def _category(category: str, rankings: list[Ranking], numbers: Mapping[str, int], *, is_open: bool) -> str:
    """Return curves, histograms and the gallery of a category, folded but for the first."""
    head = f"<details{' open' if is_open else ''}><summary><h4>{escape(category)}</h4></summary>"
    if not rankings:
        return f"{head}<p>There are no predictions.</p></details>"
    legend = "".join(f"<li>{key_of(numbers[each.model])} {escape(each.model)}</li>" for each in rankings)
    charts = "".join([_roc(category, rankings, numbers), _pro(category, rankings, numbers)])
    for each in rankings:
        chart = histogram(each.model, each.scores, each.predictions.labels, numbers[each.model])
        charts += _figure(f"{key_of(numbers[each.model])} {escape(each.model)}", chart)
    return (
        f'{head}<ul class="legend">{legend}</ul><div class="charts">{charts}</div>'
        f"{gallery(rankings, numbers)}</details>"
    )


def _roc(category: str, rankings: Sequence[Ranking], numbers: Mapping[str, int]) -> str:
    found = {each.model: roc_curve(each.scores, each.predictions.labels) for each in rankings}
    lines = {model: curve for model, curve in found.items() if curve is not None}
    if not lines:
        return "<p>There is no ROC curve without both normal and anomalous images.</p>"
    axes = ("false positive rate", "true positive rate")
    return _figure("ROC of image scores", curves(f"ROC curves on {category}", axes, lines, numbers))


def _pro(category: str, rankings: Sequence[Ranking], numbers: Mapping[str, int]) -> str:
    lines = {}
    for each in rankings:
        curve = each.predictions.pro_curve
        if curve is not None and each.scores is each.predictions.scores:  # not of RsCIN, which leaves maps as they are
            lines[each.model] = curve
    if not lines:
        return "<p>There is no PRO curve without masks.</p>"
    axes = ("false positive rate of pixels", "mean overlap of regions")
    chart = curves(f"PRO curves on {category}", axes, lines, numbers, longest=0.3)
    return _figure("PRO of anomaly maps", chart)


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items() if text)
    return f"<dl>{items}</dl>"


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts)))


def _anchor(dataset: str) -> str:
    return escape(f"dataset-{'-'.join(dataset.split())}")


def _percent(value: float | None) -> str:
    return _DASH if value is None or not math.isfinite(value) else f"{100 * round(value, 3):.1f}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return _DASH
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
