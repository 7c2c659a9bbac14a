# SPDX-License-Identifier: Apache-2.0
"""Pixels without labels, by MEBin and by our threshold: ``python benchmarks/mebin.py ROOT CATEGORY [--backbone NAME]``.

F1 of the masks over the best F1 of one threshold for all images, for all test images and for a pool with 10 % and with
30 % defects, and the share of images with a mask in a pool of good ones. anomalib's MEBin sees the whole pool as one
batch. Its connected components are counted by OpenCV: kornia's, which it uses, take 1000 steps for each count.
"""

from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from anomalib.post_processing.mebin import mebin_binarize
from same_features import choose_backbone
from thresholds import Scored, add_to_json, best_f1, draw, extract, f1, product_parser, score

from anomalib_musc.decision.thresholds import pixel_threshold

POOLS = {"all images": None, "10%": 0.1, "30%": 0.3, "0%": 0.0}


def count_components(masks: torch.Tensor) -> torch.Tensor:
    """Count the connected components of masks ``(N, 1, H, W)``, by their eight neighbours as kornia does."""
    return torch.tensor([cv2.connectedComponents(mask[0].numpy().astype(np.uint8))[0] - 1 for mask in masks])


def mebin_masks(pool: Scored) -> np.ndarray:
    """Return MEBin's masks of a pool, ``(N, H, W)``."""
    with patch("anomalib.post_processing.mebin._count_connected_components", count_components):
        masks, _ = mebin_binarize(torch.from_numpy(pool.anomaly_maps)[:, None])
    return masks[:, 0].numpy() > 0


def measure(pool: Scored, masks: np.ndarray) -> dict[str, float]:
    """Return for both F1 over the best F1, or the share of images with a mask where nothing is to be found."""
    found = {"MEBin": mebin_masks(pool), "ours": pool.anomaly_maps > pixel_threshold(pool.patch_scores, pool.flagged)}
    if not masks.any():
        return {name: float(of_pool.any(axis=(1, 2)).mean()) for name, of_pool in found.items()}
    best = best_f1(masks.ravel(), pool.anomaly_maps.ravel())
    return {name: f1(masks.ravel(), of_pool.ravel()) / best for name, of_pool in found.items()}


def main() -> None:
    """Print a table, and add it to a JSON file."""
    arguments = product_parser((__doc__ or "").splitlines()[0]).parse_args()
    backbone = choose_backbone(arguments.backbone, arguments.weights)
    model, features = extract(arguments.root, arguments.category, backbone, True)
    labels, masks, rows = features["labels"], features["masks"].numpy(), dict[str, Any]()
    for name, share in POOLS.items():
        indices = np.arange(len(labels)) if share is None else draw(labels, share, 0)
        rows[name] = measure(score(model, features, indices), masks[indices])
        print(f"{name}: " + ", ".join(f"{method} {value:.0%}" for method, value in rows[name].items()), flush=True)
    add_to_json(arguments.json, f"{arguments.category}, {arguments.backbone.split(':')[-1]}", rows)


if __name__ == "__main__":
    main()
