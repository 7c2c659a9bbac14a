# SPDX-License-Identifier: Apache-2.0
"""``anomalib benchmark`` for models of different arguments and metrics, such as MuSc beside PatchCore.

anomalib 2.7.0: ``BenchmarkJob.collect`` takes the columns of the first result for all, and raises a KeyError where
another model has an argument or a metric of its own, and a ValueError where it lacks one. The command looks its
pipeline up in a registry, in which this module puts one that leaves such cells empty; :mod:`anomalib_musc.startup`
imports it when that command line is loaded.
"""

from typing import Any

import pandas as pd
from anomalib.cli import pipelines
from anomalib.pipelines import Benchmark
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.pipelines.components import Job, Runner


class MixedBenchmarkJob(BenchmarkJob):
    """A job whose results may have columns of their own."""

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Return one row for each result and all columns of any."""
        return pd.DataFrame(results)


class _MixedGenerator(BenchmarkJobGenerator):
    @property
    def job_class(self) -> type[Job]:
        return MixedBenchmarkJob


class MixedBenchmark(Benchmark):
    """anomalib's benchmark, for models of different arguments and metrics."""

    @staticmethod
    def _setup_runners(args: dict[str, Any]) -> list[Runner]:
        runners: list[Runner] = Benchmark._setup_runners(args)
        for runner in runners:
            generator: Any = runner.generator
            runner.generator = _MixedGenerator(generator.accelerator)
        return runners


if pipelines.PIPELINE_REGISTRY is not None:
    pipelines.PIPELINE_REGISTRY["benchmark"] = MixedBenchmark
