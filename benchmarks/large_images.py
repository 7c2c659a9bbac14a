# SPDX-License-Identifier: Apache-2.0
"""Large images with small defects: shrunk to a network's own size beside tiles at their own size.

``python examples/sample_dataset datasets/large --size 2048 --speck 16 --train-good 1 --test-good 8 --per-defect 8``,
then ``python benchmarks/large_images.py datasets/large fabric gear``. Each run is ``Engine.test`` in a process of its
own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AveragePrecision", "pixel_AUPRO")
VARIANTS: dict[str, dict[str, Any]] = {
    "shrunk to {own}": {},
    "shrunk to {own}, radius 2": {"search_radius": 2},
    "tiles of {own}, radius 2": {"tile_size": "own", "search_radius": 2},
    "tiles of {own}, whole search, fast": {"tile_size": "own", "precision": "fast"},
    "tiles of {own}, whole search, fast, degree 1": {
        "tile_size": "own",
        "precision": "fast",
        "aggregation_degrees": (1,),
    },
    "tiles of {own}, whole search, fast, first layer at degree 1": {
        "tile_size": "own",
        "precision": "fast",
        "layers": (0,),
        "aggregation_degrees": (1,),
    },
}


def run_one(root: str, category: str, backbone: str, own: int, variant: str) -> None:
    """Test one variant, and print what was measured as JSON."""
    import torch
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine

    from anomalib_musc import MuSc

    data = MVTecAD(root=root, category=category, eval_batch_size=1, num_workers=0)
    data.setup()
    arguments = dict(VARIANTS[variant])
    if "tile_size" in arguments:
        arguments |= {"tile_size": own, "image_size": tuple(data.test_data[0].image.shape[-2:])}
    else:
        arguments["image_size"] = own
    model = MuSc(backbone, **arguments, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        (metrics,) = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False).test(
            model, datamodule=data
        )
        seconds = time.perf_counter() - start
    found = {name: float(metrics[name]) for name in METRICS}
    found["seconds"] = seconds
    found["peak_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found["threads"] = torch.get_num_threads()
    print("RESULT", json.dumps(found))


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("categories", nargs="+")
    parser.add_argument("--backbone", default="musc-tiny")
    parser.add_argument("--own", type=int, default=320, help="the network's own image size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="of the ways, those whose name holds this")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        run_one(arguments.root, arguments.categories[0], arguments.backbone, arguments.own, arguments.variant)
        return
    print(
        "| product | images | image AUROC | pixel AUROC | AP | AUPRO | time | memory |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for category in arguments.categories:
        for variant in (name for name in VARIANTS if (arguments.only or "") in name):
            command = [sys.executable, __file__, arguments.root, category, "--backbone", arguments.backbone]
            command += ["--own", str(arguments.own), "--variant", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
            if line is None:
                sys.exit(done.stderr)
            row = rows[f"{category}, {variant}"] = json.loads(line.removeprefix("RESULT"))
            figures = " | ".join(f"{100 * row[name]:.1f}" for name in METRICS)
            took = f"{row['seconds']:.0f} s | {row['peak_GiB']:.1f} GiB"
            print(f"| {category} | {variant.format(own=arguments.own)} | {figures} | {took} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
