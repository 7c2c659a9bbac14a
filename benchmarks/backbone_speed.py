# SPDX-License-Identifier: Apache-2.0
"""What an image costs in each backbone, exact and fast: ``python benchmarks/backbone_speed.py [--json FILE]``.

Networks have random weights, each in a process of its own; images are given one at a time. Memory is the peak of the
process, weights and libraries included, or of the GPU. The cosine is that between the features of both precisions.
"""

import argparse
import json
import multiprocessing
import resource
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mutual_scoring import processor

from anomalib_musc.backbones import create_backbone
from anomalib_musc.backbones.half_precision import HalfPrecision, mean_cosine

CASES: tuple[tuple[str, int | None], ...] = (
    ("musc-tiny", None),
    ("musc-tiny", 224),
    ("efficientnet-lite2", None),
    ("mobilenetv2_100", 224),
    ("vit_tiny_patch16_224", None),
    ("dinov2_vits14", 224),
    ("dinov2_vits14", None),
    ("dino_vitbase16", None),
    ("ViT-B-16", None),
    ("dinov2_vitb14", None),
    ("dinov2_vitl14", None),
    ("ViT-L-14-336", None),
)
REPEATS = 5


@torch.no_grad()
def measure(
    name: str, side: int | None, threads: int, device: str, result: "multiprocessing.Queue[dict[str, Any]]"
) -> None:
    """Put the seconds of an image in both precisions, and the peak memory."""
    torch.set_num_threads(threads)
    backbone = create_backbone(name, pretrained=False, image_size=side).to(device)
    images = torch.rand(1, 3, *backbone.image_size, device=device)
    backbone(images)
    is_cuda = device == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    half_precision = HalfPrecision()
    times: dict[str, list[float]] = {"exact": [], "fast": []}
    features = {}
    for _ in range(REPEATS + 1):
        for precision, taken in times.items():
            with half_precision.autocast(backbone, images) if precision == "fast" else nullcontext():
                began = time.perf_counter()
                features[precision] = backbone(images)[0]
                if is_cuda:
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - began)
    chosen = half_precision.trial(backbone, images).dtype
    cosines = [
        mean_cosine(one.float(), other.float()) for one, other in zip(features["exact"], features["fast"], strict=True)
    ]
    row = {f"{precision}_s": median(taken[1:]) for precision, taken in times.items()}
    result.put(row | {"size": backbone.image_size, "fast": str(chosen), "cosine": min(cosines), "peak_bytes": peak})


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="backbones, in place of all")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "rows": {},
    }
    print(f"{report['device']}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| backbone | image | exact | fast | numbers of fast | cosine | peak memory |\n|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for name, side in (case for case in CASES if not arguments.only or case[0] in arguments.only):
        result = context.Queue()
        process = context.Process(target=measure, args=(name, side, arguments.threads, arguments.device, result))
        process.start()
        row = result.get()
        process.join()
        size = " x ".join(map(str, row["size"]))
        numbers = row["fast"].removeprefix("torch.") if row["fast"] != "None" else "float32"
        times = f"{row['exact_s']:.4f} s | {row['fast_s']:.4f} s"
        print(
            f"| {name} | {size} | {times} | {numbers} | {row['cosine']:.5f} | {row['peak_bytes'] / 2**30:.1f} GiB |",
            flush=True,
        )
        report["rows"][f"{name}, {size}"] = row
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
