# SPDX-License-Identifier: Apache-2.0
"""A pool of thirty images for the review page, and what its page shows."""

from pathlib import Path

import numpy as np
from browser import one, settle
from PIL import Image

from anomalib_musc.output.regions import Region
from anomalib_musc.output.review import Card, Review, write_review

NUM_IMAGES = 30
THRESHOLD = 2.05
RULE = "Anomalous is what scores above 2.05."
ARGUMENT = "--model.post_processor.image_threshold"
# Their order is not that of their scores, and two are equal.
SCORES = [round(1 + 0.1 * ((7 * index) % NUM_IMAGES), 3) for index in range(NUM_IMAGES)]
SCORES[3] = SCORES[4]
RANKED = sorted(range(NUM_IMAGES), key=lambda index: -SCORES[index])
GRID = (6, 9)
STEPS = (3, 1, 2)  # from an image to those most like it


def size_of(index: int) -> tuple[int, int]:
    return (48, 96) if index % 5 == 0 else (96, 64)


def name_of(rank: int) -> str:
    return f"{RANKED[rank]:02d}.png"


def anomaly_map(index: int) -> np.ndarray:
    """A grid with one hill, as high as the image's score, each at another place."""
    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    return SCORES[index] * np.exp(-((rows - index % GRID[0]) ** 2 + (columns - 5 * index % GRID[1]) ** 2) / 5)


def draw(folder: Path, index: int, name: str | None = None) -> Path:
    width, height = size_of(index)
    path = folder / ("north" if index % 2 else "south") / (name or f"{index:02d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(index).integers(90, 110, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_review(folder: Path, names: dict[int, str] | None = None, **changes) -> Review:
    cards = [
        Card(
            draw(folder, index, (names or {}).get(index)),
            SCORES[index],
            anomaly_map(index),
            similar=[(index + step) % NUM_IMAGES for step in STEPS],
            regions=[Region(5, 6, 7, 8, 50)] if SCORES[index] > THRESHOLD else [],
            note=f"note {index}",
        )
        for index in range(NUM_IMAGES)
    ]
    return Review(cards, **{"threshold": THRESHOLD, "rule": RULE, "name": "bolts", **changes})


def open_page(browser, folder: Path, review: Review):
    (path,) = write_review(folder / "review.html", review)
    browser.get(path.as_uri())
    return browser


def mark(page, rank: int, kind: str) -> None:
    page.execute_script(
        "document.querySelector(`.card[data-rank='${arguments[0]}'] button[data-mark=${arguments[1]}]`).click()",
        *(rank, kind),
    )


def drag_to(page, share: float) -> float:
    """Drag the handle to a share of the histogram's width; returns the threshold that it shows."""
    from selenium.webdriver import ActionChains

    box, handle = one(page, "#histogram").rect, one(page, "#threshold")
    start = handle.rect["x"] + handle.rect["width"] / 2
    way = round(box["x"] + share * box["width"] - start)
    ActionChains(page).click_and_hold(handle).move_by_offset(way, 3).release().perform()
    settle(page)
    return threshold_of(page)


def threshold_of(page) -> float:
    return float(one(page, "#threshold").get_attribute("aria-valuenow"))


def counts(page) -> tuple[int, int]:
    """How many images the page says are flagged, and how many not."""
    return int(one(page, "#flagged").text.replace(",", "")), int(one(page, "#unflagged").text.replace(",", ""))


def shown(page, part: str) -> list[str]:
    """The text of a part of each card that no filter hides."""
    script = "return [...document.querySelectorAll(`.card:not([hidden]) ${arguments[0]}`)].map((e) => e.textContent)"
    return page.execute_script(script, part)


def marks_of(page) -> dict[str, str]:
    """The mark of each marked image by its file's name, by rank."""
    script = """return [...document.querySelectorAll(".card")].filter((card) => card.dataset.mark)
        .sort((one, other) => one.dataset.rank - other.dataset.rank)
        .map((card) => [card.querySelector(".name").textContent, card.dataset.mark])"""
    return dict(page.execute_script(script))
