# SPDX-License-Identifier: Apache-2.0
"""Evaluate weights of ``musc-tiny`` on products that no training has drawn.

    python examples/musc_tiny/validation.py package random --datasets datasets/sample

Sixteen products of unseen materials, 24 images each, 8 of them with a defect, go through MuSc as any pool does; then
the products of datasets, such as those of the sample dataset, which other code draws. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from pools import UNSEEN, draw_material, draw_pool
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from anomalib_musc import MuScModel
from anomalib_musc.backbones.tiny import IMAGE_SIZE, MuscTiny
from anomalib_musc.functional import rscin

PRODUCTS, IMAGES, DEFECTIVE = 16, 24, 8
MATERIALS = 60
RANDOM_NETWORKS = 5


class Labelled(NamedTuple):
    """A pool whose defects are known: images ``(N, 3, H, W)`` in [0, 1] and masks ``(N, H, W)``."""

    name: str
    images: torch.Tensor
    masks: torch.Tensor


def drawn_products(size: int) -> Iterator[Labelled]:
    """Products of materials, shapes, looks and defects that no training has drawn."""
    materials = np.stack(
        [draw_material(UNSEEN, index, IMAGES) for index in tqdm(range(MATERIALS), "Drawing materials")]
    )
    for product in range(PRODUCTS):
        pool = draw_pool(np.random.default_rng([UNSEEN, 2, product, 1]), materials, size, IMAGES, DEFECTIVE)
        images = torch.from_numpy(pool.images).permute(0, 3, 1, 2).float() / 255
        yield Labelled(f"drawn {product}", images, torch.from_numpy(pool.masks) > 0)


def dataset_products(root: Path, size: int) -> Iterator[Labelled]:
    """Products in MVTec AD's layout.

    Raises:
        ValueError: If there is none.
    """
    categories = sorted(path for path in root.iterdir() if (path / "test").is_dir())
    if not categories:
        msg = f"there is no product with a folder test in {root}"
        raise ValueError(msg)
    for category in categories:
        images, masks = [], []
        for path in sorted(path for path in (category / "test").rglob("*") if path.suffix in {".png", ".jpg"}):
            image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            of_mask = category / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            mask = Image.open(of_mask) if of_mask.is_file() else Image.new("L", image.size)
            images.append(np.asarray(image))
            masks.append(np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        yield Labelled(category.name, stacked, torch.from_numpy(np.stack(masks)))


def models(weights: str, size: int = IMAGE_SIZE[0]) -> list[MuScModel]:
    """The model with weights of a file or of the package, or several with random ones."""
    if weights != "random":
        return [MuScModel("musc-tiny", pretrained=weights == "package" or weights, image_size=size, precision="fast")]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(RANDOM_NETWORKS):
            torch.manual_seed(seed)
            save_file(MuscTiny().state_dict(), path := Path(folder) / "random.safetensors")
            found.append(MuScModel("musc-tiny", pretrained=path, image_size=size, precision="fast"))
    return found


@torch.no_grad()
def evaluate(model: MuScModel, pool: Labelled) -> tuple[float, float, float]:
    """AUROC of images by the maximum of their maps, of images after RsCIN, and of pixels."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    feature_maps, class_tokens = model.extract((pool.images - mean) / std)
    anomaly_maps = model.anomaly_maps(model.score(feature_maps))
    anomaly_maps = torch.nn.functional.interpolate(anomaly_maps, pool.masks.shape[1:], mode="bilinear")[:, 0]
    raw, labels = anomaly_maps.amax(dim=(1, 2)), pool.masks.flatten(1).any(dim=1)
    scores = rscin(raw, class_tokens)
    pairs = ((labels, raw), (labels, scores), (pool.masks.flatten(), anomaly_maps.flatten()))
    raw_auroc, auroc, pixel_auroc = (float(roc_auc_score(truth, values)) for truth, values in pairs)
    return raw_auroc, auroc, pixel_auroc


def main() -> None:
    """Print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", nargs="+", help="files, 'package' for the package's, 'random' for five networks")
    parser.add_argument("--datasets", type=Path, nargs="*", default=[], help="roots of datasets in MVTec AD's layout")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE[0])
    arguments = parser.parse_args()
    size = arguments.image_size
    try:
        candidates = {weights: models(weights, size) for weights in arguments.weights}
        products = [product for root in arguments.datasets for product in dataset_products(root, size)]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    pools = [*drawn_products(size), *products]
    for weights, networks in candidates.items():
        rows = np.array([[evaluate(model, pool) for model in networks] for pool in tqdm(pools, weights)])
        print(f"\n{weights}\n| product | image, maximum | image, RsCIN | pixel |\n|---|---|---|---|")
        names = [*(pool.name for pool in pools), "mean of the drawn", "mean of all"]
        means = [rows[:PRODUCTS].mean(axis=0), rows.mean(axis=0)]
        for name, of_networks in zip(names, [*rows, *means], strict=True):
            print(f"| {name} | {' | '.join(spread(values) for values in of_networks.T)} |")


def spread(values: np.ndarray) -> str:
    """Mean, and the least and the greatest where there are several."""
    several = f" ({values.min():.3f} to {values.max():.3f})" if len(values) > 1 else ""
    return f"{values.mean():.3f}{several}"


if __name__ == "__main__":
    main()
