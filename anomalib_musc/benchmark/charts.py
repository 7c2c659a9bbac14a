# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, pure functions of numbers. Colours are classes of report.css, one a model in all charts."""

from collections.abc import Mapping
from html import escape

import numpy as np

_WIDTH = 360
_BINS = 24
_COLOURS = 8
_DASHES = ("none", "7 3", "2 3")  # 8 colours and 3 kinds of line make 24 models distinct


def key_of(number: int) -> str:
    """Return the line that stands for the model with this number in legends."""
    return (
        '<svg class="key" viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">'
        f'<path {_line_of(number)} d="M0 5H28"/></svg>'
    )


def bars(title: str, values: Mapping[str, float], numbers: Mapping[str, int]) -> str:
    """Draw a bar a model, from 0 to 100 %.

    Args:
        title: What the bars show.
        values: Fractions by the names of models; others than finite ones are left out.
        numbers: The models' numbers, which decide their colours.

    Example:
        >>> chart = bars("image AUROC", {"A": 0.978, "B": float("nan")}, {"A": 0, "B": 1})
        >>> chart.count('class="bar'), "97.8" in chart, "nan" in chart
        (1, True, False)
    """
    step, full = 36, 312
    shown = {name: round(value, 3) for name, value in values.items() if np.isfinite(value)}
    parts = []
    for top, (name, value) in zip(range(0, step * len(shown), step), shown.items(), strict=True):
        place = f'x="0" y="{top + 18}" height="12"'
        parts += [
            f'<text x="0" y="{top + 12}">{escape(_shorten(name))}</text>',
            f'<rect class="track" {place} width="{full}"/>',
            f'<rect class="bar {_colour_of(numbers[name])}" {place} width="{full * value:.1f}"/>',
            f'<text x="{_WIDTH}" y="{top + 29}" text-anchor="end">{100 * value:.1f}</text>',
        ]
    spoken = ", ".join(f"{name} {100 * value:.1f}" for name, value in shown.items())
    return _svg(f"{title} in percent: {spoken}", step * len(shown), parts)


def histogram(title: str, scores: np.ndarray, labels: np.ndarray, number: int) -> str:
    """Draw how image scores are distributed: normal images upwards, anomalous ones downwards.

    Args:
        title: Whose scores they are.
        scores: Shape ``(N,)``; others than finite ones are left out.
        labels: 1 where anomalous, shape ``(N,)``.
        number: The model's, which decides its colour.

    Example:
        >>> chart = histogram("A", np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1]), 0)
        >>> chart.count('class="normal"'), chart.count('class="bar model-0"')
        (2, 1)
    """
    finite = np.isfinite(scores)
    scores, labels = scores[finite].astype(float), labels[finite]
    low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 0.0)
    edges = np.linspace(low, high, _BINS + 1) if high > low else np.linspace(low - 0.5, low + 0.5, _BINS + 1)
    counts = [np.histogram(scores[labels == label], edges)[0] for label in (0, 1)]
    tall, middle, wide = 62, 78, _WIDTH / _BINS
    scale = tall / max(1, *counts[0], *counts[1])
    parts = [f'<path class="axis" d="M0 {middle}H{_WIDTH}"/>']
    for kind, shape in enumerate(("normal", f"bar {_colour_of(number)}")):
        for place in np.flatnonzero(counts[kind]):
            height = counts[kind][place] * scale
            parts.append(
                f'<rect class="{shape}" x="{place * wide + 0.5:g}" y="{middle if kind else middle - height:.1f}" '
                f'width="{wide - 1:g}" height="{height:.1f}"/>'
            )
    texts = [f"{int(counts[0].sum())} normal", f"{int(counts[1].sum())} anomalous"]
    left, right = f"{edges[0]:.3g}", f"{edges[-1]:.3g}"
    parts += [
        f'<text x="0" y="12">&#8593; {texts[0]}</text><text x="0" y="152">&#8595; {texts[1]}</text>',
        f'<text x="0" y="172">{left}</text><text x="{_WIDTH / 2}" y="172" text-anchor="middle">image score</text>',
        f'<text x="{_WIDTH}" y="172" text-anchor="end">{right}</text>',
    ]
    return _svg(f"Image scores of {title}: {' and '.join(texts)} images from {left} to {right}", 178, parts)


