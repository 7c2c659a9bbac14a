# SPDX-License-Identifier: Apache-2.0
"""A defect that many images share: the paper's interval beside a second one.

``python benchmarks/repeated_defects.py FOLDER [FOLDER ...] --backbone NAME``: of each folder of good images of one
product a pool is drawn, and one and the same scratch into a share of its images, at one place or at varied ones. Raw
image scores, mean AUROC over the draws.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from anomalib_musc import MuScModel
from anomalib_musc.compat.pre_processor import resize_and_normalise
from anomalib_musc.functional import larger_score, layer_scores

SHARES = (0.1, 0.2, 0.3, 0.4)
SECONDS = ((0.4, 0.7), (0.3, 0.6))
POOL = 36


def scratched(image: np.ndarray, generator: np.random.Generator, *, is_moved: bool) -> np.ndarray:
    """Draw a scratch ``(H, W, 3)``: the same one, at the same place or moved by up to a quarter of the image."""
    height, width = image.shape[:2]
    shift = generator.uniform(-0.25, 0.25, 2) if is_moved else np.zeros(2)
    points = (np.array([[0.40, 0.42], [0.47, 0.52], [0.52, 0.50], [0.60, 0.61]]) + shift) * [width, height]
    drawn = image.copy()
    cv2.polylines(drawn, [points.astype(np.int32)], False, (35, 30, 30), max(2, width // 120), cv2.LINE_AA)
    return cv2.addWeighted(drawn, 0.8, image, 0.2, 0)


def scores_of(model: MuScModel, images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Return raw image scores ``(N,)`` by the paper's interval and with each of the second ones."""
    transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)
    batches = [transform(torch.from_numpy(image).permute(2, 0, 1)[None] / 255) for image in images]
    maps = [torch.cat(layer) for layer in zip(*(model.extract(batch)[0] for batch in batches), strict=True)]
    grid = maps[0].shape[-2:]
    intervals = ((0.0, 0.3), *SECONDS)
    means = {
        bounds: [layer_scores(layer, model.aggregation_degrees, bounds, precision="fast") for layer in maps]
        for bounds in intervals
    }
    found = {"the paper's": torch.stack(means[intervals[0]])}
    for bounds in SECONDS:
        pairs = zip(means[intervals[0]], means[bounds], strict=True)
        found[f"and {bounds}"] = torch.stack([larger_score(first, second) for first, second in pairs])
    maps_of = {name: model.anomaly_maps(scores.mean(dim=0).view(-1, *grid)) for name, scores in found.items()}
    return {name: anomaly_maps.amax(dim=(1, 2, 3)) for name, anomaly_maps in maps_of.items()}


def measure(model: MuScModel, folder: Path, draws: int) -> list[dict[str, object]]:
    """Return one row for each share and kind of place."""
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    rows = []
    for is_moved in (False, True):
        for share in SHARES:
            aurocs: dict[str, list[float]] = {}
            for seed in range(draws):
                generator = np.random.default_rng(seed)
                chosen = generator.permutation(len(files))[:POOL]
                images = [cv2.cvtColor(cv2.imread(str(files[index])), cv2.COLOR_BGR2RGB) for index in chosen]
                number = round(share * len(images))
                images[:number] = [scratched(image, generator, is_moved=is_moved) for image in images[:number]]
                labels = [index < number for index in range(len(images))]
                for name, scores in scores_of(model, images).items():
                    aurocs.setdefault(name, []).append(float(roc_auc_score(labels, scores)))
            means = {name: round(100 * float(np.mean(values)), 1) for name, values in aurocs.items()}
            rows.append({"product": folder.name, "place": "varied" if is_moved else "same", "share": share, **means})
            print("|", " | ".join(map(str, rows[-1].values())), "|", flush=True)
    return rows


def main() -> None:
    """Print a Markdown table; the command is in the file's own text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--backbone", default="musc-tiny")
    parser.add_argument("--pretrained", help="a local file")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    model = MuScModel(arguments.backbone, pretrained=arguments.pretrained or True)
    print("| product | place | share |", " | ".join(["the paper's", *(f"and {bounds}" for bounds in SECONDS)]), "|")
    print(f"|---|---|---|---|{'---|' * len(SECONDS)}")
    rows = [row for folder in arguments.folders for row in measure(model, folder, arguments.draws)]
    if arguments.json:
        arguments.json.write_text(json.dumps({"backbone": arguments.backbone, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
