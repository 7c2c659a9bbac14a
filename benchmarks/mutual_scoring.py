# SPDX-License-Identifier: Apache-2.0
"""Mutual scoring in the official shape against ours, in one run: ``python benchmarks/mutual_scoring.py``.

The official shape, written from the paper's equations: one image at a time against all others, ``torch.cdist``, the
minimum, a sort, the average. Both are timed in turn and the medians compared, beside the rate at which this machine
multiplies matrices of the same size. Operations count each unordered pair of images once.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from anomalib_musc.functional import mutual_scores

SIZES = ((16, 1369, 1024), (64, 256, 768), (32, 1024, 384))  # images, patches, channels


def official_shape(features: torch.Tensor, interval: tuple[float, float] = (0.0, 0.3)) -> torch.Tensor:
    """Score ``(N, L, C)`` one image at a time against all others."""
    num_images, num_patches, _ = features.shape
    start, stop = (int((num_images - 1) * bound) for bound in interval)
    scores = []
    for index in range(num_images):
        others = torch.cat([features[:index], features[index + 1 :]]).flatten(0, 1)
        distances = torch.cdist(features[index], others).view(num_patches, num_images - 1, num_patches)
        scores.append(distances.amin(dim=2).sort(dim=1).values[:, start : max(stop, start + 1)].mean(dim=1))
    return torch.stack(scores)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call, its device's queue included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(size: tuple[int, int, int], repeats: int, device: torch.device) -> dict[str, object]:
    """Time both ways and the bare matrix product, in turn, on random unit vectors."""
    num_images, num_patches, channels = size
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=-1).to(device)
    product = torch.empty(num_patches, num_patches, device=device)

    def products() -> None:
        for index in range(1, num_images):
            torch.mm(features[0], features[index].T, out=product)

    works: dict[str, Callable[[], object]] = {
        "official": lambda: official_shape(features),
        "ours": lambda: mutual_scores(features),
        "products": products,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    official, ours, bare = (statistics.median(times[name][1:]) for name in works)  # the first run warms up
    pairs = num_images * (num_images - 1) / 2
    operations = 2 * num_patches**2 * channels
    deviation = (official_shape(features) - mutual_scores(features)).abs().max().item()
    return {
        "images": num_images,
        "patches": num_patches,
        "channels": channels,
        "official_s": official,
        "ours_s": ours,
        "times_faster": official / ours,
        "machine_gflops": operations * (num_images - 1) / bare / 1e9,
        "ours_gflops": operations * pairs / ours / 1e9,
        "largest_difference": deviation,
    }


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = []
    print(f"{name}, torch {torch.__version__}, float32, one layer, one degree")
    print("| images | patches | channels | official | ours | times faster | ours, of the matrix rate |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        row = compare(size, arguments.repeats, device)
        rows.append(row)
        share = float(str(row["ours_gflops"])) / float(str(row["machine_gflops"]))
        print(
            f"| {size[0]} | {size[1]} | {size[2]} | {row['official_s']:.3f} s | {row['ours_s']:.3f} s "
            f"| {row['times_faster']:.1f} | {share:.0%} |"
        )
    if arguments.json:
        report = {"device": name, "machine": platform.machine(), "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
