# SPDX-License-Identifier: Apache-2.0
"""The images on which models disagree, side by side: image, true mask, and each model's heatmap and rank."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from anomalib_musc.benchmark.charts import key_of
from anomalib_musc.benchmark.records import Predictions
from anomalib_musc.benchmark.summary import with_rscin

MOST_IMAGES = 12
_SIDE = 144
_QUALITY = 70


class Ranking(NamedTuple):
    """Image scores of a row of the tables, and the predictions that they are of."""

    model: str
    scores: np.ndarray
    predictions: Predictions


def rankings_of(model: str, predictions: Predictions) -> list[Ranking]:
    """Return a model's ranking and, where it has one, that of its second row "+ RsCIN"."""
    first = Ranking(model, predictions.scores, predictions)
    if predictions.rescored is None:
        return [first]
    return [first, Ranking(with_rscin(model), predictions.rescored, predictions)]


def percentiles(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of the images of the other class that each one is more anomalous than; equal ones count by half.

    How normal images are ranked among themselves is chance. With one class only, the share is of all images.

    Args:
        scores: Shape ``(N,)``.
        labels: 1 where anomalous, shape ``(N,)``.

    Returns:
        Shape ``(N,)``, from 0 to 1, NaN where a score is.

    Example:
        >>> percentiles(np.array([0.3, 0.1, 0.3, 0.8]), np.array([0, 0, 1, 1])).tolist()
        [0.25, 0.0, 0.75, 1.0]
    """
    shares = np.full(len(scores), np.nan)
    for label in (0, 1):
        here, others = labels == label, (labels != label) & ~np.isnan(scores)
        others = others if others.any() else ~np.isnan(scores)
        ordered = np.sort(scores[others])
        beneath = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
        shares[here] = beneath[here] / 2 / max(1, len(ordered))
    return np.where(np.isnan(scores), np.nan, shares)


def by_disagreement(rankings: Sequence[Ranking]) -> list[str]:
    """Return the paths of all images, those first whose percentiles differ most between rankings.

    With a single ranking, the most anomalous come first.

    Example:
        >>> def ranking(scores):
        ...     return Ranking("A", np.array(scores), Predictions(["a", "b", "c"], np.zeros(3), np.array(scores)))
        >>> by_disagreement([ranking([1, 2, 3]), ranking([1, 3, 2])])
        ['b', 'c', 'a']
        >>> by_disagreement([ranking([1, 2, 3])])
        ['c', 'b', 'a']
    """
    places: dict[str, list[float]] = {}
    for ranking in rankings:
        for path, place in zip(
            ranking.predictions.paths, percentiles(ranking.scores, ranking.predictions.labels).tolist(), strict=True
        ):
            places.setdefault(path, []).extend([] if np.isnan(place) else [place])
    if len(rankings) == 1:
        return sorted(places, key=lambda path: (-max(places[path], default=-1), path))
    return sorted(places, key=lambda path: (min(places[path], default=0) - max(places[path], default=0), path))


def gallery(rankings: Sequence[Ranking], numbers: Mapping[str, int]) -> str:
    """Return the gallery of a category.

    Args:
        rankings: Of its models, those of the same predictions together.
        numbers: The models' numbers, which decide their colours.
    """
    columns: dict[int, list[Ranking]] = {}
    for ranking in rankings:
        columns.setdefault(id(ranking.predictions), []).append(ranking)
    paths = by_disagreement(rankings)
    shown = paths[:MOST_IMAGES]
    heads = "".join(f'<th scope="col">{_names(column, numbers)}</th>' for column in columns.values())
    rows = "".join(_row(path, list(columns.values())) for path in shown)
    return (
        f"<p>{_order(len(shown), len(paths), len(rankings))} Rank 1 is the most anomalous image. Each heatmap spans "
        'what 99 % of its model\'s values on this category do: low <span class="ramp"></span> high.</p>'
        '<div class="scroll" role="region" aria-label="Gallery" tabindex="0"><table class="gallery">'
        f'<thead><tr><th scope="col">image</th><th scope="col">true mask</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _order(num_shown: int, num_images: int, num_rankings: int) -> str:
    images = f"{num_shown} of {num_images} images" if num_shown < num_images else f"All {num_images} images"
    if num_rankings == 1:
        return f"{images}, the most anomalous first, as there is only one model."
    return (
        f"{images}, in the order of disagreement: the further apart the models rank a normal image among the anomalous "
        "ones, or an anomalous one among the normal, the earlier it comes."
    )


def _names(column: list[Ranking], numbers: Mapping[str, int]) -> str:
    names = (column[0].model, "+ RsCIN")
    keys = (f"{key_of(numbers[each.model])} {escape(name)}" for each, name in zip(column, names, strict=False))
    return "<br>".join(keys)


def _row(path: str, columns: list[list[Ranking]]) -> str:
    """Return the row of an image; models that have not seen it show a dash."""
    thumbnail = _thumbnail(Path(path))
    size = thumbnail.size if thumbnail is not None else (_SIDE, _SIDE)
    name = escape("/".join(PurePath(path).parts[-2:]))
    picture = '<span class="absent">the image is gone</span>'
    if thumbnail is not None:
        picture = _img(thumbnail, f"image {name}", size)
    mask, label, cells = "&ndash;", "", []
    for column in columns:
        predictions = column[0].predictions
        if path not in predictions.paths:
            cells.append("<td>&ndash;</td>")
            continue
        index = predictions.paths.index(path)
        label = "anomalous" if predictions.labels[index] == 1 else "normal"
        if predictions.masks is not None:
            mask = _img(Image.fromarray(predictions.masks[index] != 0), f"true mask of {name}", size)
        cells.append(f"<td>{_heatmap(column[0], index, name, size)}{_ranks(column, index)}</td>")
    return (
        f'<tr><th scope="row">{picture}<span class="name">{name}</span> <span class="name {label}">{label}</span></th>'
        f"<td>{mask}</td>{''.join(cells)}</tr>"
    )


def _heatmap(ranking: Ranking, index: int, name: str, size: tuple[int, int]) -> str:
    if ranking.predictions.maps is None:
        return "&ndash;"
    colours = cv2.applyColorMap(ranking.predictions.maps[index], cv2.COLORMAP_INFERNO)[..., ::-1]
    heatmap = Image.fromarray(np.ascontiguousarray(colours))
    heatmap.thumbnail((_SIDE, _SIDE))
    return _img(heatmap, f"heatmap of {escape(ranking.model)} for {name}", size)


def _ranks(column: list[Ranking], index: int) -> str:
    lines = ""
    for ranking, name in zip(column, ("rank", "+ RsCIN"), strict=False):
        score, scores = ranking.scores[index], ranking.scores[~np.isnan(ranking.scores)]
        rank = "&ndash;" if np.isnan(score) else f"{1 + (scores > score).sum()} of {len(scores)}"
        lines += f'<span class="name">{name} {rank}</span>'
    return lines


def _thumbnail(path: Path) -> Image.Image | None:
    """Read an image, small; ``None`` where it cannot be read any more."""
    try:
        with Image.open(path) as image:
            if image.mode in {"I", "F"} or image.mode.startswith("I;16"):  # grey of more than 8 bits
                values = np.nan_to_num(np.asarray(image, dtype=np.float32))
                small = Image.fromarray((255 * values.clip(0) / max(1e-9, values.max())).astype(np.uint8)).convert(
                    "RGB"
                )
            else:
                small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((_SIDE, _SIDE))
    return small


def _img(image: Image.Image, alt: str, size: tuple[int, int]) -> str:
    """Return an image within the page, shown at a size; ``alt`` is escaped already."""
    kind = "png" if image.mode == "1" else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, quality=_QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{alt}" width="{size[0]}" height="{size[1]}" loading="lazy">'
    )
