# SPDX-License-Identifier: Apache-2.0
"""The whole way of the command, process and imports included: ``python benchmarks/whole_way.py FOLDER``.

``anomalib-musc predict FOLDER --backbone musc-tiny`` in processes of its own, by this checkout and, with ``--before``,
by another, in turn. What takes how long is told by Lightning's profiler in one more run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mutual_scoring import processor

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys; from anomalib_musc.cli import main; sys.exit(main())"
PROFILED = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from lightning.pytorch.profilers import SimpleProfiler
import anomalib_musc.inference.engine as engine
from anomalib_musc.cli import main
profiler, made = SimpleProfiler(), engine.Engine
engine.Engine = lambda **arguments: made(**arguments, profiler=profiler)
imported = time.perf_counter()
try:
    main()
except SystemExit as error:
    status = error.code
parts = {name: sum(times) for name, times in profiler.recorded_durations.items()}
sys.stderr.write("PARTS " + repr({"imports": imported - start, **parts}) + "\\n")
sys.exit(status)
"""


def run(checkout: Path, folder: Path, options: list[str], code: str = COMMAND) -> tuple[float, str]:
    """Return the seconds of a run, and what it wrote to its standard error."""
    with tempfile.TemporaryDirectory() as output:
        command = ["predict", str(folder.resolve()), "--backbone", "musc-tiny", "--output", output, *options]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        start = time.perf_counter()
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code, *command],
            cwd=output,  # which Python looks into first
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stderr)
    return seconds, done.stderr


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--fast", action="store_true", help="by --fast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    options = ["--fast"] if arguments.fast else []
    checkouts = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    times: dict[str, list[float]] = {name: [] for name in checkouts}
    for _ in range(arguments.repeats):
        for name, checkout in checkouts.items():
            times[name].append(run(checkout, arguments.folder, options)[0])
    report: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    report["seconds"] = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in report["seconds"].items():
        print(f"{name}: {seconds:.1f} s", flush=True)
    _, log = run(ROOT, arguments.folder, options, PROFILED)
    parts: dict[str, float] = next(eval(line[6:]) for line in log.splitlines() if line.startswith("PARTS "))  # noqa: S307
    report["parts"] = dict(sorted(parts.items(), key=lambda part: -part[1])[:25])
    for name, seconds in report["parts"].items():
        print(f"{seconds:8.2f} s  {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
