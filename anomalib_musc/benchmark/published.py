# SPDX-License-Identifier: Apache-2.0
"""Figures that papers and releases report, with their sources, from ``published.csv``."""

import csv
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data.datasets.image import btech, mvtecad, visa

from anomalib_musc.backbones.base import quarter_ends
from anomalib_musc.backbones.factory import ALIASES
from anomalib_musc.benchmark.records import METRICS

# What anomalib calls the datasets that have published rows, and their categories.
_DATASETS = {
    "MVTecAD": ("MVTec AD", mvtecad.CATEGORIES),
    "MVTec": ("MVTec AD", mvtecad.CATEGORIES),
    "Visa": ("VisA", visa.CATEGORIES),
    "BTech": ("BTAD", btech.CATEGORIES),
}

# By the backbone's name: the method's in the table, and the image size.
_SETTINGS = {
    "ViT-L-14-336": ("MuSc (CLIP ViT-L/14-336 518)", 518),
    "dinov2_vitl14": ("MuSc (DINOv2 ViT-L/14 518)", 518),
    "dinov2_vitb14": ("MuSc (DINOv2 ViT-B/14 518)", 518),
    "dino_vitbase16": ("MuSc (DINO ViT-B/16 512)", 512),
    "ViT-B-16": ("MuSc (CLIP ViT-B/16 512)", 512),
    "ViT-B-32": ("MuSc (CLIP ViT-B/32 512)", 512),
}
_WINDOWS = {"VisA": [1, 8, 9]}  # of RsCIN; (1, 2, 3) elsewhere
_PAPER = {
    "aggregation_degrees": [1, 3, 5],
    "second_interval": None,
    "search_radius": None,
    "num_subsets": 1,
    "mode": "mutual",
    "precision": "exact",
    "pre_processor": True,
}
# Of a datamodule: the test images are the dataset's own, all of them and as they are.
_WHOLE = {
    "test_split_mode": "from_dir",
    "val_split_mode": "same_as_test",
    "augmentations": None,
    "test_augmentations": None,
}

# Methods whose official releases compute AUPRO as anomalib_musc.metrics.ranking.official_aupro does.
_OFFICIAL_AUPRO = ("MuSc (", "APRIL-GAN", "AnomalyCLIP")
AUPRO_NOTE = (  # under every table with a published AUPRO
    "AUPRO is exact where it was measured, AUPRO (official) computed with 200 thresholds, each curve rescaled by its "
    "own extremes below a false positive rate of 0.3, as in the releases of MuSc, APRIL-GAN and AnomalyCLIP, and "
    "lower on the same maps: by 0.04 to 0.34 points on ten that were measured, by more where scores have a long tail. "
    "How a published AUPRO with a question mark was computed is not known here."
)


class Published(NamedTuple):
    """A row that someone else measured; metrics are fractions, those that were not reported are missing.

    AUPRO is ``aupro_official`` where it is known to be computed so, else ``aupro``.
    """

    method: str
    venue: str
    setting: str
    dataset: str
    source: str
    metrics: dict[str, float]


def published_dataset(datamodule: str, category: str, root: Path) -> str | None:
    """Return the dataset that a category of a datamodule belongs to, ``None`` if its folders are only laid out alike.

    A folder that is not there yet, or is empty, is one that anomalib fills; others must hold two of the categories.

    Example:
        >>> published_dataset("MVTecAD", "bottle", Path("not/there")), published_dataset("MVTecAD", "bolt", Path("."))
        ('MVTec AD', None)
    """
    name, categories = _DATASETS.get(datamodule, (None, ()))
    will_be_downloaded = not root.is_dir() or not any(root.iterdir())
    return name if category in categories and (will_be_downloaded or len(categories_in(datamodule, root)) > 1) else None


def categories_in(datamodule: str, root: Path) -> set[str]:
    """Return which of a published dataset's categories a folder holds."""
    _, categories = _DATASETS.get(datamodule, (None, ()))
    return {category for category in categories if (root / category).is_dir()}


