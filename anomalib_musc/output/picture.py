# SPDX-License-Identifier: Apache-2.0
"""One picture of an image and what was found in it."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from anomalib.visualization.image.functional import visualize_anomaly_map
from PIL import Image, ImageDraw

from anomalib_musc.output.files import printable
from anomalib_musc.output.fonts import legible
from anomalib_musc.output.regions import Region

SIDE = 512  # pixels of a panel's longer side
_MOST_ENLARGED = 4
_SEEN = 12  # pixels below which a region is shown enlarged, too
_OPACITY = 0.45  # of the heatmap
_TEXT, _MARGIN = 18, 8
_NARROWEST = 160  # of a panel's column, in which its name and half of a caption can be read
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)

Colour = tuple[int, int, int]


def draw_picture(
    image: np.ndarray,
    caption: str,
    anomaly_map: torch.Tensor | None = None,
    mask: np.ndarray | None = None,
    true_mask: np.ndarray | None = None,
    regions: Sequence[Region] = (),
) -> Image.Image:
    """Draw panels side by side: image, outline of the true mask, heatmap with the mask's outline, largest region.

    Panels have the image's proportions. The largest region is shown enlarged where it is under 12 pixels wide or high.

    Args:
        image: RGB, shape ``(H, W, 3)``, uint8.
        caption: What stands above.
        anomaly_map: Shape ``(h, w)``, shown from 0 to 1.
        mask: Shape ``(h, w)``; nothing is outlined where it is empty.
        true_mask: Likewise.
        regions: Of the mask, in pixels of the image, the largest first.

    Example:
        >>> draw_picture(np.zeros((30, 40, 3), np.uint8), "bolt.png").size
        (176, 180)
    """
    height, width = image.shape[:2]
    scale = min(SIDE / max(height, width), _MOST_ENLARGED)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    plain = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    panels = {"image": plain}
    if true_mask is not None:
        panels["true mask"] = _outlined(plain, true_mask)
    if anomaly_map is not None:
        panels["heatmap"] = _outlined(_heated(plain, anomaly_map), mask)
    if regions and min(regions[0].width, regions[0].height) * scale < _SEEN:
        panels["largest region"] = _enlarged(image, regions[0], size)
    return _joined(panels, caption, size)


def _heated(image: np.ndarray, anomaly_map: torch.Tensor) -> np.ndarray:
    values = cv2.resize(anomaly_map.detach().float().cpu().numpy(), image.shape[1::-1])
    colours = visualize_anomaly_map(torch.from_numpy(values).clamp(0, 1), colormap=True, normalize=False)
    return cv2.addWeighted(image, 1 - _OPACITY, np.asarray(colours.convert("RGB")), _OPACITY, 0)


def _outlined(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is None or not mask.any():
        return image
    whole = cv2.resize((mask != 0).astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(whole, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    outlined = image.copy()
    for colour, thickness in ((_INK, 4), (_PAPER, 2)):  # seen on dark and on bright images
        cv2.drawContours(outlined, contours, -1, colour, thickness, cv2.LINE_AA)
    return outlined


def _enlarged(image: np.ndarray, region: Region, size: tuple[int, int]) -> np.ndarray:
    """Cut a region out, with as much again around it, in a panel's proportions."""
    width, height = size
    factor = max(3 * region.width / width, 3 * region.height / height, 1 / (4 * _MOST_ENLARGED))
    cut_width = max(1, min(round(width * factor), image.shape[1]))
    cut_height = max(1, min(round(height * factor), image.shape[0]))
    left = int(np.clip(region.x + (region.width - cut_width) // 2, 0, image.shape[1] - cut_width))
    upper = int(np.clip(region.y + (region.height - cut_height) // 2, 0, image.shape[0] - cut_height))
    cut = image[upper : upper + cut_height, left : left + cut_width]
    return cv2.resize(cut, (width, height), interpolation=cv2.INTER_CUBIC)


def _joined(panels: dict[str, np.ndarray], caption: str, size: tuple[int, int]) -> Image.Image:
    """Put panels beside each other, each beneath its name, and the caption above them all."""
    width, height = size
    top = _MARGIN + 2 * (_TEXT + _MARGIN // 2)
    column = max(width, _NARROWEST)  # of a panel and its name
    canvas = Image.new("RGB", (_MARGIN + len(panels) * (column + _MARGIN), top + height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_MARGIN, _MARGIN), caption, canvas.width - 2 * _MARGIN, _INK)
    for index, (name, panel) in enumerate(panels.items()):
        left = _MARGIN + index * (column + _MARGIN)
        _write(draw, (left, top - _TEXT), name, column, _FAINT)
        canvas.paste(Image.fromarray(panel), (left, top))
    return canvas


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: float, ink: Colour) -> None:
    """Write a text, shortened in its beginning to a width, as a path's end tells more."""
    shown, font = legible(printable(text), _TEXT - 4)
    fitted = shown
    while shown and font.getlength(fitted) > width:
        shown = shown[1 + len(shown) // 20 :]
        fitted = f"…{shown}"
    draw.text(place, fitted, ink, font)
