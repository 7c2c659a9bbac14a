# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of large pools and small budgets: ``python benchmarks/memory.py``.

LNAMD and mutual scoring at 3 degrees of 196 patches of 192 channels, as a small transformer has them at 224 x 224.
Every line is a process of its own; the peak is what it adds to the features, which are counted beside the budget.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from mutual_scoring import processor, resident

from anomalib_musc.distances.storage import budget_in_bytes
from anomalib_musc.functional import layer_scores

CHANNELS, SIDE = 192, 14
GROWTH = (250, 500, 1000, 2000)  # images, with the default budget
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # GiB, for 250 images


def measure(
    num_images: int, num_layers: int, budget: float | None, precision: Any, result: "multiprocessing.Queue"
) -> None:
    """Put the seconds, the peak and the budget in bytes."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(num_images, CHANNELS, SIDE, SIDE, generator=generator) for _ in range(num_layers)]
    layer_scores(layers[0][:4], precision=precision)  # loads what the libraries load once
    before, allowed = resident("VmRSS"), budget_in_bytes(budget, torch.device("cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    for maps in layers:
        layer_scores(maps, precision=precision, memory_budget=budget)
    result.put((time.perf_counter() - start, resident("VmHWM") - before, allowed))


def run(num_images: int, num_layers: int, budget: float | None, precision: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=measure, args=(num_images, num_layers, budget, precision, result))
    process.start()
    seconds, peak, allowed = result.get()
    process.join()
    row = {"images": num_images, "layers": num_layers, "stated_gib": budget, "precision": precision}
    return {**row, "seconds": seconds, "peak_bytes": peak, "budget_bytes": allowed}


def main() -> None:
    """Print a table and write the numbers as JSON; Linux only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--precision", default="exact")
    parser.add_argument("--layers", type=int, default=3)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads(), "rows": []}
    print(f"{report['device']}, {report['threads']} threads, torch {torch.__version__}")
    print("| images | budget | time | per pair, layer and degree | peak | of the budget |\n|---|---|---|---|---|---|")
    cases = [(GROWTH[0], budget) for budget in BUDGETS] + [(num_images, None) for num_images in GROWTH]
    for num_images, budget in cases:
        row = run(num_images, arguments.layers, budget, arguments.precision)
        report["rows"].append(row)
        pair = row["seconds"] / (num_images * (num_images - 1) / 2) / 3 / arguments.layers * 1e6
        stated = "default" if budget is None else f"{budget * 1024:.0f} MiB"
        share = row["peak_bytes"] / row["budget_bytes"]
        peak = row["peak_bytes"] / 2**20
        cells = (num_images, stated, f"{row['seconds']:.1f} s", f"{pair:.0f} µs", f"{peak:.0f} MiB", f"{share:.0%}")
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
