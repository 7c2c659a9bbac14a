# SPDX-License-Identifier: Apache-2.0
"""Commands in a process of their own, and the tables that they write."""

import csv
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from forks import run_forked

TINY = {"backbone": "test_vit", "pretrained": False, "image_size": 64}
SMALL = ["--model.backbone", "test_vit", "--model.pretrained", "false"]


def anomalib(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``anomalib ...`` in a process that is forked with its imports done."""
    return run_command("anomalib", *map(str, arguments), cwd=cwd, **environment)


def run_command(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run an installed command in a process that is forked with its imports done."""
    return run_forked(_main, name, *arguments, cwd=cwd, environment={"COLUMNS": "200", **environment})


def anomalib_from_the_shell(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``anomalib ...`` with the installed entry point."""
    command = [str(Path(sys.executable).with_name("anomalib")), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def _main(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    (entry_point,) = entry_points(group="console_scripts", name=name)
    sys.exit(entry_point.load()())


def metric(output: str, name: str) -> float:
    """Read a metric off the table that Lightning prints."""
    found = re.search(rf"{name}\W+([0-9.]+)", output)
    assert found, output
    return float(found.group(1))


def read_paths(root: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the newest ``predictions.csv`` beneath a folder by path."""
    table = max(root.rglob("predictions.csv"), key=lambda path: path.stat().st_mtime_ns)
    with table.open(newline="", encoding="utf-8-sig") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def read_table(root: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the newest ``predictions.csv`` beneath a folder by file name."""
    return {Path(path).name: row for path, row in read_paths(root).items()}


def read_details(root: Path) -> list[dict[str, Any]]:
    """Return the images of the newest ``predictions.json`` beneath a folder."""
    file = max(root.rglob("predictions.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(file.read_text())["images"]
