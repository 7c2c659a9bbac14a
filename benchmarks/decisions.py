# SPDX-License-Identifier: Apache-2.0
"""Decisions without labels: ``python benchmarks/decisions.py ROOT CATEGORY [--backbone NAME] [--image_size N]``.

Pools with 0 to 50 % defects are drawn from the test images of a product in MVTec AD's layout, and scored. For several
rules: the share of good images that are flagged in good pools, and F1 of images over the best F1 of any threshold; and
for the rule that is used, F1 of pixels over the best.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from anomalib.data.utils import read_image, read_mask
from products import add_product_arguments, add_size_argument, add_to_json, case_name
from same_features import choose_backbone

from anomalib_musc import MuSc, MuScModel, RsCINPostProcessor
from anomalib_musc.functional import Precision, lnamd

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 10


class Extracted(NamedTuple):
    """The test images of a product: maps of each layer, class tokens, labels, masks ``(N, H, W)``."""

    layers: list[torch.Tensor]
    tokens: torch.Tensor
    labels: np.ndarray
    masks: torch.Tensor


def extract(
    root: str, category: str, backbone: Any, image_size: int | None, precision: Precision = "exact"
) -> tuple[MuScModel, Extracted]:
    """Return the model, and what it extracts of the test images."""
    torch.manual_seed(0)
    model = MuSc(backbone, image_size=image_size, precision=precision, visualizer=False)
    paths = sorted(path for path in Path(root, category, "test").glob("*/*") if path.is_file())
    if not paths:
        msg = f"No image lies in {Path(root, category, 'test')}."
        raise FileNotFoundError(msg)
    maps, tokens, masks = [], [], []
    for path in paths:
        image = read_image(path, as_tensor=True)[None]
        feature_maps, class_tokens = model.model.extract(model.pre_processor.transform(image))
        maps.append(feature_maps)
        tokens.append(class_tokens)
        masks.append(read_mask_of(path, model.model.image_size))
    labels = np.array([path.parent.name != "good" for path in paths])
    layers = [torch.cat(layer) for layer in zip(*maps, strict=True)]
    return model.model, Extracted(layers, torch.cat(tokens), labels, torch.stack(masks))


def read_mask_of(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """Return the mask ``(H, W)`` of an image, empty where there is none."""
    file = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
    if not file.is_file():
        return torch.zeros(size, dtype=torch.bool)
    mask = torch.from_numpy(np.asarray(read_mask(file)))[None, None].float()
    return torch.nn.functional.interpolate(mask, size)[0, 0] > 0


def all_distances(model: MuScModel, extracted: Extracted) -> dict[str, Any]:
    """Return what pools of these images are scored by: distances, class tokens and the shape of the maps."""
    layers, degrees = extracted.layers, model.aggregation_degrees
    return {
        "grid": layers[0].shape[-2:],
        "distances": torch.stack([distances(lnamd(layer, degree)) for layer in layers for degree in degrees]),
        "tokens": extracted.tokens,
    }


def distances(features: torch.Tensor) -> torch.Tensor:
    """Return the distance of every patch ``(N, L, C)`` to the nearest patch of every image: ``(N, L, N)``."""
    of_all = features.flatten(0, 1).T
    likeness = [(patches @ of_all).unflatten(1, features.shape[:2]).amax(dim=2) for patches in features]
    return (2 - 2 * torch.stack(likeness)).clamp_min(0).sqrt()


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


def f1_of_highest(truth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return F1 of the highest one, two, ... of all values."""
    hits = np.cumsum(truth[np.argsort(-values, kind="stable")])
    return 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])


def best_f1(truth: np.ndarray, values: np.ndarray) -> float:
    """Return the best F1 of any threshold."""
    return float(f1_of_highest(truth, values).max())


RULES = {  # percentiles of the raw scores, and factor; the first is the package's
    "45th + 3 (45th - 20th)": (0.45, 0.2, 3.0),
    "40th + 2.5 (40th - 10th)": (0.4, 0.1, 2.5),
    "median + 3 (median - lower quartile)": (0.5, 0.25, 3.0),
}


class Scored(NamedTuple):
    """A pool: the scores of its images ``(N,)`` in the unit of a distance, and its anomaly maps ``(N, H, W)``."""

    scores: np.ndarray
    anomaly_maps: np.ndarray

    def flagged(self, rule: str) -> np.ndarray:
        """Which images a rule labels anomalous."""
        upper, lower, factor = RULES[rule]
        high, low = np.quantile(self.anomaly_maps.max(axis=(1, 2)), (upper, lower))
        return self.scores > high + factor * (high - low)


