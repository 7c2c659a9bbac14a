# SPDX-License-Identifier: Apache-2.0
"""Defects that many images share: the paper's interval beside a second one, and beside rules that are as short.

``python benchmarks/repeated_defects.py pasted PRODUCT [PRODUCT ...]``: of the good images of each product, folders in
MVTec AD's layout, a pool of 36 is drawn, and one and the same defect pasted into a share of them, at one place or at
varied ones. ``... own PRODUCT [...]``: the product's own test images, in which nothing repeats on purpose; and the same
with another tint in 30 % of them, good and bad alike. ``... cost``: seconds of the second interval.

Image AUROC of the raw scores; pixel AP and AUPRO at half the network's input size.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from pasted_defects import DEFECTS, paste
from products import add_backbone_arguments, add_size_argument
from same_features import choose_backbone

from anomalib_musc import MuScModel
from anomalib_musc.compat.pre_processor import resize_and_normalise
from anomalib_musc.distances import nearest_distances
from anomalib_musc.functional import larger_score, layer_scores
from anomalib_musc.functional.lnamd import layer_norm
from anomalib_musc.functional.mutual_scoring import interval_means
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.metrics.ranking import aupro, auroc, average_precision, rank, region_sizes

POOL, SHARES, MOST = 36, (0.1, 0.2, 0.3, 0.4, 0.5), 130
FIRST, SECOND = (0.0, 0.3), (0.4, 0.7)
INTERVALS = (FIRST, SECOND, (0.3, 0.6), (0.5, 0.8))
WITH_PIXELS = ("paper", "layer", "known")
Images = list[tuple[np.ndarray, np.ndarray]]  # RGB (H, W, 3) and mask (H, W)


class Compared(NamedTuple):
    """Images compared with each other.

    Attributes:
        distances: One tensor a layer, ``(D, N, N, L)``.
        masks: Shape ``(N, h, w)``, bool, at half the input's size.
        grid: Height and width of the map of patches.
    """

    distances: list[torch.Tensor]
    masks: torch.Tensor
    grid: tuple[int, int]


class Features:
    """Features and masks of images, which are extracted once.

    Args:
        model: The model.
    """

    def __init__(self, model: MuScModel) -> None:
        self.model = model
        self._transform = resize_and_normalise(model.image_size, model.mean, model.std, model.interpolation)

    def of(self, images: Images) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return one map ``(N, C, h, w)`` a layer, and masks ``(N, H, W)``."""
        maps, masks = [], []
        height, width = (side // 2 for side in self.model.image_size)
        for image, mask in images:
            tensor = self._transform(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
            maps.append(self.model.extract(tensor)[0])
            shrunk = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
            masks.append(torch.from_numpy(shrunk >= 0.25))
        return [torch.cat(layer) for layer in zip(*maps, strict=True)], torch.stack(masks)

    def compare(self, maps: Sequence[torch.Tensor], masks: torch.Tensor, degrees: Sequence[int]) -> Compared:
        """Return the distances of all patches to the nearest ones of the other images."""
        distances = []
        for layer in maps:
            found = torch.empty(len(degrees), len(layer), len(layer), layer[0, 0].numel())
            for start, degree in enumerate(degrees):
                for images, block in nearest_distances(layer, [degree], prepare=layer_norm, precision="fast"):
                    found[start, images] = block[0]
            distances.append(found)
        return Compared(distances, masks, (maps[0].shape[2], maps[0].shape[3]))


def by_rules(distances: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the patch scores ``(N, L)`` of every rule, from one tensor of distances ``(D, N, N, L)`` a layer."""
    means = [interval_means(layer, *INTERVALS) for layer in distances]
    first, second, early, late = (torch.stack([layer[index] for layer in means]) for index in range(len(INTERVALS)))
    by_layer = [average.mean(dim=1) for average in (first, second, early, late)]  # over degrees: (layers, N, L)

    def larger(scores: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        pairs = zip(scores, others, strict=True)
        return torch.stack([larger_score(score, other) for score, other in pairs]).mean(dim=0)

    scores, seconds, earlier, later = by_layer
    return {
        "paper": scores.mean(dim=0),
        "layer": larger(scores, seconds),
        "layer and degree": larger(first.flatten(0, 1), second.flatten(0, 1)),
        "average": larger_score(scores.mean(dim=0), seconds.mean(dim=0)),
        "line": torch.stack([_by_line(*pair) for pair in zip(scores, seconds, strict=True)]).mean(dim=0),
        "(0.3, 0.6)": larger(scores, earlier),
        "(0.5, 0.8)": larger(scores, later),
        "mean of both": torch.stack([_mean_of_both(*pair) for pair in zip(scores, seconds, strict=True)]).mean(dim=0),
        "(0.4, 0.7) alone": seconds.mean(dim=0),
    }


def _by_line(scores: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the larger of two scores ``(N, L)``, the second one scaled by a line through log s over log t."""
    x, y = second.clamp_min(1e-6).log(), scores.clamp_min(1e-6).log()
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
    return torch.maximum(scores, (y.mean() + slope * (x - x.mean())).exp())


def _mean_of_both(scores: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the mean of two scores ``(N, L)``, the second one scaled as by the rule."""
    return (scores + second / (second / scores).log().nanmedian().exp()) / 2


def known(distances: Sequence[torch.Tensor], is_defective: torch.Tensor) -> torch.Tensor:
    """Return the patch scores ``(N, L)`` where somebody leaves out the likes of the defects."""
    total = []
    for layer in distances:
        scores = interval_means(layer, FIRST)[0]
        apart = layer[:, is_defective][:, :, ~is_defective]
        itself = torch.full_like(apart[:, :, :1], torch.inf)
        scores[:, is_defective] = interval_means(torch.cat([apart, itself], dim=2), FIRST)[0]
        total.append(scores.mean(dim=0))
    return torch.stack(total).mean(dim=0)


def metrics_of(scores: torch.Tensor, labels: torch.Tensor, compared: Compared, with_pixels: bool) -> list[float]:
    """Return image AUROC, pixel AP and AUPRO of patch scores ``(N, L)``, in percent; pixels where there are masks."""
    masks = compared.masks
    maps = torch.nn.functional.interpolate(
        scores.view(len(scores), 1, *compared.grid), masks.shape[1:], mode="bilinear", align_corners=True
    )[:, 0]
    raw = maps.amax(dim=(1, 2))
    found = [auroc(rank(raw[~labels], raw[labels]))]
    if with_pixels and masks.any():
        ranks = rank(maps[~masks], maps[masks], region_sizes(masks))
        found += [average_precision(ranks), aupro(ranks)]
    return [round(100 * float(value), 1) for value in found]


def good_images(product: Path) -> Images:
    """Return a product's good images, without masks."""
    files = sorted(path for part in ("train/good", "test/good") for path in (product / part).glob("*"))
    images = [read(files[index]) for index in np.random.default_rng(0).permutation(len(files))[:POOL]]
    return [(image, np.zeros(image.shape[:2], np.uint8)) for image in images]


def read(path: Path) -> np.ndarray:
    """Return an image, RGB ``(H, W, 3)``."""
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def of_pasted(model: MuScModel, product: Path, degrees: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield one row for each kind, place and share."""
    features, images = Features(model), good_images(product)
    maps, masks = features.of(images)
    most = round(max(SHARES) * len(images))
    for kind in DEFECTS:
        for place in ("same", "varied"):
            generator = np.random.default_rng(0)
            shifts = generator.uniform(-0.25, 0.25, (most, 2)) * (place == "varied")
            pasted = [paste(image, kind, shift) for (image, _), shift in zip(images[:most], shifts, strict=True)]
            new_maps, new_masks = features.of(pasted)
            both = [torch.cat([old, new]) for old, new in zip(maps, new_maps, strict=True)]
            compared = features.compare(both, torch.cat([masks, new_masks]), degrees)
            for share in SHARES:
                number = round(share * len(images))
                chosen = [*range(len(images), len(images) + number), *range(number, len(images))]
                here = Compared(
                    [layer[:, chosen][:, :, chosen] for layer in compared.distances],
                    compared.masks[chosen],
                    compared.grid,
                )
                labels = torch.arange(len(images)) < number
                scores = {**by_rules(here.distances), "known": known(here.distances, labels)}
                found = {
                    rule: metrics_of(values, labels, here, rule in WITH_PIXELS or share == 0.3)
                    for rule, values in scores.items()
                }
                yield {"kind": kind, "place": place, "share": share, "product": product.name, **found}


def of_own(model: MuScModel, product: Path, degrees: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row of the product's own test images, and one with another tint in 30 % of them."""
    features = Features(model)
    files = sorted(path for path in (product / "test").glob("*/*") if path.is_file())
    files = files[:: 1 + len(files) // MOST * 2]
    labels = torch.tensor([path.parent.name != "good" for path in files])
    is_tinted = np.random.default_rng(0).permutation(len(files)) < 0.3 * len(files)
    for name, chosen in (("as it is", np.zeros(len(files), bool)), ("30 % tinted", is_tinted)):
        images = [
            (_tinted(read(path)) if tint else read(path), mask_of(path))
            for path, tint in zip(files, chosen, strict=True)
        ]
        compared = features.compare(*features.of(images), degrees)
        found = {
            rule: metrics_of(values, labels, compared, with_pixels=True)
            for rule, values in by_rules(compared.distances).items()
        }
        yield {"pool": name, "images": len(files), "product": product.name, **found}


def _tinted(image: np.ndarray) -> np.ndarray:
    return (image * np.array([0.95, 0.85, 0.75])).round().astype(np.uint8)


def mask_of(path: Path) -> np.ndarray:
    """Return the mask of a test image, 0 or 1, empty where it has none."""
    file = path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
    found = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) if file.is_file() else None
    return np.zeros(read(path).shape[:2], np.uint8) if found is None else (found > 0).astype(np.uint8)


def averaged(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the means over products of rows with equal values of the keys."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, values, strict=True)),
            **{
                rule: [round(float(mean), 1) for mean in np.mean([row[rule] for row in group], axis=0)]
                for rule, value in group[0].items()
                if isinstance(value, list)
            },
        }
        for values, group in groups.items()
    ]


def cost() -> list[dict[str, Any]]:
    """Return the seconds of one layer at three degrees without and with a second interval, medians of alternating runs.

    Of a pool in the whole and the same-place search, and of one image and a bank of so many.
    """
    rows = []
    for num_images, side, channels in ((36, 20, 160), (36, 28, 96), (36, 32, 384), (100, 20, 160)):
        generator = torch.Generator().manual_seed(0)
        maps = torch.randn(num_images, channels, side, side, generator=generator)
        image = torch.randn(1, channels, side, side, generator=generator)
        banks = {second: ReferenceBank((1, 3, 5), FIRST, second_interval=second) for second in (None, SECOND)}
        for bank in banks.values():
            bank.fill([maps], torch.zeros(num_images, 1), torch.zeros(num_images), ratios=torch.ones(1))
        ways: dict[str, Callable[[tuple[float, float] | None], object]] = {
            "pool": lambda second, maps=maps: layer_scores(maps, second_interval=second),
            "pool, search_radius=1": lambda second, maps=maps: layer_scores(
                maps, second_interval=second, search_radius=1
            ),
            "bank": lambda second, banks=banks, image=image: banks[second].patch_scores([image]),
        }
        for way, score in ways.items():
            times: dict[tuple[float, float] | None, list[float]] = {None: [], SECOND: []}
            for second in (None, SECOND) * (4 if way == "pool" else 16):  # a search of whole images takes seconds
                start = time.perf_counter()
                score(second)
                times[second].append(time.perf_counter() - start)
            one, both = (statistics.median(found[1:]) for found in times.values())
            rows.append(
                {"way": way, "size": [num_images, side**2, channels], "one": round(one, 4), "both": round(both, 4)}
            )
            print(rows[-1], f"{both / one - 1:+.1%}", flush=True)
    return rows


def main() -> None:
    """Print rows, and add them to a file; the commands are in the file's own text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["pasted", "own", "cost"])
    parser.add_argument("products", nargs="*", type=Path)
    add_backbone_arguments(parser)
    add_size_argument(parser)
    parser.add_argument("--degrees", type=int, nargs="+", default=[3])
    parser.add_argument("--json", type=Path, help="file to which the numbers are added")
    arguments = parser.parse_args()
    if arguments.what == "cost":
        found: Any = cost()
        name = "seconds"
    else:
        model = MuScModel(choose_backbone(arguments.backbone, arguments.weights), image_size=arguments.image_size)
        rows = []
        for product in arguments.products:
            for row in (of_pasted if arguments.what == "pasted" else of_own)(model, product, arguments.degrees):
                rows.append(row)
                print(json.dumps(row), flush=True)
        keys = ["kind", "place", "share"] if arguments.what == "pasted" else ["pool", "product"]
        found = averaged(rows, keys)
        degrees = " ".join(map(str, arguments.degrees))
        name = f"{arguments.what}, {arguments.backbone.split(':')[-1]}, degrees {degrees}"
    if arguments.json:
        kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        kept[name] = found
        lines = ",\n".join(
            f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"
            for name, rows in kept.items()
        )
        arguments.json.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
