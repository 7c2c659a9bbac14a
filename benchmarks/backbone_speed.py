# SPDX-License-Identifier: Apache-2.0
"""Images per second of small backbones: ``python benchmarks/backbone_speed.py [--json FILE]``."""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mutual_scoring import processor

from anomalib_musc.backbones import create_backbone

NAMES = ("musc-tiny", "vit_tiny_patch16_224", "vit_small_patch14_dinov2.lvd142m", "mobilenetv2_100")
CASES = [*((name, 224) for name in NAMES), ("musc-tiny", 320)]
REPEATS = 9
BATCHES = (1, 16)


def seconds(name: str, side: int, batch: int) -> float:
    """Median time of one square image in batches of this size."""
    backbone = create_backbone(name, pretrained=False, image_size=side)
    images = torch.rand(batch, 3, side, side)
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        backbone(images)
        times.append((time.perf_counter() - began) / batch)
    return median(times[2:])


@torch.no_grad()
def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    report["images_per_second"] = rows = {
        f"{name}, {side} x {side}": [1 / seconds(name, side, batch) for batch in BATCHES] for name, side in CASES
    }
    print(f"{report['device']}, {report['threads']} threads, torch {torch.__version__}\n")
    print("| backbone | images per second, one at a time | in batches of 16 |\n|---|---|---|")
    for name, rates in rows.items():
        print(f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
