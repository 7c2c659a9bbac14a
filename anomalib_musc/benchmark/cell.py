# SPDX-License-Identifier: Apache-2.0
"""One cell: build a model and its data, fit and test it by Engine, measure, and leave a record; never raise."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib import LearningType
from anomalib.engine import Engine
from anomalib.pipelines.components import Job
from lightning import seed_everything

from anomalib_musc.benchmark.config import Cell, instantiate, instantiate_backbone
from anomalib_musc.benchmark.published import published_setting
from anomalib_musc.benchmark.recorder import Recorder, image_metrics
from anomalib_musc.benchmark.records import Predictions, Record, Store
from anomalib_musc.benchmark.resources import PeakMemory, describe, timed, versions
from anomalib_musc.files import whole_file
from anomalib_musc.functional import rscin
from anomalib_musc.rescoring import image_features

logger = logging.getLogger(__name__)


class CellJob(Job):
    """Run a cell.

    Args:
        cell: What to run.
        store: Where its record goes.
    """

    name = "benchmark"

    def __init__(self, cell: Cell, store: Store) -> None:
        self.cell = cell
        self.store = store

    def run(self, task_id: int | None = None) -> Record:
        """Run the cell; a failure is recorded and not raised.

        Args:
            task_id: Index of the GPU to use, where several cells run at a time.
        """
        cell = self.cell
        print(f"{cell.name} on {cell.dataset} {cell.category}, seed {cell.seed}", flush=True)
        record = Record(cell.key, cell.name, cell.dataset, cell.category, cell.seed, versions=versions())
        record.configuration = {key: value for key, value in asdict(cell).items() if key != "key"}
        record.setting = published_setting(cell.dataset, cell.model)
        predictions = None
        self.store.begin(cell.key)
        try:
            predictions = self._measure(record, task_id)
        except Exception as error:  # whatever a model raises, the other cells go on
            logger.exception("%s failed", cell.key)
            record.error = f"{type(error).__name__}: {error}"
            print(f"  failed: {record.error}", flush=True)
        self.store.save(record, predictions)
        return record

    def _measure(self, record: Record, task_id: int | None) -> Predictions:
        seed_everything(self.cell.seed, workers=True, verbose=False)
        memory, recorder = PeakMemory(), Recorder()
        with TemporaryDirectory() as folder:
            with timed(record.seconds, "setup"):
                model, data = instantiate(self.cell)
                data.prepare_data()
                data.setup()
                needs_fit = model.learning_type not in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}
                engine = Engine(
                    accelerator=self.cell.accelerator,
                    devices=[task_id] if task_id is not None and torch.cuda.is_available() else 1,
                    default_root_dir=folder,
                    callbacks=[recorder],
                    logger=False,
                    # A zero-shot model is validated for the sake of thresholds alone, which no metric here has.
                    **({} if needs_fit else {"limit_val_batches": 0}),
                )
            with timed(record.seconds, "fit"):
                if needs_fit:
                    engine.fit(model, datamodule=data)
            with timed(record.seconds, "test"):
                engine.test(model, datamodule=data, verbose=False)
        device = engine.trainer.strategy.root_device
        record.num_train, record.num_test = len(data.train_data), len(data.test_data)
        record.device, record.map_size = describe(device), recorder.map_size
        record.peak_host_bytes, record.peak_device_bytes = memory.host(), memory.device()
        record.metrics, predictions = recorder.metrics(), recorder.predictions()
        if self.cell.rscin is not None:
            self._rescore(record, predictions, device)
        return predictions

    def _rescore(self, record: Record, predictions: Predictions, device: torch.device) -> None:
        """Add the second row, with features that are extracted once for all models of a category."""
        arguments = {key: value for key, value in (self.cell.rscin or {}).items() if key != "windows"}
        windows = (self.cell.rscin or {})["windows"]
        features, seconds = _features(self.store.folder / "features", predictions.paths, arguments, device)
        rescored = rscin(torch.from_numpy(predictions.scores), features, windows)
        predictions.rescored = rescored.numpy()
        metrics = image_metrics(rescored, torch.from_numpy(predictions.labels))
        record.rscin = {**arguments, "windows": list(windows), "seconds": seconds, "metrics": metrics}

    @staticmethod
    def collect(results: list[Record]) -> list[Record]:
        """Return the records."""
        return results

    @staticmethod
    def save(results: list[Record]) -> None:
        """Do nothing: every cell has saved itself."""


def _features(
    folder: Path, paths: Sequence[str], arguments: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, float]:
    """Return image features ``(N, D)``, from a file where they were extracted before, and the seconds that took."""
    identity = json.dumps([arguments, list(paths)], default=str)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        seconds: dict[str, float] = {}
        with timed(seconds, "extraction"):
            backbone = instantiate_backbone(arguments["backbone"])
            features = image_features(paths, **{**arguments, "backbone": backbone}, device=device)
        with whole_file(path) as part:
            np.savez(part, features=features.numpy(), seconds=seconds["extraction"])
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["features"]), float(arrays["seconds"])
