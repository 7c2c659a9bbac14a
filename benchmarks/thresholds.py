# SPDX-License-Identifier: Apache-2.0
"""Decisions without labels: ``python benchmarks/thresholds.py ROOT CATEGORY [--backbone NAME or module:Class]``.

Pools with 0 to 50 % defects are drawn from the test images of a product in MVTec AD's layout. F1 at the threshold that
is found without labels is divided by the best F1 of any threshold, for images and for pixels.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import MVTecAD

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.functional import rscin
from anomalib_musc.thresholds import count_anomalous, image_threshold, pixel_threshold

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 8


def extract(root: str, category: str, backbone: Any, pretrained: bool) -> tuple[MuScModel, dict[str, Any]]:
    """Return the model, and features, labels and masks ``(N, H, W)`` of the test images."""
    torch.manual_seed(0)
    named = {"pretrained": pretrained} if isinstance(backbone, str) else {}
    model = MuSc(backbone, visualizer=False, **named)
    data = MVTecAD(root=root, category=category, num_workers=0, eval_batch_size=1)
    data.setup()
    maps, tokens, labels, masks = [], [], [], []
    for batch in data.test_dataloader():
        feature_maps, class_tokens = model.model.extract(model.pre_processor.transform(batch.image))
        maps.append(feature_maps)
        tokens.append(class_tokens)
        labels.append(bool(batch.gt_label))
        masks.append(torch.nn.functional.interpolate(batch.gt_mask[None].float(), model.model.image_size)[0, 0] > 0)
    layers = [torch.cat(layer) for layer in zip(*maps, strict=True)]
    return model.model, {
        "layers": layers,
        "tokens": torch.cat(tokens),
        "labels": np.array(labels),
        "masks": torch.stack(masks),
    }


def draw(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return the indices of a pool in which this share of the images is anomalous."""
    generator = np.random.default_rng(seed)
    normal, anomalous = np.flatnonzero(~labels), np.flatnonzero(labels)
    num_normal = len(normal) * 4 // 5
    num_anomalous = round(share * num_normal / (1 - share)) or int(share > 0)
    if num_anomalous > len(anomalous):
        num_anomalous, num_normal = len(anomalous), round(len(anomalous) * (1 - share) / share)
    chosen = generator.choice(normal, num_normal, replace=False), generator.choice(anomalous, num_anomalous, False)
    return np.sort(np.concatenate(chosen))


def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return F1, 0 where nothing is true."""
    return float(2 * (truth & predicted).sum() / max(1, truth.sum() + predicted.sum()))


def best_f1(truth: np.ndarray, values: np.ndarray) -> float:
    """Return the best F1 of any threshold."""
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(truth[order])
    return float((2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])).max())


def measure(model: MuScModel, features: dict[str, Any], indices: np.ndarray) -> dict[str, float]:
    """Return the share of good images that are flagged, and F1 over the best F1 of images and of pixels."""
    chosen = torch.from_numpy(indices)
    patch_scores = model.score([layer[chosen] for layer in features["layers"]])
    anomaly_maps = model.anomaly_maps(patch_scores)[:, 0]
    scores = rscin(anomaly_maps.amax(dim=(1, 2)), features["tokens"][chosen]).double().numpy()
    patches = patch_scores.flatten(1).double().numpy()
    flagged = scores > image_threshold(scores, count_anomalous(patches))
    labels, masks = features["labels"][indices], features["masks"][chosen].flatten().numpy()
    result = {"false alarms": float(flagged[~labels].mean())}
    if labels.any():
        values = anomaly_maps.flatten().numpy()
        result["image"] = f1(labels, flagged) / best_f1(labels, scores)
        result["pixel"] = f1(masks, values > pixel_threshold(patches, flagged)) / best_f1(masks, values)
    return result


def main() -> None:
    """Print a table, and add it to a JSON file of several products."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("category")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    module, _, name = arguments.backbone.partition(":")
    backbone = getattr(importlib.import_module(module), name)() if name else arguments.backbone
    model, features = extract(arguments.root, arguments.category, backbone, arguments.pretrained)
    rows: dict[str, dict[str, float]] = {}
    for share in (*SHARES, None):
        pools = [draw(features["labels"], share, seed) for seed in range(DRAWS)] if share is not None else []
        results = [measure(model, features, indices) for indices in pools or [np.arange(len(features["labels"]))]]
        means = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        rows["all images" if share is None else f"{share:.0%}"] = means
    print("| defects | images: F1 / best F1 | pixels: F1 / best F1 | good images flagged |\n|---|---|---|---|")
    for share_of_defects, row in rows.items():
        cells = (f"{row[key]:.0%}" if key in row else "" for key in ("image", "pixel", "false alarms"))
        print(f"| {share_of_defects} | {' | '.join(cells)} |")
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        known[arguments.category] = {"backbone": arguments.backbone, "draws": DRAWS, "rows": rows}
        arguments.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
