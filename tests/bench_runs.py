# SPDX-License-Identifier: Apache-2.0
"""Benchmarks in processes of their own, and their configurations."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from commands import run_command

TINY = {"backbone": "test_vit", "pretrained": False}


def command(name: str, *arguments: str | Path, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start an installed entry point."""
    line = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, cwd=cwd, env={**os.environ, **environment}, text=True, **streams)


def run(name: str, *arguments: str | Path, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run a command in a process that is forked with its imports done; returns its status and what it printed."""
    done = run_command(name, *map(str, arguments), cwd=cwd, **environment)
    return done.returncode, done.stdout + done.stderr


def write_config(path: Path, model: object, data: object, **content: object) -> Path:
    path.write_text(yaml.safe_dump({"accelerator": "cpu", **content, "benchmark": {"model": model, "data": data}}))
    return path


def widget(mvtec_root: Path, **arguments: object) -> dict[str, object]:
    return {
        "class_path": "MVTecAD",
        "init_args": {"root": str(mvtec_root), "category": "widget", "num_workers": 0, **arguments},
    }
