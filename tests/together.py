# SPDX-License-Identifier: Apache-2.0
"""A function in several processes at once, as a launcher such as torchrun starts them."""

import contextlib
import os
import random
import socket
import subprocess
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from forks import run_forked
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed


def run_together(
    function: Callable[..., Any], *arguments: Any, number: int, cwd: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Call a function in processes that can reach each other; its result is saved, see :func:`results`."""
    port = str(_free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        return run_forked(_save, function, arguments, cwd, cwd=cwd, environment=environment)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def results(function: Callable[..., Any], *arguments: Any, number: int, cwd: Path) -> list[Any]:
    """Return what each process returned, by rank."""
    processes = run_together(function, *arguments, number=number, cwd=cwd)
    assert all(process.returncode == 0 for process in processes), "\n\n".join(one.stderr[-2000:] for one in processes)
    return [torch.load(cwd / f"{rank}.pt", weights_only=False) for rank in range(number)]


def _free_port() -> int:
    """Return a port below those that systems give to whoever asks for any, which is hardly taken before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _save(function: Callable[..., Any], arguments: tuple[Any, ...], cwd: Path) -> None:
    rank = int(os.environ["RANK"])
    rank_zero_only.rank = rank  # which Lightning reads when it is imported, before this process was forked
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), cwd / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # as the others wait for nobody who is at his end
    if distributed.is_initialized():
        distributed.destroy_process_group()
