# SPDX-License-Identifier: Apache-2.0
"""Predictions as a table, a page and heatmaps, by a callback for any model of anomalib."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import visualize_anomaly_map
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_musc.compat.progress import end_progress_bar
from anomalib_musc.distances import Processes, gathered
from anomalib_musc.output.batches import joined, original_size, pictures_of, prediction_of, report_of
from anomalib_musc.output.files import MirroredFolder, atomic_write, check_writable
from anomalib_musc.output.predictions import Prediction
from anomalib_musc.output.results import write_results
from anomalib_musc.output.summary import summary
from anomalib_musc.output.visualizer import FolderVisualizer
from anomalib_musc.pool.loaders import common_folder, image_paths
from anomalib_musc.pool.module import PoolModule

HeatmapFormat = Literal["png", "npy"]
TABLE = "predictions.csv"


class PredictionWriter(Callback):
    """Write ``predictions.csv``, ``predictions.json`` and ``review.html`` when images are predicted.

    The table has a row for every file, from the most anomalous on: path, rank, normalised score, label ("anomalous",
    "normal" or "skipped" with the reason in ``note``), raw score, deviations, threshold, number of regions, box and
    area of the largest region in pixels of the original image, picture and note. ``predictions.json`` holds all
    regions, the settings, versions and warnings. On ``review.html`` a person moves the threshold and marks images.

    :class:`~anomalib_musc.MuSc` has one for ``predict``; any other model takes it as one of
    ``Engine(callbacks=[...])``. Where several processes predict, the first one writes the table of all. What fails for
    one image is a note in its row; where the run of one process fails, the table holds what was known by then.

    Args:
        output_dir: Where to write; by default the trainer's ``default_root_dir``, where ``images/`` is. Where there is
            a table of an earlier run, a folder ``v1``, ``v2``, ... within it.
        heatmaps: What to write besides, at the size of each image, to ``heatmaps/``: "png", the coloured anomaly map,
            "npy", its values as a float32 array ``(H, W)``, in [0, 1] where the model normalises them, or both.
        review: Whether to write ``review.html``.
        summary: Whether to print what was found in a few lines.
        threshold_argument: The command-line argument that fixes the threshold, for the page; by default anomalib's.

    Attributes:
        predictions: Those of the last run, from the most anomalous image on.
        files: Page and table of the last run.
        warnings: Signs that its pool is not what one thinks it is.

    Raises:
        ValueError: If ``heatmaps`` holds anything else.

    Example:
        >>> writer = PredictionWriter(heatmaps=["png", "npy"])
        >>> Engine(callbacks=[writer]).predict(Patchcore(), ckpt_path="...", data_path="...")  # doctest: +SKIP
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        heatmaps: Sequence[HeatmapFormat] = (),
        review: bool = True,
        summary: bool = True,
        threshold_argument: str | None = None,
    ) -> None:
        unknown = sorted(set(heatmaps) - set(get_args(HeatmapFormat)))
        if isinstance(heatmaps, str) or unknown:
            msg = f"heatmaps must be a list of {get_args(HeatmapFormat)}, got {heatmaps!r}."
            raise ValueError(msg)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.heatmaps = tuple(heatmaps)
        self.review = review
        self.summary = summary
        self.threshold_argument = threshold_argument
        self.predictions: list[Prediction] = []
        self.files: list[Path] = []
        self.warnings: Sequence[str] = ()
        self._folder: Path | None = None  # while images are predicted
        self._places = MirroredFolder(Path())
        self._predictions: list[Prediction] = []
        self._pending: ImageBatch | None = None
        self._sizes: Mapping[str, tuple[int, int]] = {}
        self._writes = True

    def folder(self, trainer: Trainer) -> Path:
        """Return where the next run, or the one that is running, writes."""
        if self._folder is not None:
            return self._folder
        folder = self.output_dir or Path(trainer.default_root_dir)
        numbered = (folder / f"v{number}" if number else folder for number in count())
        return next(place for place in numbered if not (place / TABLE).exists())

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether results can be written."""
        del pl_module
        self._predictions, self._pending, self._folder, self._sizes = [], None, None, {}
        self._folder = Path(trainer.strategy.broadcast(str(self.folder(trainer))))
        heatmaps = self._folder / "heatmaps"
        check_writable(heatmaps if self.heatmaps else self._folder)
        self._places = MirroredFolder(heatmaps, image_paths(trainer.predict_dataloaders))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep a batch until all callbacks have seen it: a model's post-processor comes after those of a user."""
        del trainer, pl_module, batch, batch_idx, args
        self._pending = outputs

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the batch before this one."""
        del trainer, args
        self._sizes = self._sizes or getattr(pl_module, "image_sizes", {})
        self._writes = getattr(pl_module, "writes_results", True)
        self._note_pending()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last batch."""
        del trainer, pl_module
        self._note_pending()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write table and page, and say what was found."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is known when a prediction fails on its way."""
        del exception
        if self._folder is not None and trainer.predicting and trainer.world_size == 1:
            self._note_pending()
            self._finish(trainer, pl_module)

    def _note_pending(self) -> None:
        """Note the predictions of a finished batch and write its heatmaps."""
        predictions, self._pending = self._pending, None
        for item in predictions or ():
            notes: list[str] = []
            size = None
            with _noted(notes):
                size = self._sizes.get(str(item.image_path)) or original_size(item)
            if item.anomaly_map is not None and item.image_path is not None and size is not None:
                with _noted(notes):
                    self._write_heatmaps(item, size)
            self._predictions.append(prediction_of(item, size, notes))

    def _write_heatmaps(self, item: Any, size: tuple[int, int]) -> None:
        if not self._writes:
            return
        if self.heatmaps:
            values = cv2.resize(item.anomaly_map.detach().float().cpu().numpy().squeeze(), size)
        if "npy" in self.heatmaps:
            with atomic_write(self._places.place(item.image_path, ".npy")) as part:
                np.save(part, values)
        if "png" in self.heatmaps:
            with atomic_write(self._places.place(item.image_path, ".png")) as part:
                clipped = torch.from_numpy(values).clamp(0, 1)
                visualize_anomaly_map(clipped, colormap=True, normalize=False).save(part)

    def _finish(self, trainer: Trainer, model: LightningModule) -> None:
        folder, self._folder = self.folder(trainer), None
        report = report_of(model)
        if self.threshold_argument is not None:
            report = replace(report, decision=replace(report.decision, argument=self.threshold_argument))
        shares = gathered(_dealt(trainer, model), (self._predictions, *pictures_of(model)))
        predictions = [prediction for share, _, _ in shares for prediction in share]
        pictures = {path: picture for _, share, _ in shares for path, picture in share.items()}
        failures = {path: reason for _, _, share in shares for path, reason in share.items()}
        self.predictions, self.warnings = joined(predictions, report, pictures, failures), report.warnings
        if not trainer.is_global_zero or (not self.predictions and not report.skipped):
            return
        self.files = write_results(folder / TABLE, self.predictions, report, review=self.review)
        if self.summary:
            encoding = sys.stdout.encoding or "utf-8"
            end_progress_bar(trainer)
            text = summary(self.predictions, report, self.files).encode(encoding, "backslashreplace").decode(encoding)
            _say(text)