def curves(
    title: str,
    axes: tuple[str, str],
    lines: Mapping[str, np.ndarray],
    numbers: Mapping[str, int],
    longest: float = 1.0,
) -> str:
    """Draw a curve a model; the vertical axis ends at 1.

    Args:
        title: What the curves are.
        axes: What the horizontal and the vertical axis show, as HTML.
        lines: Points ``(2, K)`` by the names of models.
        numbers: The models' numbers, which decide their colours and dashes.
        longest: Where the horizontal axis ends.

    Example:
        >>> chart = curves("ROC", ("false", "true"), {"A": np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]])}, {"A": 0})
        >>> 'd="M44 256L44 10L348 10"' in chart
        True
    """
    left, top, right, bottom = 44, 10, 348, 256
    parts = []
    for tick in np.arange(0, longest + 1e-9, 0.2 if longest > 0.5 else 0.1):
        x = left + (right - left) * tick / longest
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.1f}</text>')
    for tick in np.arange(0, 1.1, 0.2):
        y = bottom - (bottom - top) * tick
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    parts += [
        f'<text x="{(left + right) / 2}" y="292" text-anchor="middle">{axes[0]}</text>',
        f'<text transform="translate(12 {(top + bottom) / 2})rotate(-90)" text-anchor="middle">{axes[1]}</text>',
    ]
    for name in sorted(lines, key=lambda name: numbers[name] % len(_DASHES)):  # so that no full line hides a dashed one
        across, up = lines[name][:, np.isfinite(lines[name]).all(axis=0)].astype(float)
        x = left + (right - left) * across.clip(0, longest) / longest
        y = bottom - (bottom - top) * up.clip(0, 1)
        parts.append(f'<path {_line_of(numbers[name])} d="{_path(x, y)}"/>')
    return _svg(f"{title} of {', '.join(lines)}", 300, parts)


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Return false and true positive rates at all thresholds, ``None`` where there is no such curve.

    Args:
        scores: Shape ``(N,)``.
        labels: 1 where anomalous, shape ``(N,)``.

    Returns:
        Shape ``(2, K)`` from (0, 0) to (1, 1), or ``None`` unless there are scores of both kinds and none is NaN.

    Example:
        >>> roc_curve(np.array([0.1, 0.7, 0.7, 0.9]), np.array([0, 0, 1, 1])).tolist()
        [[0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0]]
    """
    if np.isnan(scores).any() or len(np.unique(labels)) < 2:
        return None
    order = np.argsort(-scores, kind="stable")
    last_of_its_score = np.append(np.diff(scores[order]) != 0, True)
    is_anomalous = labels[order] == 1
    rates = [np.cumsum(kind)[last_of_its_score] / kind.sum() for kind in (~is_anomalous, is_anomalous)]
    return np.concatenate([np.zeros((2, 1)), rates], axis=1)


def _colour_of(number: int) -> str:
    return f"model-{number % _COLOURS}"


def _line_of(number: int) -> str:
    return f'class="line {_colour_of(number)}" stroke-dasharray="{_DASHES[number % len(_DASHES)]}"'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Join points, to half a pixel; those that fall on the one before are dropped."""
    points = np.round(2 * np.stack([x, y], axis=1)) / 2
    moved = np.append(True, (np.diff(points, axis=0) != 0).any(axis=1))[: len(points)]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points[moved]) if len(points) else ""


def _shorten(name: str, most: int = 46) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _svg(spoken: str, height: int, parts: list[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(parts)}</svg>"
    )
