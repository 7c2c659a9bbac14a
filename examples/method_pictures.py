# SPDX-License-Identifier: Apache-2.0
"""Draw how the method works, on a product of the sample dataset, for docs/how-it-works.md.

``python examples/sample_dataset datasets/sample``, then
``python examples/method_pictures.py datasets/sample/fabric docs/pictures``
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import cv2
import numpy as np
import torch
from anomalib.data.utils import read_image
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from anomalib_musc import MuScModel, RsCINPostProcessor
from anomalib_musc.compat.pre_processor import resize_and_normalise
from anomalib_musc.distances import nearest_distances
from anomalib_musc.functional import layer_scores, lnamd

DEGREES = (1, 3, 5)
INTERVAL = (0.0, 0.3)
RED, BLUE, GREY = "#d62728", "#1f77b4", "#888888"


class Pool(NamedTuple):
    """The images of a product, as the network sees them.

    Attributes:
        pictures: Shape ``(N, H, W, 3)``, in [0, 1].
        is_defective: Which have a defect.
        maps: One map ``(N, C, h, w)`` a layer.
        tokens: Image features, ``(N, D)``.
        defect: An image, and the row and column of a patch on its defect.
    """

    pictures: np.ndarray
    is_defective: list[bool]
    maps: list[torch.Tensor]
    tokens: torch.Tensor
    defect: tuple[int, int, int]


def read_pool(model: MuScModel, product: Path, kind: str) -> Pool:
    """Read the good images of a product, and its first ones with a kind of defect."""
    files = [*sorted((product / "test/good").glob("*.png"))[:12], *sorted((product / "test" / kind).glob("*.png"))[:3]]
    transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)
    images = torch.cat([transform(read_image(file, as_tensor=True)[None]) for file in files])
    maps, tokens = model.extract(images)
    is_defective = [file.parent.name != "good" for file in files]
    size = model.image_size[::-1]
    pictures = [cv2.resize(np.asarray(read_image(file)), size, interpolation=cv2.INTER_AREA) for file in files]
    image = is_defective.index(True)
    grid = maps[0].shape[-2:]
    mask = cv2.imread(str(product / "ground_truth" / kind / f"{files[image].stem}_mask.png"), cv2.IMREAD_GRAYSCALE)
    small = cv2.resize(np.asarray(mask), (grid[1], grid[0]), interpolation=cv2.INTER_AREA)
    row, column = np.unravel_index(np.argmax(small), grid)
    return Pool(np.stack(pictures), is_defective, maps, tokens, (image, int(row), int(column)))


def square(axes: Any, pool: Pool, row: int, column: int, colour: str, degree: int = 1) -> None:
    """Mark the window of a patch."""
    patch = pool.pictures.shape[1] / pool.maps[0].shape[2]
    corner = (column - degree // 2) * patch, (row - degree // 2) * patch
    axes.add_patch(Rectangle(corner, degree * patch, degree * patch, fill=False, edgecolor=colour, linewidth=1.6))


def neighbourhoods(pool: Pool) -> Any:
    """Draw the windows of a patch, and the map of each degree."""
    image, row, column = pool.defect
    figure, axes = plt.subplots(1, 5, figsize=(12, 2.7))
    axes[0].imshow(pool.pictures[image])
    axes[0].set_title("windows of a patch", fontsize=9)
    maps = []
    for degree in DEGREES:
        square(axes[0], pool, row, column, RED, degree)
        scores = [layer_scores(layer, (degree,), INTERVAL)[image].view(layer.shape[-2:]) for layer in pool.maps]
        maps.append(torch.stack(scores).mean(dim=0))
    maps.append(torch.stack(maps).mean(dim=0))
    titles = [*(f"scores, r = {degree}" for degree in DEGREES), "their mean"]
    for axis, found, title in zip(axes[1:], maps, titles, strict=True):
        axis.imshow(found, cmap="inferno")
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.axis("off")
    return figure


def nearest_patch(vectors: torch.Tensor, image: int, patch: int, other: int) -> int:
    """Return the patch of another image that is nearest."""
    return int(torch.cdist(vectors[image, patch][None], vectors[other]).argmin())


def mutual_scoring(pool: Pool) -> Any:
    """Draw the nearest patches of a defect and of a normal patch, and their ascending distances."""
    image, row, column = pool.defect
    width = pool.maps[0].shape[3]
    layer = pool.maps[-1]
    vectors = lnamd(layer, 3)
    patches = {RED: row * width + column, BLUE: (row + width // 2) % width * width + (column + width // 2) % width}
    others = [other for other in range(len(vectors)) if other != image][:5]
    figure = plt.figure(figsize=(12, 3.2))
    grid = figure.add_gridspec(2, 10)
    whole = figure.add_subplot(grid[:, :3])
    whole.imshow(pool.pictures[image])
    whole.set_title("two patches of an image", fontsize=9)
    whole.axis("off")
    curves = figure.add_subplot(grid[:, 8:])
    (_, distances), *_ = nearest_distances(vectors)
    for line, (colour, patch) in enumerate(patches.items()):
        square(whole, pool, patch // width, patch % width, colour, 3)
        for place, other in enumerate(others):
            axis = figure.add_subplot(grid[line, 3 + place])
            found = nearest_patch(vectors, image, patch, other)
            axis.imshow(crop(pool, other, found // width, found % width))
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(f"{float(distances[0, image, other, patch]):.2f}", color=colour, fontsize=9)
            axis.set_title("" if line or place != 2 else "the nearest in other images, and how far", fontsize=9)
        ascending = distances[0, image, :, patch].sort().values[:-1]
        curves.plot(np.arange(1, len(ascending) + 1), ascending, "o-", color=colour, markersize=3)
    curves.axvspan(0.5, max(1, int(INTERVAL[1] * (len(vectors) - 1))) + 0.5, color="#eeeeee")
    curves.set_title("all distances, ascending;\nthe grey 30 % are averaged", fontsize=9)
    curves.set_ylim(bottom=0)
    curves.tick_params(labelsize=8)
    return figure


def crop(pool: Pool, image: int, row: int, column: int, patches: int = 5) -> np.ndarray:
    """Cut the surroundings of a patch out of an image."""
    patch = pool.pictures.shape[1] // pool.maps[0].shape[2]
    border = patches // 2 * patch
    padded = np.pad(pool.pictures[image], ((border, border), (border, border), (0, 0)), constant_values=1)
    return padded[row * patch : (row + patches) * patch, column * patch : (column + patches) * patch]


def rescoring(model: MuScModel, pool: Pool) -> Any:
    """Draw the scores of all images before and after the third step."""
    raw = model.anomaly_maps(model.score(pool.maps)).amax(dim=(1, 2, 3))
    rescored = RsCINPostProcessor().rescore(raw, pool.tokens)
    figure, axes = plt.subplots(1, 2, figsize=(12, 2.2), sharey=True)
    for axis, scores, title in zip(axes, (raw, rescored), ("raw scores", "re-scored with neighbours"), strict=True):
        axis.bar(range(len(scores)), scores, color=[RED if bad else GREY for bad in pool.is_defective])
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.tick_params(labelsize=8)
    return figure


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("product", type=Path, help="a product of the sample dataset")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--defect", default="cut")
    parser.add_argument("--backbone", default="musc-tiny")
    arguments = parser.parse_args()
    model = MuScModel(arguments.backbone).eval()
    with torch.no_grad():
        pool = read_pool(model, arguments.product, arguments.defect)
        figures = {
            "method_neighbourhoods": neighbourhoods(pool),
            "method_mutual_scoring": mutual_scoring(pool),
            "method_rescoring": rescoring(model, pool),
        }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(arguments.folder / f"{name}.jpg", dpi=110, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
