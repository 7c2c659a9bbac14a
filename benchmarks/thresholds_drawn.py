# SPDX-License-Identifier: Apache-2.0
"""Decisions without labels on many drawn products: ``python benchmarks/thresholds_drawn.py [--backbone NAME]``.

Products of materials, shapes, lights and defects as those that ``musc-tiny`` was trained on, but none of these
(``examples/musc_tiny``): 30 good images and 24 with a defect each. For each share of defects: F1 of images at the
threshold that is found without labels over the best F1 of any threshold, what the number of defects would reach, in how
many pools it is at least 90 %, and how many good images are flagged. An hour for sixty products.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from same_features import choose_backbone
from thresholds import Scored, add_arguments, add_to_json, all_distances, best_f1, f1, print_table, score
from tqdm import tqdm

from anomalib_musc import MuSc, MuScModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "musc_tiny"))
from pools import UNSEEN, draw_material, draw_pool

MATERIALS, GOOD, DEFECTIVE = 60, 30, 24
POOLS = ((24, 0, 6), (16, 0, 2), (20, 1, 4), (22, 3, 4), (24, 6, 4), (24, 9, 4), (24, 11, 3), (30, 18, 3))
"""Images of a pool, how many of them have a defect, and pools of each product."""


def extract_drawn(model: MuScModel, materials: np.ndarray, product: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return what pools of a product are scored by, and which of its images have a defect that can be seen."""
    rng = np.random.default_rng([UNSEEN, 3, product])
    drawn = draw_pool(rng, materials, model.image_size[0], GOOD + DEFECTIVE, DEFECTIVE)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    images = (torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    with torch.inference_mode():
        maps, tokens = zip(*(model.extract(batch) for batch in images.split(6)), strict=True)
        return all_distances(model, list(maps), list(tokens)), drawn.masks.any(axis=(1, 2))


def draw_pools(product: int, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the share of defects and the images of each pool of a product."""
    anomalous = np.flatnonzero(labels)
    for count, num_defects, draws in POOLS:
        for seed in range(draws):
            rng = np.random.default_rng([product, count, num_defects, seed])
            good = rng.choice(GOOD, count - num_defects, replace=False)
            bad = rng.choice(anomalous, min(num_defects, len(anomalous)), replace=False)
            yield f"{num_defects / count:.0%}", np.concatenate([good, bad]).astype(int)


def measure(pool: Scored, labels: np.ndarray) -> dict[str, float]:
    """Return the share of good images that are flagged, and F1 over the best F1."""
    result = {"false alarms": float(pool.flagged[~labels].mean())}
    if labels.any():
        best = best_f1(labels, pool.scores)
        result["image"] = f1(labels, pool.flagged) / best
        result["at least 90 %"] = float(result["image"] >= 0.9)
        result["image, count known"] = f1(labels, pool.scores >= np.sort(pool.scores)[-labels.sum()]) / best
    return result


def summarise(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the means for each share, over the pools that have a defect where it takes one, and the worst pool."""
    rows = {}
    for share, of_share in results.items():
        keys = dict.fromkeys(key for result in of_share for key in result)
        row = {key: float(np.mean([result[key] for result in of_share if key in result])) for key in keys}
        false_alarms = [result["false alarms"] for result in of_share]
        row["most false alarms"] = max(false_alarms)
        row["pools with over 5 %"] = float(np.mean(np.array(false_alarms) > 0.05))
        rows[share] = row
    return rows


def main() -> None:
    """Print a table, and add it to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--products", type=int, default=60)
    add_arguments(parser)
    arguments = parser.parse_args()
    model = MuSc(choose_backbone(arguments.backbone, arguments.weights), visualizer=False).model
    indices = tqdm(range(MATERIALS), "Drawing materials")
    materials = np.stack([draw_material(UNSEEN + 7, index, GOOD + DEFECTIVE) for index in indices])
    results: dict[str, list[dict[str, float]]] = {}
    for product in tqdm(range(arguments.products), "Drawing and judging products"):
        features, labels = extract_drawn(model, materials, product)
        for share, pool in draw_pools(product, labels):
            results.setdefault(share, []).append(measure(score(model, features, pool), labels[pool]))
    found = summarise(results)
    print_table("defects", found)
    name = arguments.backbone.split(":")[-1]
    add_to_json(arguments.json, name, {"products": arguments.products, "shares": found})


if __name__ == "__main__":
    main()
