# SPDX-License-Identifier: Apache-2.0
"""Predictions as a table, and heatmaps at the size of the images, by a callback for any model of anomalib."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import visualize_anomaly_map
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image

from anomalib_musc.output.files import atomic_write, check_writable, mirrored_path
from anomalib_musc.pool.loaders import common_folder, image_paths

HeatmapFormat = Literal["png", "npy"]
COLUMNS = ("path", "score", "label", "regions", "note")


@dataclass(frozen=True)
class Region:
    """A connected region of a mask, in pixels of the original image.

    Attributes:
        x: Left edge of its box.
        y: Upper edge of its box.
        width: Width of its box.
        height: Height of its box.
        area: Number of its pixels.
    """

    x: int
    y: int
    width: int
    height: int
    area: int


def find_regions(mask: np.ndarray, size: tuple[int, int]) -> list[Region]:
    """Return the 8-connected regions of a mask, the largest first.

    Args:
        mask: Shape ``(h, w)``, anything but 0 is anomalous.
        size: (width, height) of the original image, to whose pixels boxes and areas are scaled.

    Example:
        >>> mask = np.zeros((4, 4))
        >>> mask[1, 1:3] = 1
        >>> find_regions(mask, (40, 20))
        [Region(x=10, y=5, width=20, height=5, area=100)]
    """
    width, height = size
    columns, rows = mask.shape[1], mask.shape[0]
    _, _, statistics, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=8)
    regions = []
    for x, y, w, h, area in statistics[1:].tolist():  # the first is the background
        left, upper = x * width // columns, y * height // rows
        right, lower = -(-(x + w) * width // columns), -(-(y + h) * height // rows)  # rounded up
        pixels = max(1, round(area * width * height / (columns * rows)))
        regions.append(Region(left, upper, right - left, lower - upper, pixels))
    return sorted(regions, key=lambda region: -region.area)


class PredictionWriter(Callback):
    """Write ``predictions.csv``: path, score, label and anomalous regions of every image that is predicted.

    ``score`` is the normalised one, ``label`` "anomalous", "normal" or "skipped" with the reason in ``note``,
    ``regions`` a JSON list of ``{"x", "y", "width", "height", "area"}`` in pixels of the original image, the largest
    first. :class:`~anomalib_musc.MuSc` has one for ``predict``; any other model takes it as one of
    ``Engine(callbacks=[...])``. Where several processes predict, each writes a table of its own.

    Args:
        output_dir: Where to write; by default the trainer's ``default_root_dir``, where ``images/`` is.
        heatmaps: What to write besides, at the size of each image, to ``heatmaps/``: "png", the coloured anomaly map,
            "npy", its values as a float32 array ``(H, W)``, in [0, 1] where the model normalises them, or both.

    Raises:
        ValueError: If ``heatmaps`` holds anything else.

    Example:
        >>> writer = PredictionWriter(heatmaps=["png", "npy"])
        >>> Engine(callbacks=[writer]).predict(Patchcore(), ckpt_path="...", data_path="...")  # doctest: +SKIP
    """

    def __init__(self, output_dir: str | Path | None = None, heatmaps: Sequence[HeatmapFormat] = ()) -> None:
        unknown = sorted(set(heatmaps) - set(get_args(HeatmapFormat)))
        if isinstance(heatmaps, str) or unknown:
            msg = f"heatmaps must be a list of {get_args(HeatmapFormat)}, got {heatmaps!r}."
            raise ValueError(msg)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.heatmaps = tuple(heatmaps)
        self._rows: list[dict[str, str]] = []
        self._root: Path | None = None
        self._pending: ImageBatch | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Return where this writes."""
        return self.output_dir or Path(trainer.default_root_dir)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether results can be written."""
        del pl_module
        check_writable(self.folder(trainer) / "heatmaps" if self.heatmaps else self.folder(trainer))
        self._rows, self._pending = [], None
        self._root = common_folder(image_paths(trainer.predict_dataloaders))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep a batch until all callbacks have seen it: a model's post-processor comes after those of a user."""
        del trainer, pl_module, batch, batch_idx, args
        self._pending = outputs

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the batch before this one."""
        del args
        self._write_pending(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last batch."""
        self._write_pending(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table, with the images that the model says it skipped, if it does."""
        for path, reason in _all_pools(pl_module, "skipped").items():
            self._rows.append({"path": str(path), "label": "skipped", "note": reason})
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions_{trainer.global_rank}.csv"
        target = self.folder(trainer) / name
        with (
            atomic_write(target) as part,
            part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            table = csv.DictWriter(file, COLUMNS, restval="")
            table.writeheader()
            table.writerows(self._rows)
        counts = Counter(row.get("label", "unlabelled") for row in self._rows)
        rank_zero_info(f"Predictions ({', '.join(f'{n} {label}' for label, n in sorted(counts.items()))}): {target}")

    def _write_pending(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the predictions of a finished batch and write its heatmaps."""
        predictions, self._pending = self._pending, None
        sizes = _all_pools(pl_module, "sizes") if predictions is not None else {}
        notes = _all_pools(pl_module, "notes") if predictions is not None else {}
        for item in predictions or ():
            size = sizes.get(item.image_path) or _original_size(item)
            self._rows.append(_row(item, size) | {"note": notes.get(item.image_path, "")})
            if item.anomaly_map is not None and item.image_path is not None:
                self._write_heatmaps(item, size, self.folder(trainer) / "heatmaps")

    def _write_heatmaps(self, item: Any, size: tuple[int, int], folder: Path) -> None:
        path = mirrored_path(Path(item.image_path), self._root, folder)
        if self.heatmaps:
            values = cv2.resize(item.anomaly_map.detach().float().cpu().numpy().squeeze(), size)
        if "npy" in self.heatmaps:
            with atomic_write(path.with_name(f"{path.name}.npy")) as part:
                np.save(part, values)
        if "png" in self.heatmaps:
            with atomic_write(path.with_name(f"{path.name}.png")) as part:
                clipped = torch.from_numpy(values).clamp(0, 1)
                visualize_anomaly_map(clipped, colormap=True, normalize=False).save(part)


def check_prediction_writer(prediction_writer: object) -> None:
    """Raise a ValueError unless an argument is a writer, or whether there is to be one."""
    if not isinstance(prediction_writer, (bool, PredictionWriter)):
        msg = f"prediction_writer must be True, False or a PredictionWriter, got {prediction_writer!r}."
        raise ValueError(msg)


def result_folders(trainer: Trainer) -> set[Path]:
    """Return the folders in which a trainer's callbacks put pictures, which are no images of a product."""
    results = Path(trainer.default_root_dir)
    folders = {results / "images", results / "heatmaps"}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
    for callback in callbacks:
        if isinstance(callback, PredictionWriter):
            folders.add(callback.folder(trainer) / "heatmaps")
        elif isinstance(callback, ImageVisualizer) and callback.output_dir is not None:
            folders.add(Path(callback.output_dir))
    return {folder.resolve() for folder in folders}


def _all_pools(model: LightningModule, attribute: str) -> dict[Any, Any]:
    """Join a mapping of all pools of a model; nothing where it has no pools."""
    pools: Sequence[Any] = getattr(model, "pools", ())
    return {key: value for pool in pools for key, value in getattr(pool, attribute).items()}


def _original_size(item: Any) -> tuple[int, int]:
    """Return width and height of the image file, or of what was made of it."""
    if item.image_path is None:
        return item.image.shape[-1], item.image.shape[-2]
    with Image.open(item.image_path) as image:
        return image.size


def _row(item: Any, size: tuple[int, int]) -> dict[str, str]:
    row: dict[str, str] = {"path": item.image_path or ""}
    if item.pred_score is not None:
        row["score"] = f"{float(item.pred_score):.6f}"
    if item.pred_label is not None:
        row["label"] = "anomalous" if bool(item.pred_label) else "normal"
    if item.pred_mask is not None:
        regions = find_regions(item.pred_mask.cpu().numpy().squeeze(), size)
        row["regions"] = json.dumps([asdict(region) for region in regions])
    return row
