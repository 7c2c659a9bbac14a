# SPDX-License-Identifier: Apache-2.0
"""Judge weights of ``musc-tiny`` on products that no training has drawn.

    python examples/musc_tiny/validation.py package random runs/musc_tiny/musc_tiny.safetensors --sample datasets/sample

Eight products of unseen materials, 24 images of 224 x 224 each, 8 of them with a defect, go through MuSc as any pool
does; then the two products of a sample dataset, which other code draws. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pools import draw_material, draw_pool
from sklearn.metrics import roc_auc_score

from anomalib_musc import MuScModel
from anomalib_musc.functional import rscin

SEED = 1_000_000  # far from that of any training
PRODUCTS, IMAGES, DEFECTIVE, SIDE = 8, 24, 8, 224
MATERIALS = 60


class Labelled(NamedTuple):
    """A pool whose defects are known: images ``(N, 3, H, W)`` in [0, 1] and masks ``(N, H, W)``."""

    name: str
    images: torch.Tensor
    masks: torch.Tensor


def drawn_products(seed: int = SEED) -> Iterator[Labelled]:
    """Products of materials, shapes, looks and defects that no training has drawn."""
    materials = np.stack([draw_material(seed, index, IMAGES) for index in range(MATERIALS)])
    for product in range(PRODUCTS):
        pool = draw_pool(np.random.default_rng([seed, 2, product, 1]), materials, SIDE, IMAGES, DEFECTIVE)
        images = torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255
        yield Labelled(f"drawn {product}", images, torch.from_numpy(pool.masks) > 0)


def sample_products(root: Path) -> Iterator[Labelled]:
    """Products in MVTec AD's layout."""
    for category in sorted(path for path in root.iterdir() if (path / "test").is_dir()):
        images, masks = [], []
        for path in sorted((category / "test").rglob("*.png")):
            image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            of_mask = category / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            mask = Image.open(of_mask) if of_mask.is_file() else Image.new("L", image.size)
            images.append(np.asarray(image))
            masks.append(np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.NEAREST)) > 0)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        yield Labelled(category.name, stacked, torch.from_numpy(np.stack(masks)))


@torch.no_grad()
def judge(model: MuScModel, pool: Labelled) -> tuple[float, float, float]:
    """AUROC of images by the maximum of their maps, of images after RsCIN, and of pixels."""
    images = torch.nn.functional.interpolate(pool.images, model.image_size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    feature_maps, class_tokens = model.extract((images - mean) / std)
    anomaly_maps = model.anomaly_maps(model.score(feature_maps))
    anomaly_maps = torch.nn.functional.interpolate(anomaly_maps, pool.masks.shape[1:], mode="bilinear")[:, 0]
    raw, labels = anomaly_maps.amax(dim=(1, 2)), pool.masks.flatten(1).any(dim=1)
    scores = rscin(raw, class_tokens)
    pairs = ((labels, raw), (labels, scores), (pool.masks.flatten(), anomaly_maps.flatten()))
    raw_auroc, auroc, pixel_auroc = (float(roc_auc_score(truth, values)) for truth, values in pairs)
    return raw_auroc, auroc, pixel_auroc


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", nargs="+", help="files, 'package' for those of the package, or 'random'")
    parser.add_argument("--sample", type=Path, help="root of the sample dataset")
    parser.add_argument("--image-size", type=int, default=SIDE)
    arguments = parser.parse_args()
    if arguments.sample and not arguments.sample.is_dir():
        parser.error(f"--sample: there is no folder {arguments.sample}")
    pools = [*drawn_products(), *(sample_products(arguments.sample) if arguments.sample else [])]
    for weights in arguments.weights:
        pretrained = {"package": True, "random": False}.get(weights, weights)
        model = MuScModel("musc-tiny", pretrained=pretrained, image_size=arguments.image_size)
        rows = np.array([judge(model, pool) for pool in pools])
        print(f"\n{weights}\n| product | image, maximum | image, RsCIN | pixel |\n|---|---|---|---|")
        for name, row in zip([pool.name for pool in pools], rows, strict=True):
            print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |")
        print(f"| mean | {' | '.join(f'{value:.3f}' for value in rows.mean(axis=0))} |")


if __name__ == "__main__":
    main()
