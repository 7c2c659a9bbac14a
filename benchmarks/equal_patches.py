# SPDX-License-Identifier: Apache-2.0
"""Pools with a background: time of the scoring against the share of equal patches, and what was chosen by trial.

One layer, three degrees: ``python benchmarks/equal_patches.py``. A share of the patches of every map is the same
vector, as of a plain background, or one of two, or at every place the same vector in all maps but for a thousandth of
noise, as where neither camera nor background moves; the others are random. Shares are timed in turn, and medians are
compared with the pool without equal patches.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path

import torch

from anomalib_musc.distances.trial import fastest
from anomalib_musc.functional import Precision, layer_scores

SIZES = ((8, 1369, 1024), (24, 256, 768), (16, 1024, 384), (24, 400, 192))  # images, patches, channels
SHARES = (0.0, 0.03, 0.1, 0.4, 0.7)
BACKGROUNDS = ("plain", "two plain", "static")
NOISE = 1e-3
DEGREES = (1, 3, 5)
PRECISIONS: tuple[Precision, ...] = ("exact", "fast")


def pool_of(size: tuple[int, int, int], share: float, background: str = "plain") -> torch.Tensor:
    """Return maps ``(N, C, H, W)`` of which a share of the patches are equal."""
    num_images, num_patches, channels = size
    side = math.isqrt(num_patches)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(num_images, channels, side, side, generator=generator)
    equal = maps.flatten(2)[..., : int(share * num_patches)]
    if background == "static":
        equal[:] = torch.randn(1, channels, equal.shape[2], generator=generator)
    else:
        for half in equal.chunk(1 if background == "plain" else 2, dim=2):
            half[:] = torch.randn(1, channels, 1, generator=generator)
    if background == "static":
        equal += NOISE * torch.randn(equal.shape, generator=generator)
    return maps


def seconds(maps: torch.Tensor, precision: Precision) -> float:
    """Time one scoring."""
    start = time.perf_counter()
    layer_scores(maps, DEGREES, precision=precision)
    return time.perf_counter() - start


def measure(size: tuple[int, int, int], precision: Precision, background: str, repeats: int) -> dict[str, object]:
    """Time all shares in turn."""
    kernel, is_shared = fastest(precision, *size[1:], DEGREES, torch.empty(0))
    pools = {share: pool_of(size, share, background) for share in SHARES}
    times: dict[float, list[float]] = {share: [] for share in SHARES}
    for _ in range(repeats):
        for share, maps in pools.items():
            times[share].append(seconds(maps, precision))
    medians = {share: statistics.median(found) for share, found in times.items()}
    return {
        "size": size,
        "background": background,
        "precision": precision,
        "product": kernel.name,
        "one product for all degrees": is_shared,
        "seconds": medians[0.0],
        "times as long": {share: medians[share] / medians[0.0] for share in SHARES},
    }


def main() -> None:
    """Print a Markdown table; the command is in the file's own text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shares = " | ".join(f"{share:.0%} equal" for share in SHARES[1:])
    print(f"| images x patches x channels | background | precision | product | seconds | {shares} |")
    print(f"|---|---|---|---|---|{'---|' * len(SHARES[1:])}")
    rows = []
    for background, size, precision in itertools.product(BACKGROUNDS, SIZES, PRECISIONS):
        row = measure(size, precision, background, arguments.repeats)
        rows.append(row)
        times = " | ".join(f"{row['times as long'][share]:.2f} x" for share in SHARES[1:])  # type: ignore[index]
        product = f"{row['product']}, {'one for all degrees' if row['one product for all degrees'] else 'one each'}"
        case = f"{' x '.join(map(str, size))} | {background} | {precision} | {product}"
        print(f"| {case} | {row['seconds']:.2f} | {times} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
