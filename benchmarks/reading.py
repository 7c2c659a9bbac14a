# SPDX-License-Identifier: Apache-2.0
"""What reading costs: ``python benchmarks/reading.py --before CHECKOUT [--json FILE]``.

``Engine.predict`` on folders of large and of small photographs, from whose sizes nothing else but reading follows, by
this package and by an earlier checkout of it, in turns. The network is small and its input, too, so that opening,
decoding, resizing and writing pictures are most of the work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"12 megapixels": (4000, 3000), "0.3 megapixels": (640, 480)}
PREDICT = """
import sys, time, warnings
warnings.filterwarnings("ignore")
from anomalib.engine import Engine
from anomalib_musc import MuSc
model = MuSc("musc-tiny", image_size=64, precision="fast")
start = time.perf_counter()
Engine(default_root_dir=sys.argv[2], enable_progress_bar=False, logger=False).predict(
    model, data_path=sys.argv[1], return_predictions=False
)
print("seconds", time.perf_counter() - start)
"""


def write_photographs(folder: Path, size: tuple[int, int], number: int) -> None:
    """Write JPEG files that look like photographs to a decoder: smooth, with some noise."""
    folder.mkdir()
    width, height = size
    for index in range(number):
        generator = np.random.default_rng(index)
        coarse = generator.integers(60, 200, (height // 40, width // 40, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noise = generator.integers(-6, 7, (height, width, 1), dtype=np.int16)
        Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.jpg", quality=90)


def seconds(checkout: Path, data: Path, results: Path) -> float:
    """Return how long a prediction takes in a process of its own, without its start."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", PREDICT, str(data), str(results)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return float(done.stdout.split("seconds")[-1])


def main() -> None:
    """Print seconds before and after, and write them to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="an earlier checkout of this repository")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--turns", type=int, default=2, help="of which the faster counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in SIZES.items():
            data = Path(scratch, name.replace(" ", "_"))
            write_photographs(data, size, arguments.images)
            times: dict[str, list[float]] = {"before": [], "after": []}
            for turn in range(arguments.turns):
                for key, checkout in (("before", arguments.before.resolve()), ("after", ROOT)):
                    times[key].append(seconds(checkout, data, Path(scratch, f"{key}{turn}{data.name}")))
            best = {key: min(values) for key, values in times.items()}
            found[name] = {**best, "ratio": best["before"] / best["after"]}
            print(f"{arguments.images} images of {name}:", {key: round(value, 2) for key, value in found[name].items()})
    if arguments.json:
        content = {"images": arguments.images, "cpus": os.cpu_count(), "time": time.strftime("%Y-%m-%d"), **found}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