def check_category(datamodule: str, category: str, root: Path) -> None:
    """Raise a ValueError where anomalib would download a dataset because a folder is missing that is not its own."""
    if datamodule not in _DATASETS or (root / category).is_dir():
        return
    is_known = category in _DATASETS[datamodule][1]
    if not is_known or categories_in(datamodule, root):
        here = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        msg = (
            f"root={str(root)!r} holds no category {category!r}, but {', '.join(here[:20]) or 'nothing'}. Correct root "
            "or category; `make demo` draws the sample dataset."
        )
        raise ValueError(msg)


def published_rows(dataset: str) -> list[Published]:
    """Return the published rows of a dataset.

    Args:
        dataset: "MVTec AD", "VisA", "BTAD" or "MVTec 3D-AD"; others have none.

    Example:
        >>> [row.metrics["image_auroc"] for row in published_rows("BTAD") if row.method.startswith("MuSc (CLIP")]
        [0.9616]
    """
    table = files("anomalib_musc.benchmark").joinpath("published.csv").read_text(encoding="utf-8")
    return [
        Published(
            method=line["method"],
            venue=line["venue"],
            setting=line["setting"],
            dataset=line["dataset"],
            source=line["source"],
            metrics=_fractions(line),
        )
        for line in csv.DictReader(table.splitlines())
        if line["dataset"] == dataset
    ]


def _fractions(line: dict[str, str]) -> dict[str, float]:
    """Return the metrics of a line of the table."""
    metrics = {metric: round(float(line[metric]) / 100, 6) for metric in METRICS if line.get(metric)}
    if "aupro" in metrics and line["method"].startswith(_OFFICIAL_AUPRO):
        metrics["aupro_official"] = metrics.pop("aupro")
    return metrics


def published_setting(dataset: str, model: dict[str, Any], data: dict[str, Any]) -> str | None:
    """Return the method of the published row whose setting a model has, ``None`` if it has none's.

    Args:
        dataset: As for :func:`published_rows`.
        model: ``class_path`` and ``init_args`` with all defaults filled in.
        data: Likewise, of the datamodule.
    """
    arguments = model["init_args"]
    backbone = arguments.get("backbone")
    name, size = _SETTINGS.get(backbone, ("", 0)) if isinstance(backbone, str) else ("", 0)
    differs = not name or any(arguments.get(key) != value for key, value in _PAPER.items())
    differs = differs or not _are_defaults(str(backbone), arguments)
    differs |= any(_lower(data["init_args"].get(key)) not in {value, None} for key, value in _WHOLE.items())
    differs |= arguments.get("activation") == "weights"
    if model["class_path"].split(".")[-1] != "MuSc" or differs:
        return None
    if arguments["image_size"] not in (None, size, [size, size]) or list(arguments["interval"]) != [0.0, 0.3]:
        return None
    has_row = any(row.method == name for row in published_rows(dataset))
    return name if has_row and _windows(arguments["post_processor"]) == _WINDOWS.get(dataset, [1, 2, 3]) else None


def _are_defaults(backbone: str, arguments: dict[str, Any]) -> bool:
    """Whether weights and layers are a backbone's default ones, left out or written out."""
    blocks = 24 if "-L-" in backbone or "vitl" in backbone else 12
    is_default = arguments["layers"] in (None, list(quarter_ends(blocks)))
    return is_default and arguments["pretrained"] in (True, ALIASES[backbone].tag)


def _lower(value: Any) -> Any:
    """Return the name of an enumeration's member as its value is written."""
    return value.lower() if isinstance(value, str) else value


def _windows(post_processor: Any) -> list[int] | None:
    """Return the windows of RsCIN, ``None`` if it is off."""
    if post_processor is True:
        return [1, 2, 3]
    if isinstance(post_processor, dict) and post_processor["class_path"].endswith("RsCINPostProcessor"):
        return list(post_processor["init_args"]["windows"])
    return None
