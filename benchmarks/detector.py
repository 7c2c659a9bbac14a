# SPDX-License-Identifier: Apache-2.0
"""Latency and memory of ``Detector``, one image after another: ``python benchmarks/detector.py [--json FILE]``.

Beside it, in the same run and alternating, the model alone on the same image, resized and normalised before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from anomalib_musc import Detector, MuScModel

CALLS, SIDE = 200, 640


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure(backbone: str, references: int) -> dict[str, float]:
    """Return medians in ms and growth in MiB over the calls."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(references + 8)]
    detector = Detector(backbone, pretrained=backbone == "musc-tiny").fit(images[8:])
    model = MuScModel(backbone, pretrained=backbone == "musc-tiny").eval()
    prepared = torch.rand(1, 3, *model.image_size)
    model.build_bank([torch.rand(references, 3, *model.image_size)])
    times: dict[str, list[float]] = {"detector": [], "model": []}
    for index in range(CALLS):
        if index == CALLS // 10:
            before = resident()
        start = time.perf_counter()
        detector.predict(images[index % 8])
        middle = time.perf_counter()
        with torch.inference_mode():
            model(prepared)
        times["detector"].append(middle - start)
        times["model"].append(time.perf_counter() - middle)
    medians = {f"{name}_ms": statistics.median(values) * 1000 for name, values in times.items()}
    return {**medians, "p99_ms": float(np.quantile(times["detector"], 0.99)) * 1000, "growth_mib": resident() - before}


def main() -> None:
    """Print a table, and write it to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="musc-tiny")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    found = {str(references): measure(arguments.backbone, references) for references in (4, 16)}
    print(
        f"| references | Detector, {SIDE} x {SIDE} pixels | 99th percentile | model alone | growth in {CALLS} calls |"
    )
    print("|---|---|---|---|---|")
    for references, row in found.items():
        times = " | ".join(f"{row[name]:.1f} ms" for name in ("detector_ms", "p99_ms", "model_ms"))
        print(f"| {references} | {times} | {row['growth_mib']:.1f} MiB |")
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"backbone": arguments.backbone, "calls": CALLS, **found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
