# SPDX-License-Identifier: Apache-2.0
"""Functions in a process of their own, forked from one that has done the imports, which take ten seconds."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 240

_context = get_context("forkserver")
_context.set_forkserver_preload(["anomalib.cli.cli", "anomalib_musc.lightning_model", "conftest"])


def run_forked(
    function: Callable[..., Any], *arguments: Any, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Call a function of a module in a process of its own, and return what it printed and its exit status."""
    (stdout, *_), (stderr, *_) = pipes = [_context.Pipe(duplex=False) for _ in range(2)]
    writers = [writer for _, writer in pipes]
    process = _context.Process(target=_call, args=(function, arguments, cwd, dict(environment or {}), writers))
    process.start()
    for writer in writers:
        writer.close()
    with ThreadPoolExecutor() as pool:
        texts = [pool.submit(_read, pipe) for pipe in (stdout, stderr)]
        process.join(SECONDS)
        process.kill()
    if process.exitcode is None:
        raise subprocess.TimeoutExpired(function.__name__, SECONDS)
    return subprocess.CompletedProcess([function.__name__], process.exitcode, *(text.result() for text in texts))


def _read(pipe: Connection) -> str:
    with open(pipe.fileno(), "rb", closefd=False) as stream:
        return stream.read().decode()


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    cwd: Path,
    environment: Mapping[str, str],
    writers: list[Connection],
) -> None:
    for number, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), number)
        writer.close()
    os.chdir(cwd)
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    function(*arguments)
