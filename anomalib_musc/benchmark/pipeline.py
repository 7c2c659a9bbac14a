# SPDX-License-Identifier: Apache-2.0
"""anomalib's pipeline of two stages: run the cells, several at a time where there are several GPUs, then report."""

import logging
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from anomalib.pipelines.components import Job, JobGenerator, Pipeline, Runner
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pipelines.components.runners.parallel import ParallelExecutionError
from anomalib.pipelines.components.runners.serial import SerialExecutionError
from anomalib.utils.logging import redirect_logs

from anomalib_musc.benchmark.cell import CellJob
from anomalib_musc.benchmark.config import BenchmarkConfig, Cell, read_config
from anomalib_musc.benchmark.records import Record, Store
from anomalib_musc.benchmark.report import write_report
from anomalib_musc.benchmark.summary import rows_of
from anomalib_musc.benchmark.tables import write_csv, write_markdown
from anomalib_musc.output.files import check_writable

logger = logging.getLogger(__name__)


class CellGenerator(JobGenerator):
    """Generates the cells that are not finished yet; those that failed before are tried again."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config = config

    @property
    def job_class(self) -> type[Job]:
        """The class of the jobs."""
        return CellJob

    def generate_jobs(self, args: dict | None = None, prev_stage_result: Any = None) -> Generator[Job, None, None]:
        """Yield a job for every cell to run."""
        del args, prev_stage_result
        store = Store(self._config.output)
        for cell in self._config.cells:
            if not store.is_finished(cell.key):
                yield CellJob(cell, store)


class SideBySide(Pipeline):
    """Run models side by side and write ``results.csv``, ``results.md`` and ``report.html``.

    Killed half-way, it goes on where it was when it is run again with the same configuration.

    Example:
        >>> from argparse import Namespace
        >>> SideBySide().run(Namespace(config="configs/benchmark/offline.yaml"))  # doctest: +SKIP
    """

    def _setup_runners(self, args: dict[str, Any]) -> list[Runner]:
        config: BenchmarkConfig = args["config"]
        generator, num_gpus = CellGenerator(config), torch.cuda.device_count()
        if config.accelerator in {"auto", "cuda", "gpu"} and num_gpus > 1:
            return [ParallelRunner(generator, n_jobs=num_gpus)]
        return [SerialRunner(generator)]

    def run(self, args: Namespace) -> list[Record]:  # type: ignore[override]
        """Run what is not finished and write the report of all.

        Args:
            args: ``config``, a YAML file, see :mod:`anomalib_musc.benchmark.config`; and ``output``, a folder in place
                of the file's.

        Returns:
            The records of all cells, failed ones included.

        Raises:
            ValueError: If the configuration is wrong.
            OSError: If the output cannot be written.
        """
        config = read_config(Path(args.config), getattr(args, "output", None))
        check_writable(config.output, "--output")
        redirect_logs(str(config.output / "pipeline.log"))
        store = Store(config.output)
        finished = sum(store.is_finished(cell.key) for cell in config.cells)
        print(f"{config.title}: {len(config.cells)} cells, {finished} of them finished before", flush=True)
        for runner in self._setup_runners({"config": config}):
            try:
                with _ended_by_sigterm():
                    runner.run({})
            except (ParallelExecutionError, SerialExecutionError):  # their cells have no record, the others are fine
                logger.exception("Cells were lost")
        records = [_record_of(cell, store) for cell in config.cells]
        rows = rows_of(records)
        write_csv(config.output / "results.csv", records)
        write_markdown(config.output / "results.md", config.title, rows, records)
        write_report(config.output / "report.html", config.title, rows, records, store)
        print(f"Report: {config.output / 'report.html'}, tables: results.md and results.csv beside it")
        return records


def _record_of(cell: Cell, store: Store) -> Record:
    """Return a cell's record under the names that the configuration gives it now."""
    lost = Record(cell.key, cell.name, cell.dataset, cell.category, cell.seed, error="Lost, see pipeline.log.")
    record = store.record(cell.key) or lost
    return replace(record, dataset=cell.dataset, setting=cell.setting)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """End at once where SIGTERM asks for it, with a status that says so; the same command goes on later."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
