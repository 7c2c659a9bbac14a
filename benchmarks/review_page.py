# SPDX-License-Identifier: Apache-2.0
"""How long the review page of a large pool takes to write and to open, and its size.

    python benchmarks/review_page.py --json benchmarks/review_page_cpu.json

Images are noise on a gradient, worse for JPEG than photographs: every thumbnail is about as large as it may be. The
browser is a headless Chromium. Times of opening are from navigation on: to the first picture on the screen, and to the
end of the file. A slow frame is the third slowest of sixty while the threshold moves across the whole histogram.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from browser import chromium

from anomalib_musc.output.review import Card, Review, encode_thumbnail, write_review

GRID = 37  # of CLIP ViT-L/14-336 at 518
VARIETY = 50  # different pictures

FIRST_PICTURE = """new MutationObserver((_, watcher) => {
  const picture = document.querySelector(".card img[src]");
  if (!picture) return;
  watcher.disconnect();
  picture.decode().then(() => requestAnimationFrame(() => (window.firstPicture = performance.now())));
}).observe(document, { childList: true, subtree: true, attributes: true });"""

TIMES = """
const done = arguments[0], [page] = performance.getEntriesByType("navigation"), frames = [];
let last = performance.now(), step = 0;
function move(now) {
  frames.push(now - last);
  last = now;
  setThreshold(pool.scores[0] + (pool.scores.at(-1) - pool.scores[0]) * (++step / 60));
  if (step < 60) requestAnimationFrame(move);
  else done([window.firstPicture, page.loadEventEnd, frames.sort((one, other) => one - other)[57]]);
}
requestAnimationFrame(move);
"""


def make_pool(num_images: int) -> Review:
    """A pool of random pictures, scores and maps."""
    rng = np.random.default_rng(0)
    shade = np.linspace(40, 200, 512)[:, None, None]
    noise = [(shade + rng.normal(0, 25, (512, 512, 3))).clip(0, 255).astype(np.uint8) for _ in range(VARIETY)]
    jpegs = [encode_thumbnail(image) for image in noise]
    cards = [
        Card(
            f"/data/lot_{index % 7}/{index:05d}.png",
            score=float(rng.gamma(4)),
            anomaly_map=rng.gamma(4, size=(GRID, GRID)),
            image=jpegs[index % VARIETY],
            size=(2048, 2048),
            similar=rng.integers(num_images, size=3).tolist(),
        )
        for index in range(num_images)
    ]
    return Review(cards, threshold=8.0, rule="Anomalous is what scores above 8.", name="noise")


def measure(num_images: int, folder: Path) -> dict[str, float]:
    """Write a pool's pages and open the first."""
    review = make_pool(num_images)
    begin = time.perf_counter()
    pages = write_review(folder / "review.html", review)
    written = time.perf_counter() - begin
    with chromium(folder / "profile", folder) as browser:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": FIRST_PICTURE})
        browser.get(pages[0].as_uri())
        first, whole, frame = browser.execute_async_script(TIMES)
    return {
        "images": num_images,
        "pages": len(pages),
        "largest page, MB": round(max(page.stat().st_size for page in pages) / 1e6, 1),
        "to write, s": round(written, 1),
        "first picture, s": round(first / 1e3, 2),
        "whole page, s": round(whole / 1e3, 2),
        "slow frame, ms": round(frame),
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Time and size of the review page.")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 2000, 5000])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for num_images in options.images:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(num_images, Path(folder)))
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
