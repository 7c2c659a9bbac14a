# SPDX-License-Identifier: Apache-2.0
"""LNAMD and mutual scoring in the official shape against ours, in one run: ``python benchmarks/mutual_scoring.py``.

The official shape, written from the paper's equations: every window unfolded and averaged, then one image at a time
against all others, ``torch.cdist``, the minimum, a sort, the average. All are timed in turn and the medians compared,
beside the time of the bare products, ``torch.mm`` of each unordered pair of images once. Peak memory is what each adds,
features not counted; on a processor to a process of its own. Beside it stand the rates of the processor's products, and
which of them a trial chose. ``--large`` adds a pool for a GPU: four layers of 200 images, each way once.
"""

import argparse
import json
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.distances.trial import fastest
from anomalib_musc.functional import layer_scores, mutual_scores

SIZES = ((16, 1369, 1024), (64, 256, 768), (32, 1024, 384), (24, 400, 192))  # images, patches, channels
LARGE = (200, 1369, 1024)
DEGREES = (1, 3, 5)
COLUMNS = (
    "images x patches x channels",
    "official",
    "exact",
    "fast",
    "exact, times faster",
    "fast, times faster",
    "exact, of the matrix rate",
    "largest difference of fast",
    "chosen for exact",
    "chosen for fast",
)
Work = Callable[[], Any]


