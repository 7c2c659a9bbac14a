# SPDX-License-Identifier: Apache-2.0
"""Write the review page: the template with a pool's scores, pictures and maps, and the scripts that show them."""

from __future__ import annotations

import os
import statistics
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from anomalib_musc.output.files import atomic_write, printable
from anomalib_musc.output.review.pictures import MAX_GRID, picture_of, quantise, shrink
from anomalib_musc.output.review.records import Card, Review

CARDS_PER_PAGE = 2000
NUM_SIMILAR = 3
SOURCE = Path(__file__).parent / "page"
SCRIPTS = ("pool", "statistics", "drawing", "histogram", "cards", "detail", "summary", "exports", "keys")


@dataclass(frozen=True)
class _Slot:
    """What the page holds of one card: attributes of the element whose text is its JPEG, in base64."""

    rank: int
    jpeg: str
    attributes: dict[str, str]


def write_review(path: Path, review: Review) -> list[Path]:
    """Write a page on which a person reviews a pool's predictions.

    Each page is one file that needs no network: thumbnails are JPEGs and maps small grids within it. Marks are kept in
    the browser's local storage, under a key of this very writing. From 2,001 images on there are several pages, in
    order of rank: ``review.html``, ``review_2.html``, and so on; pages of an earlier, larger pool are removed.

    Args:
        path: The first page; its folder is created if need be.
        review: The pool.

    Returns:
        The pages.

    Raises:
        ValueError: If the pool has no card.
        OSError: If a page cannot be written.

    Example:
        >>> import numpy as np
        >>> card = Card("bolts/1.png", 0.7, np.array([[0.1, 0.7]]), image=np.zeros((60, 80, 3), np.uint8))
        >>> review = Review([card], threshold=0.5, rule="Anomalous is what scores above 0.5.", name="bolts")
        >>> write_review(Path("review.html"), review)  # doctest: +SKIP
        [PosixPath('review.html')]
    """
    if not review.cards:
        msg = "cards must hold at least one image, got none."
        raise ValueError(msg)
    order = sorted(range(len(review.cards)), key=lambda index: -review.cards[index].score)
    ranks = {index: rank for rank, index in enumerate(order)}
    cards = [review.cards[index] for index in order]
    similar = [[ranks[other] for other in card.similar[:NUM_SIMILAR]] for card in cards]
    starts = range(0, len(cards), CARDS_PER_PAGE)
    targets = [path if not page else _numbered(path, page + 1) for page in range(len(starts))]
    groups = [[printable(text), sorted(ranks[index] for index in members)] for text, members in review.groups]
    pool = _pool(review, cards) | {"groups": groups, "pages": [quote(os.fsencode(target.name)) for target in targets]}
    for page, (target, start) in enumerate(zip(targets, starts, strict=True)):
        shown = range(start, min(start + CARDS_PER_PAGE, len(cards)))
        slots = [_slot(rank, cards[rank], similar[rank]) for rank in shown]
        others = sorted({other for rank in shown for other in similar[rank]} - set(shown))
        box = statistics.median(width / height for width, height in (_size(slot) for slot in slots))
        here = {"page": page, "first": shown.start, "last": shown.stop - 1, "box": min(max(box, 0.6), 1.8)}
        _write(target, pool | here, slots, ((rank, _base64(shrink(picture_of(cards[rank]).jpeg))) for rank in others))
    number = len(targets) + 1
    while (stale := _numbered(path, number)).exists():
        stale.unlink()
        number += 1
    return targets


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}_{number}{path.suffix}")


def _write(target: Path, pool: dict[str, Any], slots: Sequence[_Slot], others: Iterator[tuple[int, str]]) -> None:
    environment = Environment(
        loader=FileSystemLoader(SOURCE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [(SOURCE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    style = (SOURCE / "style.css").read_text(encoding="utf-8")
    template = environment.get_template("page.html.jinja")
    parts = template.generate(
        pool=pool, slots=slots, others=others, style=style, script="\n".join(scripts), nonce=uuid4().hex
    )
    with atomic_write(target) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(parts)


def _pool(review: Review, cards: Sequence[Card]) -> dict[str, Any]:
    """Return what every page knows of the whole pool, in the order of rank."""
    root, absolute_root, names = _relative([str(card.path) for card in cards])
    low, high = review.map_range or _map_range(cards)
    return {
        "run": uuid4().hex,
        "name": printable(review.name),
        "threshold": float(review.threshold),
        "rule": printable(review.rule),
        "argument": review.argument,
        "argumentScale": [float(value) for value in review.argument_scale],
        "regionFraction": float(review.region_fraction),
        "pixelThreshold": review.pixel_threshold,
        "mapRange": [float(low), float(high)],
        "warnings": [printable(warning) for warning in review.warnings],
        "skipped": [[printable(path), printable(reason)] for path, reason in review.skipped.items()],
        "separator": os.sep,
        "root": printable(root),
        "absoluteRoot": printable(absolute_root),
        "names": [printable(name) for name in names],
        # without a name, or one that UTF-8 and so a list of files cannot hold
        "unlisted": [rank for rank, name in enumerate(names) if not name or not _is_text(absolute_root + name)],
        "scores": [float(card.score) for card in cards],
    }


def _slot(rank: int, card: Card, similar: Sequence[int]) -> _Slot:
    picture = picture_of(card)
    grid, low, high = quantise(card.anomaly_map)
    regions = [[region.x, region.y, region.width, region.height, region.area] for region in card.regions]
    attributes = {
        "size": "{} {}".format(*picture.size),
        "grid": "{} {}".format(*grid.shape),
        "range": f"{low!r} {high!r}",
        "map": _base64(grid.tobytes()),
        "similar": " ".join(map(str, similar)),
        "regions": " ".join(str(number) for region in regions for number in region),
        "note": printable(card.note),
        "uri": picture.uri,
    }
    return _Slot(rank, _base64(picture.jpeg), attributes)


def _size(slot: _Slot) -> tuple[int, int]:
    width, height = slot.attributes["size"].split()
    return int(width), int(height)


def _relative(paths: Sequence[str]) -> tuple[str, str, list[str]]:
    """Return the common folder as the paths begin, with its separator; the same, absolute; and the paths from there."""
    named = [path for path in paths if path]
    try:
        common = os.path.commonpath([os.path.dirname(path) for path in named])  # noqa: PTH120  # Path turns "" to "."
    except ValueError:  # on several drives, or not all absolute
        return "", "", [os.path.abspath(path) if path else "" for path in paths]  # noqa: PTH100
    root, absolute = (os.path.join(folder, "") for folder in (common, os.path.abspath(common)))  # noqa: PTH118, PTH100
    names = [path[len(root) :] if path[: len(root)] in {"", root} else os.path.relpath(path, root) for path in paths]
    return root, absolute, names


def _map_range(cards: Sequence[Card]) -> tuple[float, float]:
    """Return the median and the maximum over all maps."""
    samples = [card.anomaly_map.ravel()[:: 1 + card.anomaly_map.size // MAX_GRID**2] for card in cards]
    return float(np.median(np.concatenate(samples))), float(max(card.anomaly_map.max() for card in cards))


def _is_text(text: str) -> bool:
    return printable(text) == text


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