def score(model: MuScModel, features: dict[str, Any], indices: np.ndarray) -> Scored:
    """Score the chosen images as a pool, by the distances of all."""
    chosen, count = torch.from_numpy(indices), len(indices) - 1
    of_chosen = features["distances"][:, chosen][..., chosen]
    of_chosen.diagonal(dim1=1, dim2=3).fill_(torch.inf)
    nearest = of_chosen.topk(max(int(model.interval[1] * count), 1), largest=False).values
    anomaly_maps = model.anomaly_maps(nearest.mean(dim=(0, 3)).unflatten(1, features["grid"]))[:, 0]
    scores = RsCINPostProcessor().rescore(anomaly_maps.amax(dim=(1, 2)), features["tokens"][chosen])
    return Scored(scores.double().numpy(), anomaly_maps.numpy())


def measure(pool: Scored, labels: np.ndarray, masks: np.ndarray, *, by_mebin: bool) -> dict[str, float]:
    """Return for each rule the share of images it flags in a good pool, else F1 over the best; and that of pixels."""
    if not labels.any():
        return {rule: float(pool.flagged(rule).mean()) for rule in RULES}
    best = best_f1(labels, pool.scores)
    found = {rule: f1(labels, pool.flagged(rule)) / best for rule in RULES}
    if not masks.any():
        return found
    best_of_pixels = best_f1(masks.ravel(), pool.anomaly_maps.ravel())
    flagged = pool.flagged(next(iter(RULES)))[:, None, None]
    regions = {f"pixels, {share}": share_of_maximum(pool.anomaly_maps, share) & flagged for share in (0.8, 0.75)}
    if by_mebin:
        regions["pixels, MEBin"] = mebin(pool.anomaly_maps) & flagged
    return found | {name: f1(masks.ravel(), mask.ravel()) / best_of_pixels for name, mask in regions.items()}


def share_of_maximum(anomaly_maps: np.ndarray, share: float) -> np.ndarray:
    """Return what lies above a share of each map's own maximum."""
    return anomaly_maps >= share * anomaly_maps.max(axis=(1, 2), keepdims=True)


def mebin(anomaly_maps: np.ndarray, step: int = 4, shortest: int = 4) -> np.ndarray:
    """Return masks by MEBin (arXiv 2410.14379) as anomalib has it, with its defaults; OpenCV counts the components.

    Above the lowest of the maps' maxima, each map's threshold is the low end of the longest run of thresholds at which
    the number of connected components, eroded, stays the same and is not 0.
    """
    highest = anomaly_maps.max(axis=(1, 2))
    lowest, width = highest.min(), max(highest.max() - highest.min(), 1e-9)
    levels = np.where(anomaly_maps < lowest, 0, (anomaly_maps - lowest) / width * 255)
    return np.stack([level > _stable_threshold(level, step, shortest) for level in levels])


def _stable_threshold(level: np.ndarray, step: int, shortest: int) -> float:
    thresholds = range(255, -1, -step)
    kernel = np.ones((6, 6), np.uint8)
    counts = [
        cv2.connectedComponents(cv2.erode((level > threshold).astype(np.uint8), kernel))[0] - 1
        for threshold in thresholds
    ]
    runs = [(count, len(list(run))) for count, run in itertools.groupby(counts)]
    ends = np.cumsum([length for _, length in runs]) - 1
    stable = [(length, -end) for (count, length), end in zip(runs, ends, strict=True) if count and length >= shortest]
    return float(thresholds[-max(stable)[1]]) if stable else 255.0


def shares(model: MuScModel, extracted: Extracted, draws: int = DRAWS) -> dict[str, dict[str, float]]:
    """Return what was measured for each share of defects, means over the draws, and for the set as it is."""
    features = all_distances(model, extracted)
    labels, masks, rows = extracted.labels, extracted.masks.numpy(), {}
    for share in (*(SHARES if draws else ()), None):
        pools = [np.arange(len(labels))] if share is None else [draw(labels, share, seed) for seed in range(draws)]
        results = [
            measure(score(model, features, pool), labels[pool], masks[pool], by_mebin=share is None) for pool in pools
        ]
        row = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        rows["all images" if share is None else f"{share:.0%}"] = row
    return rows


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Print rows of shares."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"| defects | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.0%}' if key in row else '' for key in columns)} |")


def main() -> None:
    """Print a table, and add it to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_product_arguments(parser)
    add_size_argument(parser)
    parser.add_argument("--draws", type=int, default=DRAWS, help="pools a share; 0 for the set as it is alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    backbone = choose_backbone(arguments.backbone, arguments.weights)
    found = shares(*extract(arguments.root, arguments.category, backbone, arguments.image_size), arguments.draws)
    print_table(found)
    add_to_json(arguments.json, {case_name(arguments): {"draws": arguments.draws, **found}})


if __name__ == "__main__":
    main()
