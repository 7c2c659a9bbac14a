# SPDX-License-Identifier: Apache-2.0
"""The pixel metrics by anomalib's own classes against ours, in one run: ``python benchmarks/pixel_metrics.py``.

Both are fed the same smooth anomaly maps and masks of connected blobs, batch by batch, and timed in turn, updates
included; medians are compared. anomalib has no average precision: it is summed from its precision-recall curve. Ours
share one sort, which is charged to AUROC, computed first; AUPRO, which fills the ranking, is charged with holding the
values.
"""

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib import metrics as anomalib_metrics
from anomalib.data import ImageBatch
from anomalib.metrics import AnomalibMetric, BinaryPrecisionRecallCurve
from torch.nn.functional import interpolate

from anomalib_musc.metrics.evaluator import PaperEvaluator

NAMES = ("AUROC", "F1Max", "AveragePrecision", "AUPRO")
BATCH_SIZE = 32


class _CurveSum(BinaryPrecisionRecallCurve):
    def compute(self) -> torch.Tensor:  # type: ignore[override]
        precision, recall, _ = super().compute()  # by ascending threshold
        return ((recall[:-1] - recall[1:]) * precision[:-1]).sum()


class AveragePrecision(AnomalibMetric, _CurveSum):  # type: ignore[misc]
    """Average precision from anomalib's curve."""


def theirs() -> list[AnomalibMetric]:
    """Make anomalib's metrics."""
    kinds = (anomalib_metrics.AUROC, anomalib_metrics.F1Max, AveragePrecision, anomalib_metrics.AUPRO)
    return [kind(fields=["anomaly_map", "gt_mask"]) for kind in kinds]


def ours() -> list[AnomalibMetric]:
    """Take ours from the evaluator."""
    metrics = {metric.name: metric for metric in PaperEvaluator().test_metrics}
    return [metrics[f"pixel_{name}"] for name in NAMES]


def draw_batches(num_images: int, side: int) -> list[ImageBatch]:
    """Draw maps in [0, 1], two thirds with blobs, 2 to 3 % of all pixels, whose scores are higher but overlap."""
    generator = torch.Generator().manual_seed(0)

    def noise(cells: int) -> torch.Tensor:
        return interpolate(torch.randn(num_images, 1, cells, cells, generator=generator), side, mode="bicubic")[:, 0]

    masks = (noise(8) > 1.6) & (torch.arange(num_images) % 3 > 0)[:, None, None]
    maps = (0.3 + 0.05 * noise(37) + 0.05 * noise(6) + 0.15 * masks).clamp(0, 1)
    images = torch.zeros(num_images, 3, 1, 1)
    return [
        ImageBatch(image=image, anomaly_map=anomaly_map, gt_mask=mask)
        for image, anomaly_map, mask in zip(
            images.split(BATCH_SIZE), maps.split(BATCH_SIZE), masks.split(BATCH_SIZE), strict=True
        )
    ]


def measure(metrics: Sequence[AnomalibMetric], batches: Sequence[ImageBatch]) -> tuple[list[float], list[float]]:
    """Return the seconds and the value of each metric."""
    seconds, values = [0.0] * len(metrics), []
    for batch in batches:
        for index, metric in enumerate(metrics):
            start = time.perf_counter()
            metric.update(batch)
            seconds[index] += time.perf_counter() - start
    for index, metric in enumerate(metrics):
        start = time.perf_counter()
        values.append(metric.compute().item())
        seconds[index] += time.perf_counter() - start
    return seconds, values


def compare(batches: Sequence[ImageBatch], repeats: int) -> list[dict[str, object]]:
    """Time both in turn, each metric and all of them."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    values = {}
    for repeat in range(repeats + 1):
        for side, make in (("anomalib", theirs), ("ours", ours)):
            seconds, values[side] = measure(make(), batches)
            for name, taken in zip((*NAMES, "total"), (*seconds, sum(seconds)), strict=True):
                times[side, name] += [taken] if repeat else []  # the first run warms up
    differences = [abs(one - other) for one, other in zip(values["anomalib"], values["ours"], strict=True)]
    return [
        {
            "metric": name,
            "anomalib_s": statistics.median(times["anomalib", name]),
            "ours_s": statistics.median(times["ours", name]),
            "largest_difference": difference,
        }
        for name, difference in zip((*NAMES, "total"), (*differences, max(differences)), strict=True)
    ]


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=83)
    parser.add_argument("--side", type=int, default=518)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    device = f"{torch.get_num_threads()} CPU threads"
    batches = draw_batches(arguments.images, arguments.side)
    anomalous = torch.cat([batch.gt_mask for batch in batches]).float().mean().item()
    rows = compare(batches, arguments.repeats)
    print(f"{device}, torch {torch.__version__}, {arguments.images} maps of {arguments.side} x {arguments.side}")
    print(f"{anomalous:.1%} of the pixels anomalous")
    print("| pixel metric | anomalib | ours | largest difference |")
    print("|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['metric']} | {row['anomalib_s']:.2f} s | {row['ours_s']:.3f} s | {row['largest_difference']:.1e} |"
        )
    if arguments.json:
        report = {
            "device": device,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "images": arguments.images,
            "side": arguments.side,
            "anomalous_pixels": anomalous,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