def _say(text: str) -> None:
    """Print a text; whoever reads it may have gone, as ``head`` does."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_prediction_writer(prediction_writer: object) -> None:
    """Raise a ValueError unless an argument is a writer, or whether there is to be one."""
    if not isinstance(prediction_writer, (bool, PredictionWriter)):
        msg = f"prediction_writer must be True, False or a PredictionWriter, got {prediction_writer!r}."
        raise ValueError(msg)


def result_folders(trainer: Trainer) -> set[Path]:
    """Return the folders in which a trainer's callbacks put pictures, and nothing else, which are no products."""
    results = Path(trainer.default_root_dir)
    folders = {results / "images", results / "heatmaps"}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
    for callback in callbacks:
        if isinstance(callback, PredictionWriter) and callback.output_dir is not None:
            folders |= {callback.output_dir / "heatmaps", *callback.output_dir.glob("v*/heatmaps")}
        elif isinstance(callback, (ImageVisualizer, FolderVisualizer)) and callback.output_dir is not None:
            folders.add(Path(callback.output_dir))
    images = [Path(os.path.realpath(path)) for path in image_paths(trainer.predict_dataloaders)]  # links may loop
    root = common_folder(images)
    above = set() if root is None else {root, *root.parents}
    return {folder.resolve() for folder in folders} - above


def writes_review(trainer: Trainer) -> bool:
    """Whether a trainer predicts and one of its callbacks writes the review page."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
    writers = [callback for callback in callbacks if isinstance(callback, PredictionWriter)]
    return trainer.predicting and any(writer.review for writer in writers)


def _dealt(trainer: Trainer, model: LightningModule) -> Processes | None:
    """Return the processes among which the images are dealt; ``None`` where this one has all."""
    return model.processes if isinstance(model, PoolModule) else Processes.of(trainer.world_size)


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Take down what goes wrong with one image, instead of ending the run."""
    try:
        yield
    except (OSError, ValueError) as error:
        notes.append(str(error))
