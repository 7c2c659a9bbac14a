# SPDX-License-Identifier: Apache-2.0
"""One cell: build a model and its data, fit and test it by Engine, measure, and leave a record; never raise."""

import hashlib
import json
import logging
import multiprocessing
import os
import threading
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
from anomalib.utils.logging import redirect_logs
from lightning import seed_everything

from anomalib_musc.benchmark.arguments import instantiate_backbone
from anomalib_musc.benchmark.config import Cell, identify_files, instantiate
from anomalib_musc.benchmark.recorder import Recorder, image_metrics
from anomalib_musc.benchmark.records import Predictions, Record, Store
from anomalib_musc.benchmark.resources import PeakMemory, describe, timed, versions
from anomalib_musc.functional import rscin
from anomalib_musc.output.files import atomic_write
from anomalib_musc.pool.rescoring import image_features

logger = logging.getLogger(__name__)


class CellJob(Job):
    """Run a cell in a process of its own, so that its memory is its own and its death is not that of the others.

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
        self.store.forget(cell.key)
        process = _context().Process(target=self._run_here, args=(task_id,))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # where this one is interrupted
        record = self.store.record(cell.key)
        if record is None:
            record = self._blank()
            record.error = f"The process that ran it ended with status {process.exitcode} (-9: killed, as for memory)."
            self.store.save(record, None)
        if record.failure is not None:
            print(f"  failed: {record.failure}", flush=True)
        return record

    def _run_here(self, task_id: int | None) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        # A child has its own start method for the default, by which each worker of a dataloader would load everything.
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
        redirect_logs(str(self.store.folder / "pipeline.log"))
        record, predictions = self._blank(), None
        try:
            predictions = self._measure(record, task_id)
        except Exception as error:  # whatever a model raises, the other cells go on
            logger.exception("%s failed", self.cell.key)
            record.error = describe_error(error)
        self.store.save(record, predictions)

    def _blank(self) -> Record:
        cell = self.cell
        record = Record(cell.key, cell.name, cell.dataset, cell.category, cell.seed, versions=versions())
        record.configuration = {key: value for key, value in asdict(cell).items() if key != "key"}
        record.setting = cell.setting
        return record

    def _measure(self, record: Record, task_id: int | None) -> Predictions:
        memory, recorder = PeakMemory(), Recorder()
        with TemporaryDirectory() as folder:
            with timed(record.seconds, "setup"):
                seed_everything(self.cell.seed, workers=True, verbose=False)
                model, data = instantiate(self.cell)
                data.prepare_data()
                # Again, as models draw random numbers of their own and a datamodule may split its images by chance.
                seed_everything(self.cell.seed, workers=True, verbose=False)
                data.setup()
                needs_fit = model.learning_type not in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}
                # A zero-shot model is validated for the sake of thresholds alone, which no metric here has.
                limits = {} if needs_fit else {"limit_val_batches": 0}
                engine = Engine(
                    accelerator=self.cell.accelerator,
                    devices=[task_id] if task_id is not None and torch.cuda.is_available() else 1,
                    default_root_dir=folder,
                    callbacks=[recorder],
                    **{"logger": False, **limits, **self.cell.engine},
                )
            with timed(record.seconds, "fit"):
                if needs_fit:
                    engine.fit(model, datamodule=data)
            with timed(record.seconds, "test"):
                engine.test(model, datamodule=data, verbose=False)
        device = engine.trainer.strategy.root_device
        record.num_train, record.num_test = len(data.train_data), len(data.test_data)
        record.device, record.map_size = describe(device), recorder.map_size
        record.peak_host_bytes, record.peak_device_bytes = memory.host(), memory.device(device)
        record.metrics, predictions = recorder.metrics(), recorder.predictions()
        if self.cell.rscin is not None:
            self._rescore(record, predictions, self.cell.rscin, device)
        return predictions

    def _rescore(
        self, record: Record, predictions: Predictions, rscin_of: dict[str, Any], device: torch.device
    ) -> None:
        """Add the second row, with features that are extracted once for all models of a category."""
        arguments = {key: value for key, value in rscin_of.items() if key != "windows"}
        record.rscin = dict(rscin_of)
        try:
            features, seconds = _features(self.store.folder / "features", predictions.paths, arguments, device)
            rescored = rscin(torch.from_numpy(predictions.scores), features, rscin_of["windows"])
        except Exception as error:  # the first row is as good as ever
            logger.exception("RsCIN of %s failed", self.cell.key)
            record.rscin["error"] = f"RsCIN: {describe_error(error)}"
            return
        predictions.rescored = rescored.numpy()
        metrics = image_metrics(rescored, torch.from_numpy(predictions.labels))
        record.rscin |= {"seconds": seconds, "metrics": metrics}

    @staticmethod
    def collect(results: list[Record]) -> list[Record]:
        """Return the records."""
        return results

    @staticmethod
    def save(results: list[Record]) -> None:
        """Do nothing: every cell has saved itself."""


def _context() -> Any:
    """Return how to start processes: from one that has loaded all packages, where there is no GPU to forbid that."""
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent() -> None:
    """Leave no process behind that would write what nobody waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def describe_error(error: Exception) -> str:
    """Return an error as a line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _features(
    folder: Path, paths: Sequence[str], arguments: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, float]:
    """Return image features ``(N, D)``, from a file where they were extracted before, and the seconds that took."""
    identity = json.dumps([arguments, identify_files([paths, arguments])], default=str)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        seconds: dict[str, float] = {}
        with timed(seconds, "extraction"):
            backbone = instantiate_backbone(arguments["backbone"])
            features = image_features(paths, **{**arguments, "backbone": backbone}, device=device)
        with atomic_write(path) as part:
            np.savez(part, features=features.numpy(), seconds=seconds["extraction"])
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["features"]), float(arrays["seconds"])
