# SPDX-License-Identifier: Apache-2.0
"""Scoring in several processes: ``python benchmarks/processes.py``, and what it costs elsewhere, by a model of it.

Pools of one layer at 3 degrees, one thread a process, one and two processes in turn; Linux only. Beside the time stands
the memory that a process holds: its features, and the peak that scoring adds. ``--model`` prints a computed table.
"""

import argparse
import json
import math
import multiprocessing
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mutual_scoring import processor, resident
from torch import distributed

from anomalib_musc.distances import Processes
from anomalib_musc.functional import layer_scores

SIDE, CHANNELS = 32, 384
IMAGES = (32, 64)
ROUNDS = 3


def measure(rank: int, number: int, num_images: int, port: int, result: "multiprocessing.Queue") -> None:
    """Put the seconds of scoring, and the bytes that a process holds at most beyond what the libraries take."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=number)
    generator = torch.Generator().manual_seed(rank)
    processes = Processes() if number > 1 else None
    layer_scores(torch.randn(4, CHANNELS, SIDE, SIDE, generator=generator), processes=processes)  # what is done once
    before = resident("VmRSS")
    share = torch.randn(len(range(rank, num_images, number)), CHANNELS, SIDE, SIDE, generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    distributed.barrier()
    start = time.perf_counter()
    layer_scores(share, processes=processes)
    distributed.barrier()
    result.put((time.perf_counter() - start, resident("VmHWM") - before))
    distributed.destroy_process_group()


def run(number: int, num_images: int) -> tuple[float, int]:
    """Return the seconds of the slowest process and the bytes of the largest."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [(rank, number, num_images, port, result) for rank in range(number)]
    processes = [context.Process(target=measure, args=one) for one in arguments]
    for process in processes:
        process.start()
    found = [result.get() for _ in processes]
    for process in processes:
        process.join()
    return max(seconds for seconds, _ in found), max(peak for _, peak in found)


def compare(num_images: int) -> dict[str, Any]:
    """Measure one and two processes in turn."""
    found: dict[int, list[tuple[float, int]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for number, rows in found.items():
            rows.append(run(number, num_images))
    seconds = {number: statistics.median(one for one, _ in rows) for number, rows in found.items()}
    peaks = {number: statistics.median(peak for _, peak in rows) for number, rows in found.items()}
    return {
        "images": num_images,
        "seconds": seconds,
        "speed_up": seconds[1] / seconds[2],
        "peak_bytes": peaks,
        "share_of_memory": peaks[2] / peaks[1],
    }


def computed_seconds(
    num_images: int,
    number: int,
    rate: float,
    bandwidth: float,
    *,
    num_patches: int = 1369,
    channels: int = 1024,
    num_layers: int = 4,
    num_degrees: int = 3,
    num_subsets: int = 1,
) -> float:
    """Compute how long scoring takes.

    In a step of the ring a process compares its images with as many visitors, whose features arrive, and whose
    distances leave, meanwhile: the step takes as long as the slower of both. Subsets are dealt out, with no ring.

    Args:
        num_images: N.
        number: Processes W.
        rate: Multiplications and additions that a process does in a second, reductions and all.
        bandwidth: Bytes that a process sends in a second while it receives as many.
        num_patches: L.
        channels: C.
        num_layers: Layers.
        num_degrees: Degrees, each with a product of its own.
        num_subsets: Subsets.
    """
    pair = 2 * num_patches**2 * channels * num_layers * num_degrees / rate
    if num_subsets > 1:
        return math.ceil(num_subsets / number) * math.comb(math.ceil(num_images / num_subsets), 2) * pair
    share = math.ceil(num_images / number)
    own = math.comb(share, 2) * pair
    features = 4 * share * num_patches * channels * num_layers
    distances = 4 * share**2 * num_patches * num_layers * num_degrees
    step = max(share**2 * pair, (features + distances) / bandwidth)
    return own + (number - 1) / 2 * step  # of an even number the last step is half a one


def model(rate: float, bandwidth: float) -> None:
    """Print a computed table in Markdown."""
    numbers = (1, 2, 4, 8, 16, 32, 64)
    print("| images | subsets |", " | ".join(f"{number} GPU" for number in numbers), "|")
    print("|---|---|" + "---|" * len(numbers))
    for num_images in (1_000, 10_000, 100_000, 1_000_000):
        for num_subsets in (1, num_images // 500):
            seconds = [
                computed_seconds(num_images, number, rate, bandwidth, num_subsets=num_subsets) for number in numbers
            ]
            print(f"| {num_images:,} | {num_subsets:,} |", " | ".join(map(in_words, seconds)), "|")


def in_words(seconds: float) -> str:
    """Return a duration in two digits."""
    units = {"years": 365.25 * 86400, "days": 86400, "h": 3600, "min": 60}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= 1.5 * size), ("s", 1))
    return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{seconds / size:.0f} {unit}"


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--model", action="store_true", help="compute a table for GPUs")
    parser.add_argument("--rate", type=float, default=4e14, help="operations that a GPU does in a second")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes that a GPU sends in a second")
    arguments = parser.parse_args()
    if arguments.model:
        model(arguments.rate, arguments.bandwidth)
        return
    rows = []
    print("| images | 1 process, s | 2 processes, s | times faster | memory of a process, MiB | share of one's |")
    print("|---|---|---|---|---|---|")
    for num_images in IMAGES:
        row = compare(num_images)
        rows.append(row)
        seconds, peaks = row["seconds"], row["peak_bytes"]
        print(
            f"| {num_images} | {seconds[1]:.1f} | {seconds[2]:.1f} | {row['speed_up']:.2f} | "
            f"{peaks[1] / 2**20:.0f}, {peaks[2] / 2**20:.0f} | {row['share_of_memory']:.0%} |",
            flush=True,
        )
    if arguments.json:
        report = {"device": processor(), "torch": torch.__version__, "patches": SIDE**2, "channels": CHANNELS}
        arguments.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
