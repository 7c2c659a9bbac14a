# SPDX-License-Identifier: Apache-2.0
"""Decisions without labels: ``python benchmarks/thresholds.py ROOT CATEGORY [--backbone NAME]``.

Pools with 0 to 50 % defects are drawn from the test images of a product in MVTec AD's layout. F1 at the threshold that
is found without labels is divided by the best F1 of any threshold, for images and for pixels. Then pools of 2 to 8
images, one of them anomalous: how often it has the highest score, and how often it is labelled; and good images only:
how many of them are labelled.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import MVTecAD
from same_features import choose_backbone

from anomalib_musc import MuSc, MuScModel
from anomalib_musc.decision.thresholds import count_anomalous, image_threshold, pixel_threshold
from anomalib_musc.functional import lnamd, rscin

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 40
SMALL, SMALL_DRAWS = (2, 3, 4, 5, 6, 8), 60


def extract(root: str, category: str, backbone: Any, pretrained: bool) -> tuple[MuScModel, dict[str, Any]]:
    """Return the model, and distances, class tokens, labels and masks ``(N, H, W)`` of the test images."""
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
    features = all_distances(model.model, maps, tokens)
    return model.model, {**features, "labels": np.array(labels), "masks": torch.stack(masks)}


def all_distances(model: MuScModel, maps: list[Any], tokens: list[torch.Tensor]) -> dict[str, Any]:
    """Return what pools of these images are scored by: distances, class tokens and the shape of the maps."""
    layers = [torch.cat(layer) for layer in zip(*maps, strict=True)]
    degrees = model.aggregation_degrees
    return {
        "grid": layers[0].shape[-2:],
        "distances": torch.stack([distances(lnamd(layer, degree)) for layer in layers for degree in degrees]),
        "tokens": torch.cat(tokens),
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


def of_each_count(truth: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return F1 of the highest one, two, ... of all values over the best F1; zeros where nothing is true."""
    of_highest = f1_of_highest(truth, values)
    return of_highest / max(of_highest.max(), 1e-9)


class Scored(NamedTuple):
    """A pool: the scores of its images ``(N,)``, its anomaly maps ``(N, H, W)``, its patch scores ``(N, L)``."""

    scores: np.ndarray
    anomaly_maps: np.ndarray
    patch_scores: np.ndarray

    @property
    def flagged(self) -> np.ndarray:
        """Which images are labelled anomalous."""
        return self.scores > image_threshold(self.scores, count_anomalous(self.patch_scores))


def score(model: MuScModel, features: dict[str, Any], indices: np.ndarray) -> Scored:
    """Let the chosen images judge each other by the distances of all, as the model would: the nearest 30 %."""
    chosen, count = torch.from_numpy(indices), len(indices) - 1
    of_chosen = features["distances"][:, chosen][..., chosen]
    of_chosen.diagonal(dim1=1, dim2=3).fill_(torch.inf)
    nearest = of_chosen.topk(max(int(model.interval[1] * count), 1), largest=False).values
    patch_scores = nearest.mean(dim=(0, 3)).unflatten(1, features["grid"])
    anomaly_maps = model.anomaly_maps(patch_scores)[:, 0]
    scores = rscin(anomaly_maps.amax(dim=(1, 2)), features["tokens"][chosen])
    return Scored(scores.double().numpy(), anomaly_maps.numpy(), patch_scores.flatten(1).double().numpy())


def measure(pool: Scored, labels: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Return the share of good images that are flagged, and F1 over the best F1 of images and of pixels.

    For images that is also what a threshold would reach that knows how many are anomalous.
    """
    flagged, values = pool.flagged, pool.anomaly_maps.ravel()
    found = values > pixel_threshold(pool.patch_scores, flagged)
    has_region = found.reshape(len(labels), -1).any(axis=1)
    result = {"false alarms": float(flagged[~labels].mean()), "good with a region": float(has_region[~labels].mean())}
    if labels.any():
        best = best_f1(labels, pool.scores)
        result["image"] = f1(labels, flagged) / best
        result["image, count known"] = f1(labels, pool.scores >= np.sort(pool.scores)[-labels.sum()]) / best
        result["pixel"] = f1(masks.ravel(), found) / best_f1(masks.ravel(), values)
        result["with a region"] = float(has_region[flagged].mean()) if flagged.any() else 0.0
    return result


def shares(model: MuScModel, features: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what was measured for each share of defects.

    "Best count" is what would be reached by the number of images that is best for all pools of this share, found with
    their labels.
    """
    labels, masks, rows = features["labels"], features["masks"].numpy(), {}
    for share in (*SHARES, None):
        pools = [np.arange(len(labels))] if share is None else [draw(labels, share, seed) for seed in range(DRAWS)]
        results, of_counts = [], []
        for pool in pools:
            scored = score(model, features, pool)
            results.append(measure(scored, labels[pool], masks[pool]))
            of_counts.append(of_each_count(labels[pool], scored.scores))
        row = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
        if "image" in row:
            row["image, best count"] = float(np.mean(of_counts, axis=0).max())
        row["most false alarms"] = max(result["false alarms"] for result in results)
        rows["all images" if share is None else f"{share:.0%}"] = row
    return rows


def small_pools(model: MuScModel, features: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return how often one anomalous image of few is highest and is labelled, and how many of only good ones are."""
    normal, anomalous = np.flatnonzero(~features["labels"]), np.flatnonzero(features["labels"])
    rows = {}
    for count in (count for count in SMALL if count <= len(normal)):
        highest, labelled, false_alarms = [], [], []
        for seed in range(SMALL_DRAWS):
            generator = np.random.default_rng(seed)
            chosen = [*generator.choice(normal, count - 1, replace=False), generator.choice(anomalous)]
            pool = score(model, features, np.array(chosen))
            highest.append(pool.scores[-1] > pool.scores[:-1].max())
            labelled.append(pool.flagged[-1])
            good = score(model, features, generator.choice(normal, count, replace=False))
            false_alarms.append(good.flagged.mean())
        found = {"highest": highest, "labelled": labelled, "of good images": false_alarms}
        rows[str(count)] = {name: float(np.mean(values)) for name, values in found.items()}
    return rows


def print_table(first: str, rows: dict[str, dict[str, float]]) -> None:
    """Print rows of shares."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"| {first} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.0%}' if key in row else '' for key in columns)} |")


def product_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of a product, a backbone and a JSON file."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("root")
    parser.add_argument("category")
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a backbone and a JSON file."""
    parser.add_argument("--backbone", default="musc-tiny", help="a name, or module:class of a network of one's own")
    parser.add_argument("--weights", help="file that this class takes")
    parser.add_argument("--json", type=Path)


def add_to_json(path: Path | None, name: str, found: dict[str, Any]) -> None:
    """Add what was found to a file of several products, if there is to be one."""
    if path:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: found}, indent=2) + "\n")


def main() -> None:
    """Print tables, and add them to a JSON file."""
    parser = product_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--random", action="store_true", help="random weights for a named backbone")
    arguments = parser.parse_args()
    backbone = choose_backbone(arguments.backbone, arguments.weights)
    model, features = extract(arguments.root, arguments.category, backbone, not arguments.random)
    found = {"shares": shares(model, features), "small": small_pools(model, features)}
    print_table("defects", found["shares"])
    print_table("images", found["small"])
    network = ("random " if arguments.random else "") + arguments.backbone.split(":")[-1]
    name = f"{arguments.category}, {network}"
    add_to_json(arguments.json, name, {"draws": DRAWS, "small draws": SMALL_DRAWS, **found})


if __name__ == "__main__":
    main()