def official_lnamd(feature_map: torch.Tensor, degree: int) -> torch.Tensor:
    """Aggregate ``(N, C, H, W)`` image by image."""
    tokens = []
    for image in F.layer_norm(feature_map, feature_map.shape[1:]):
        windows = F.unfold(image[None], degree, padding=degree // 2)  # (1, C * r * r, L)
        tokens.append(windows.view(len(image), degree**2, -1).mean(dim=1).T)
    return F.normalize(torch.stack(tokens), dim=-1)


def official_scores(features: torch.Tensor, interval: tuple[float, float] = (0.0, 0.3)) -> torch.Tensor:
    """Score ``(N, L, C)`` one image at a time against all others."""
    num_images, num_patches, _ = features.shape
    start, stop = (int((num_images - 1) * bound) for bound in interval)
    scores = []
    for index in range(num_images):
        others = torch.cat([features[:index], features[index + 1 :]]).flatten(0, 1)
        distances = torch.cdist(features[index], others).view(num_patches, num_images - 1, num_patches)
        scores.append(distances.amin(dim=2).sort(dim=1).values[:, start : max(stop, start + 1)].mean(dim=1))
    return torch.stack(scores)


def official_layer(maps: torch.Tensor) -> torch.Tensor:
    """LNAMD and mutual scoring of a layer at three degrees."""
    return torch.stack([official_scores(official_lnamd(maps, degree)) for degree in DEGREES]).mean(dim=0)


def one_layer_one_degree(size: tuple[int, int, int], device: str) -> dict[str, Work]:
    """Return the ways to score random unit vectors, and the bare products."""
    features = F.normalize(torch.randn(size, generator=torch.Generator().manual_seed(0)), dim=-1).to(device)
    product = torch.empty(size[1], size[1], device=device)

    def bare() -> None:
        for i in range(size[0]):
            for j in range(i + 1, size[0]):
                torch.mm(features[i], features[j].T, out=product)

    return {
        "official": lambda: official_scores(features),
        "products": bare,
        "exact": lambda: mutual_scores(features),
        "fast": lambda: mutual_scores(features, precision="fast"),
    }


def one_layer(size: tuple[int, int, int], device: str) -> dict[str, Work]:
    """Return the ways to score random maps of a layer at three degrees."""
    num_images, num_patches, channels = size
    side = math.isqrt(num_patches)
    maps = torch.randn(num_images, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    return {
        "official": lambda: official_layer(maps),
        "exact": lambda: layer_scores(maps, DEGREES),
        "fast": lambda: layer_scores(maps, DEGREES, precision="fast"),
    }


def four_layers(size: tuple[int, int, int], device: str) -> dict[str, Work]:
    """Return the ways to score random maps of four layers at three degrees."""
    layers = [one_layer(size, device) for _ in range(4)]
    return {name: lambda name=name: torch.stack([layer[name]() for layer in layers]).mean(dim=0) for name in layers[0]}


SETTINGS = {"one degree": one_layer_one_degree, "three degrees": one_layer, "four layers, three degrees": four_layers}


def rates(device: str) -> dict[str, float]:
    """Return the operations a second of each kind of product, at a usual size; what a device lacks is left out."""
    one = torch.randn(1369, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    bfloat, half, small = one.bfloat16(), one.half(), (40 * one).to(torch.int8)
    products: dict[str, Work] = {
        "float32": lambda: torch.mm(one, one.T),
        "bfloat16": lambda: torch.mm(bfloat, bfloat.T),
        "float16": lambda: torch.mm(half, half.T),
        "8-bit integers": lambda: torch._int_mm(small, small.T),  # noqa: SLF001  # there is no other
    }
    found = {}
    for name, work in products.items():
        try:
            times = [timed(work, device)[0] for _ in range(20)]
        except RuntimeError:
            continue
        found[name] = 2 * one.shape[0] ** 2 * one.shape[1] / statistics.median(times)
    return found


def chosen(setting: str, size: tuple[int, int, int], device: str) -> dict[str, str]:
    """Return which product a trial chose for exact and for fast."""
    degrees = (1,) if setting == "one degree" else DEGREES
    found = {}
    for precision in ("exact", "fast"):
        kernel, is_shared = fastest(precision, *size[1:], degrees, torch.empty(0, device=device))
        found[f"{precision}_product"] = kernel.name + (
            ", one for all degrees" if is_shared and len(degrees) > 1 else ""
        )
    return found


def timed(work: Work, device: str) -> tuple[float, Any]:
    """Return the seconds of one call, its device's queue included, and its result."""
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure_peak(setting: str, name: str, size: tuple[int, int, int], result: "multiprocessing.Queue") -> None:
    """Put the memory that one way adds at its peak, in bytes."""
    work = SETTINGS[setting](size, "cpu")[name]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    work()
    result.put(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Read a size in bytes from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(setting: str, name: str, size: tuple[int, int, int]) -> int | None:
    """Run one way in a process of its own; ``None`` where the peak cannot be read."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=measure_peak, args=(setting, name, size, result))
    process.start()
    value = result.get()
    process.join()
    return value


def compare(setting: str, size: tuple[int, int, int], repeats: int, device: str) -> dict[str, Any]:
    """Time every way in turn, and read its peak."""
    works = SETTINGS[setting](size, device)
    times: dict[str, list[float]] = {name: [] for name in works}
    results, peaks = {}, {}
    for name in ("exact", "fast"):  # each chooses what multiplies
        works[name]()
    for _ in range(repeats):
        for name, work in works.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            duration, results[name] = timed(work, device)
            times[name].append(duration)
            if device == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - before
    row: dict[str, Any] = {"setting": setting, "images": size[0], "patches": size[1], "channels": size[2]}
    for name in works:
        row[f"{name}_s"] = statistics.median(times[name])
        if name != "products":
            row[f"{name}_peak_bytes"] = peaks[name] if device == "cuda" else peak(setting, name, size)
            row[f"{name}_largest_difference"] = float((results[name] - results["official"]).abs().max())
    return row | chosen(setting, size, device)


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    official, products = row["official_s"], row.get("products_s")
    cells = [f"{row['setting']}: {row['images']} x {row['patches']} x {row['channels']}"]
    for name in ("official", "exact", "fast"):
        memory = row[f"{name}_peak_bytes"]
        cells.append(f"{row[f'{name}_s']:.2f} s" + (f", {memory / 2**20:.0f} MiB" if memory is not None else ""))
    cells += [f"**{official / row[name]:.1f}**" for name in ("exact_s", "fast_s")]
    cells.append(f"{products / row['exact_s']:.0%}" if products else "")
    cells.append(f"{row['fast_largest_difference']:.1e}")
    cells += [row["exact_product"], row["fast_product"]]
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Print a table and write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="add four layers of 200 images")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "operations_per_second": rates(arguments.device),
        "rows": [],
    }
    print(f"{report['device']}, {report['threads']} threads, torch {report['torch']}")
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in report["operations_per_second"].items()))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    cases = [(setting, size, arguments.repeats) for setting in ("one degree", "three degrees") for size in SIZES]
    if arguments.large:
        cases.append(("four layers, three degrees", LARGE, 1))
    for case in cases:
        report["rows"].append(compare(*case, arguments.device))
        show(report["rows"][-1])
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    """Name the processor, and its instructions for products of few bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.split() for key, _, value in (line.partition(":") for line in lines)}
    name = " ".join(found.get("model name", [platform.machine()]))
    units = [unit for unit in ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if unit in found.get("flags", ())]
    return f"{name}, {' '.join(units) or 'without products of few bits'}"


if __name__ == "__main__":
    main()
