# SPDX-License-Identifier: Apache-2.0
"""Same-place search beside the search of whole images.

``python benchmarks/same_place.py time``: seconds of one layer, alternating, medians, at one degree and at three.
``python benchmarks/same_place.py quality ROOT CATEGORY [--backbone NAME] [--image_size N]``: image AUROC of the raw
scores, and pixel AP and AUROC, of the test images of a product in MVTec AD's layout.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from decisions import Extracted, extract
from products import add_backbone_arguments, add_size_argument, add_to_json, case_name
from same_features import choose_backbone

from anomalib_musc import MuScModel
from anomalib_musc.distances.trial import fastest
from anomalib_musc.functional import Precision, layer_scores
from anomalib_musc.metrics.ranking import auroc, average_precision, rank

SIZES = ((64, 37, 1024), (64, 32, 384), (64, 20, 192))  # images, side of the grid, channels
RADII = (None, 0, 1, 2, 4)
PRECISIONS: tuple[Precision, ...] = ("exact", "fast")


def seconds_of(size: tuple[int, int, int], degrees: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Time every radius, and the whole search, in turn."""
    num_images, side, channels = size
    maps = torch.randn(num_images, channels, side, side, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for precision in PRECISIONS:
            for radius in RADII:
                pool = maps if repeat else maps[:4]  # at first each chooses its product
                start = time.perf_counter()
                layer_scores(pool, degrees, search_radius=radius, precision=precision)
                if repeat:
                    times.setdefault(f"{precision}, {name_of(radius)}", []).append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    kernel, is_shared = fastest("exact", side**2, channels, degrees, torch.empty(0))
    whole = {"product": kernel.name, "one product for all degrees": is_shared}
    return {"size": [num_images, side**2, channels], "degrees": list(degrees), "whole, exact": whole, **medians}


def name_of(radius: int | None) -> str:
    """Return what a search is called in tables."""
    return "whole" if radius is None else f"radius {radius}"


def print_times(row: dict[str, Any]) -> None:
    """Print a row: seconds of the whole exact search, and how many times faster the others are."""
    whole = row["exact, whole"]
    faster = [f"{whole / row[f'{precision}, {name_of(radius)}']:.1f}" for precision in PRECISIONS for radius in RADII]
    images = " x ".join(map(str, row["size"]))
    print(f"| {images} | {len(row['degrees'])} | {whole:.1f} s | {' | '.join(faster[1:])} |", flush=True)


def quality_of(model: MuScModel, extracted: Extracted) -> dict[str, dict[str, float]]:
    """Return the metrics of every radius."""
    grid = extracted.layers[0].shape[-2:]
    found = {}
    for radius in RADII:
        scores = [layer_scores(layer, model.aggregation_degrees, search_radius=radius) for layer in extracted.layers]
        anomaly_maps = model.anomaly_maps(torch.stack(scores).mean(dim=0).view(-1, *grid))[:, 0]
        is_anomalous = torch.from_numpy(extracted.labels)
        images, pixels = (
            rank(values[~truth], values[truth])
            for values, truth in ((anomaly_maps.amax(dim=(1, 2)), is_anomalous), (anomaly_maps, extracted.masks))
        )
        found[name_of(radius)] = {
            "image AUROC": float(auroc(images)),
            "pixel AUROC": float(auroc(pixels)),
            "pixel AP": float(average_precision(pixels)),
        }
    return found


def main() -> None:
    """Print a Markdown table; the commands are in the file's own text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("root", nargs="?")
    parser.add_argument("category", nargs="?")
    add_backbone_arguments(parser)
    add_size_argument(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to which the numbers are added")
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    if arguments.what == "time":
        columns = [f"{precision}, {name_of(radius)}" for precision in PRECISIONS for radius in RADII][1:]
        print(f"| images x patches x channels | degrees | exact, whole | {' | '.join(columns)} |")
        print(f"|{'---|' * (3 + len(columns))}")
        for size in SIZES:
            for degrees in ((3,), (1, 3, 5)):
                row = seconds_of(size, degrees, arguments.repeats)
                rows[f"{size}, {len(degrees)} degrees"] = row
                print_times(row)
    else:
        backbone = choose_backbone(arguments.backbone, arguments.weights)
        found = quality_of(*extract(arguments.root, arguments.category, backbone, arguments.image_size))
        name = case_name(arguments)
        rows[name] = found
        for metric in ("image AUROC", "pixel AUROC", "pixel AP"):
            values = " | ".join(f"{100 * found[name_of(radius)][metric]:.1f}" for radius in RADII)
            print(f"| {name} | {metric} | {values} |", flush=True)
    add_to_json(arguments.json, rows, indent=1)


if __name__ == "__main__":
    main()
