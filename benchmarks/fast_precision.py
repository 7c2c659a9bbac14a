# SPDX-License-Identifier: Apache-2.0
"""What ``precision="fast"`` changes on photographs.

``python benchmarks/fast_precision.py ROOT CATEGORY [--backbone NAME] [--image_size N] [--json FILE]``: the backbone in
16-bit numbers, the scoring, and both, beside exact: AUROC of the test images of a product in MVTec AD's layout, and the
largest difference of a map as a share of the range of all. The numbers go to a file that may hold those of others.
"""

import argparse
from pathlib import Path

import torch
from decisions import Extracted, extract
from mutual_scoring import processor
from products import add_product_arguments, add_size_argument, add_to_json, case_name
from same_features import choose_backbone

from anomalib_musc import MuScModel, functional
from anomalib_musc.functional import Precision
from anomalib_musc.metrics.ranking import auroc, rank

WAYS: dict[str, tuple[Precision, Precision]] = {  # of the backbone, and of the scoring
    "exact": ("exact", "exact"),
    "fast backbone": ("fast", "exact"),
    "fast scoring": ("exact", "fast"),
    "fast": ("fast", "fast"),
}


def maps_of(model: MuScModel, extracted: Extracted, precision: Precision) -> torch.Tensor:
    """Score the images in a precision: anomaly maps ``(N, H, W)``."""
    model.precision = precision
    return model.anomaly_maps(model.score(extracted.layers))[:, 0]


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return AUROC and differences of each way."""
    backbone = choose_backbone(arguments.backbone, arguments.weights)
    where = arguments.root, arguments.category, backbone, arguments.image_size
    extracted: dict[Precision, tuple[MuScModel, Extracted]] = {
        "exact": extract(*where, "exact"),
        "fast": extract(*where, "fast"),
    }
    found, exact = {}, None
    for name, (of_backbone, of_scoring) in WAYS.items():
        model, images = extracted[of_backbone]
        maps = maps_of(model, images, of_scoring)
        exact = maps if exact is None else exact
        raw, is_anomalous = maps.amax(dim=(1, 2)), torch.from_numpy(images.labels)
        scores = functional.rscin(raw, images.tokens)
        found[name] = {
            metric: float(auroc(rank(values[~truth], values[truth])))
            for metric, values, truth in (
                ("image AUROC", scores, is_anomalous),
                ("image AUROC before RsCIN", raw, is_anomalous),
                ("pixel AUROC", maps, images.masks),
            )
            if truth.any()
        } | {"largest difference": float((maps - exact).abs().max() / (exact.max() - exact.min()))}
    return found


def main() -> None:
    """Print a Markdown table; the command is in the file's own text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_product_arguments(parser)
    add_size_argument(parser)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = compare(arguments)
    name = case_name(arguments)
    for way in WAYS:
        numbers = " | ".join(f"{value:.4f}" for value in found[way].values())
        print(f"| {name} | {way} | {numbers} |", flush=True)
    machine = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    add_to_json(arguments.json, {**machine, name: found})


if __name__ == "__main__":
    main()
