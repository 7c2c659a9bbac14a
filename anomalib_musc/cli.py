# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-musc``: what anomalib's own has no place for."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Run a subcommand; exits with 1 if a cell failed, with 2 if an argument is wrong."""
    parser = argparse.ArgumentParser(prog="anomalib-musc", description="MuSc for anomalib.")
    commands = parser.add_subparsers(dest="command", required=True)
    benchmark = commands.add_parser("benchmark", help="run models side by side and write a report")
    benchmark.add_argument("--config", type=Path, required=True, help="YAML file, see configs/benchmark")
    benchmark.add_argument("--output", type=Path, help="folder for the results, in place of the file's")
    arguments = parser.parse_args()

    from anomalib_musc.benchmark.pipeline import SideBySide

    try:
        records = SideBySide().run(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"anomalib-musc benchmark: {error}\n")
    failed = [record for record in records if record.failure is not None]
    for record in failed:
        print(f"failed: {record.model} on {record.dataset} {record.category}: {record.failure}", file=sys.stderr)
    sys.exit(1 if failed else 0)
