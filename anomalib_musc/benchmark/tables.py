# SPDX-License-Identifier: Apache-2.0
"""The results as text: ``results.csv`` with a line for every cell and row, ``results.md`` to read."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from anomalib_musc.benchmark.published import AUPRO_NOTE, published_rows
from anomalib_musc.benchmark.records import METRICS, Record
from anomalib_musc.benchmark.summary import MEAN, Row, best_of, with_rscin
from anomalib_musc.output.files import atomic_write

_COLUMNS = ["dataset", "category", "model", "seed", *METRICS, "setup_s", "fit_s", "test_s", "rscin_s"]
_COLUMNS += ["images_per_second", "num_train", "num_test", "map_height", "map_width", "peak_host_bytes"]
_COLUMNS += ["peak_device_bytes", "device", "versions", "setting", "error", "configuration"]


def write_csv(path: Path, records: Sequence[Record]) -> None:
    """Write one line for every record, and one more where it was re-scored."""
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, restval="")
        writer.writeheader()
        for record in records:
            line = _line(record)
            writer.writerow(line)
            if record.rscin is not None and "metrics" in record.rscin:
                changes = {"model": with_rscin(record.model), "rscin_s": f"{record.rscin['seconds']:.3f}"}
                writer.writerow({**line, **changes, **record.rscin["metrics"], "setting": ""})


def write_markdown(path: Path, title: str, rows: Sequence[Row], records: Sequence[Record]) -> None:
    """Write a table for every dataset: each category, the mean, and what others have published."""
    parts = [_escaped(f"# {title}"), _origin(records)]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        parts += [_escaped(f"## {dataset}"), _table([row for row in rows if row.dataset == dataset], dataset)]
    failed = [
        _escaped(f"- {record.model} on {record.dataset} {record.category}: {record.failure}")
        for record in records
        if record.failure
    ]
    parts += ["## Failed", "\n".join(failed)] if failed else []
    with atomic_write(path) as part:
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _line(record: Record) -> dict[str, object]:
    seconds = {f"{name}_s": f"{value:.3f}" for name, value in record.seconds.items()}
    test = record.seconds.get("test")
    sizes = dict(zip(("map_height", "map_width"), record.map_size or ("", ""), strict=True))
    same = {name: getattr(record, name) for name in _COLUMNS if hasattr(record, name)}
    return {
        **same,
        **record.metrics,
        **seconds,
        **sizes,
        "error": record.failure or "",
        "images_per_second": f"{record.num_test / test:.3f}" if test and record.num_test else "",
        "versions": json.dumps(record.versions),
        "configuration": json.dumps(record.configuration),
    }


def _origin(records: Sequence[Record]) -> str:
    done = [record for record in records if record.error is None]
    if not done:
        return "Nothing was measured."
    devices = ", ".join(dict.fromkeys(record.device for record in done))
    packages = ", ".join(f"{name} {number}" for name, number in done[0].versions.items())
    text = (
        f"Measured on {devices} ({packages}). Metrics in percent, the best measured one of each category "
        "in bold; images per second of the test."
    )
    spread = " Several seeds: mean ± standard deviation." if len({record.seed for record in done}) > 1 else ""
    return text + spread


def _table(rows: Sequence[Row], dataset: str) -> str:
    head = ["category", "model", *METRICS.values(), "images/s", "peak memory"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for category in dict.fromkeys(row.category for row in rows):
        here = [row for row in rows if row.category == category]
        best = best_of(here)
        lines += [_measured(row, best) for row in here]
    settings = {row.setting for row in rows}
    published = published_rows(dataset)
    for row in sorted(published, key=lambda row: row.method not in settings):  # the paper's beside ours
        texts = {name: _percent(value) + (" ?" if name == "aupro" else "") for name, value in row.metrics.items()}
        figures = [texts.get(name, "-") for name in METRICS]
        name = f"{row.method} ({row.setting}; {row.source})"
        lines.append(f"| *published* | {name} | {' | '.join(figures)} | | |")
    marks = [row for row in rows if row.setting and row.category == MEAN]
    notes = [f"{_escaped(row.model)}: the setting is that of “{row.setting}”." for row in marks]
    if published:
        count = max(row.num_categories for row in rows)
        notes.append(f"Published figures are means over all categories of {dataset}; those above are over {count}.")
        notes.append(AUPRO_NOTE)
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def _measured(row: Row, best: dict[str, float]) -> str:
    cells = []
    for name in METRICS:
        value = row.metrics.get(name)
        if value is None:
            cells.append("-")
            continue
        text = _percent(value) + (f" ± {_percent(row.spreads[name])}" if name in row.spreads else "")
        cells.append(f"**{text}**" if round(value, 3) == best[name] else text)
    peak = row.peak_device_bytes or row.peak_host_bytes
    memory = f"{peak / 2**20:.0f} MiB" if peak else "-"
    names = f"{_escaped(row.category)} | {_escaped(row.model)}"
    return f"| {names} | {' | '.join(cells)} | {row.images_per_second:.1f} | {memory} |"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _percent(value: float) -> str:
    return f"{100 * round(value, 3):.1f}"
