# SPDX-License-Identifier: Apache-2.0
"""Banks of good training images beside mutual scoring: ``python benchmarks/reference_quality.py ROOT CATEGORY``.

Image and pixel AUROC on the test images of a product in MVTec AD's layout.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from products import add_product_arguments, add_to_json
from same_features import choose_backbone

from anomalib_musc import MuSc

SIZES = (1, 4, 8, 14)


def measure(given: argparse.Namespace, **arguments: Any) -> tuple[float, float]:
    """Return image and pixel AUROC in percent."""
    torch.manual_seed(0)
    weights: dict[str, Any] = {"pretrained": False} if given.random else {}
    model = MuSc(choose_backbone(given.backbone, given.weights), **weights, visualizer=False, **arguments)
    data = MVTecAD(root=given.root, category=given.category, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        (metrics,) = Engine(default_root_dir=folder, enable_progress_bar=False).test(model, datamodule=data)
    return 100 * metrics["image_AUROC"], 100 * metrics["pixel_AUROC"]


def main() -> None:
    """Print a table, and add it to a JSON file of several products."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_product_arguments(parser)
    parser.add_argument("--random", action="store_true", help="random weights for a named backbone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {"mutual": {}}
    cases |= {f"reference, {size}": {"mode": "reference", "k_shot": size} for size in SIZES}
    cases["both, 14"] = {"mode": "both", "k_shot": SIZES[-1]}
    rows = {}
    print("| mode | image AUROC | pixel AUROC |\n|---|---|---|")
    for name, case in cases.items():
        rows[name] = measure(arguments, **case)
        print(f"| {name} | {rows[name][0]:.1f} | {rows[name][1]:.1f} |", flush=True)
    add_to_json(arguments.json, {arguments.category: {"backbone": arguments.backbone, "rows": rows}})


if __name__ == "__main__":
    main()
