# SPDX-License-Identifier: Apache-2.0
"""Where the time of ``anomalib test`` goes: ``python benchmarks/profile_test.py --root DATASET --category CATEGORY``.

Runs MuSc through anomalib's Engine on images in MVTec AD's layout, with Lightning's own profiler, and prints a table.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch.profilers import SimpleProfiler

from anomalib_musc import MuSc

sys.path.insert(0, str(Path(__file__).parent))
from mutual_scoring import processor

PARTS = {
    "backbone": ("[MuSc]extract",),
    "mutual scoring": ("[MuSc]score",),
    "metrics": ("PaperEvaluator",),
    "pictures": ("Visualizer",),
    "images read by the framework's loops": ("test_next", "val_next"),
    "images read for the pool": ("[MuSc]read_images",),
}


def parts(profiler: SimpleProfiler, wall: float) -> dict[str, float]:
    """Sum the profiler's records, in seconds; the pool's own share is what its hooks take beside the named parts."""
    records = {name: sum(durations) for name, durations in profiler.recorded_durations.items()}
    table = {
        part: sum(duration for name, duration in records.items() if any(key in name for key in keys))
        for part, keys in PARTS.items()
    }
    hooks = ("validation_start", "test_start", "validation_step", "test_step")
    ours = sum(
        duration
        for name, duration in records.items()
        if name.endswith(hooks) and ("MuSc" in name or "Strategy" in name)
    )
    inside = ("backbone", "mutual scoring", "images read for the pool")
    table["the rest of the pool's life cycle"] = max(0.0, ours - sum(table[part] for part in inside))
    table["everything else: anomalib and Lightning"] = wall - sum(table.values())
    return table


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--category", required=True)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--pretrained", default=False)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=100, help="a multiple of 10")
    parser.add_argument("--no-pictures", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    model = MuSc(
        arguments.backbone,
        pretrained=arguments.pretrained,
        image_size=arguments.image_size,
        visualizer=not arguments.no_pictures,
    )
    data = MVTecAD(arguments.root, arguments.category, eval_batch_size=10, num_workers=0)
    limits = {"limit_val_batches": arguments.images // 10, "limit_test_batches": arguments.images // 10}
    with tempfile.TemporaryDirectory() as folder:
        profiler = SimpleProfiler(dirpath=folder, filename="profile")
        engine = Engine(default_root_dir=folder, profiler=profiler, enable_progress_bar=False, logger=False, **limits)
        start = time.perf_counter()
        engine.test(model, datamodule=data)
        wall = time.perf_counter() - start
    table = parts(profiler, wall)
    print(f"{arguments.images} images, {arguments.backbone} at {arguments.image_size}, {processor()}, {wall:.1f} s")
    print("| part | seconds | share |\n|---|---|---|")
    for part, duration in table.items():
        print(f"| {part} | {duration:.2f} | {duration / wall:.0%} |")
    if arguments.json:
        report = {"images": arguments.images, "device": processor(), "threads": torch.get_num_threads()}
        settings = {"backbone": arguments.backbone, "image_size": arguments.image_size, "wall_s": wall}
        arguments.json.write_text(json.dumps({**report, **settings, "seconds": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
