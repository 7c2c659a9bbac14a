# SPDX-License-Identifier: Apache-2.0
"""One picture for every image of a test or a prediction."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from anomalib_musc.output.files import MirroredFolder, atomic_write
from anomalib_musc.output.picture import SIDE, draw_picture
from anomalib_musc.output.regions import find_regions
from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.high_bit_depth import read_image_file, read_small, to_pixels
from anomalib_musc.pool.loaders import image_paths

_NUM_THREADS = min(4, os.cpu_count() or 1)
_JPEG = {".jpg", ".jpeg"}
_FORMATS = {".png", *_JPEG}  # that every viewer shows; pictures of other files are PNG


class FolderVisualizer(Visualizer):
    """Write one picture for every image, beneath ``images/`` as the images lie beneath their common folder.

    A picture shows the image in its own proportions, the true mask where there is one, the heatmap with the outline of
    the mask, none where the image is normal, and the largest region where it would be too small to be seen; above them
    are file name, score and label. It is no anomalib ``ImageVisualizer``, of which version 2.7.0 names a picture by its
    image's folder and name alone, so that of ``a/x/1.png`` and ``b/x/1.png`` one is overwritten, leaves half a picture
    behind when the disk is full, shows grey images of 16 bits white and takes no notice of EXIF orientation. Here
    images are shown as they were scored.

    Args:
        output_dir: Where to write; by default ``images/`` in the trainer's ``default_root_dir``.

    Attributes:
        pictures: Where the pictures of the last run are, by the path of their image.
        failures: Why there is none.
    """

    def __init__(self, output_dir: str | Path | None = None) -> None:
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.pictures: dict[str, Path] = {}
        self.failures: dict[str, str] = {}
        self._places = MirroredFolder(Path())
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all images lie in."""
        del pl_module
        self._start(trainer, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all images lie in."""
        del pl_module
        self._start(trainer, trainer.predict_dataloaders)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Write the pictures of a batch, beside the loop."""
        del trainer, outputs, args
        pools = getattr(pl_module, "pools", ())
        for item in batch if getattr(pl_module, "writes_results", True) else ():
            path = str(Path(item.image_path))
            grey_range = next((pool.grey_range for pool in pools if path in pool.high_bit_depth), None)
            place = self._places.place(path, "" if Path(path).suffix.lower() in _FORMATS else ".png")
            self._threads = self._threads or ThreadPoolExecutor(_NUM_THREADS, "write pictures")
            self._waiting.append(self._threads.submit(self._write, item, grey_range, path, place))
        while len(self._waiting) > 2 * _NUM_THREADS:  # each holds an image
            self._waiting.popleft().result()

    def _write(self, item: Any, grey_range: GreyRange | None, path: str, place: Path) -> None:
        """Write the picture of an item; in a thread."""
        try:
            picture = _draw(item, grey_range)
            with atomic_write(place) as part:
                picture.save(part, compress_level=1)  # of PNG; a third of the time
        except Exception as error:  # Pillow's decoders raise whatever they like on broken files
            self.failures[path] = f"no picture: {error}"
        else:
            self.pictures[path] = place

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Write the pictures of a batch."""
        self.on_test_batch_end(trainer, pl_module, outputs, batch, *args)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last pictures."""
        del trainer, pl_module
        self.wait()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the last pictures."""
        del trainer, pl_module
        self.wait()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the pictures that are begun, and no others."""
        del trainer, pl_module, exception
        self.wait(is_over=True)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of pictures that could not be written."""
        del trainer, pl_module
        if self.failures:
            path, reason = next(iter(self.failures.items()))
            rank_zero_warn(f"{len(self.failures)} pictures could not be written, such as that of {path}: {reason}")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of pictures that could not be written."""
        self.on_test_end(trainer, pl_module)

    def wait(self, *, is_over: bool = False) -> None:
        """Wait until the pictures so far are written; where the run is over, those that are begun."""
        threads, self._threads, self._waiting = self._threads, None, deque()
        if threads is not None:
            threads.shutdown(cancel_futures=is_over)

    def _start(self, trainer: Trainer, dataloaders: Any) -> None:
        self.pictures, self.failures = {}, {}
        folder = self.output_dir or Path(trainer.default_root_dir) / "images"
        self._places = MirroredFolder(folder, image_paths(dataloaders))


def _draw(item: Any, grey_range: GreyRange | None) -> Image.Image:
    """Draw the picture of one image of a batch; ``grey_range`` is that of images of more than 8 bits."""
    mask = _plane(item.pred_mask)
    if item.pred_label is not None and not bool(item.pred_label):
        mask = None
    image, size = _read(Path(item.image_path), grey_range, is_whole=mask is not None and bool(mask.any()))
    anomaly_map = None if item.anomaly_map is None else item.anomaly_map.squeeze()
    regions = [] if mask is None else find_regions(mask, size)
    return draw_picture(image, _caption(item), anomaly_map, mask, _plane(item.gt_mask), regions)


def _read(path: Path, grey_range: GreyRange | None, *, is_whole: bool) -> tuple[np.ndarray, tuple[int, int]]:
    """Return an image ``(H, W, 3)``, uint8, and its (width, height).

    A JPEG of which no detail will be shown is decoded at a fraction of its size, in a fraction of the time.
    """
    if not is_whole and grey_range is None and path.suffix.lower() in _JPEG:
        with Image.open(path) as image:
            if image.format == "JPEG":
                picture, size = read_small(image, 2 * SIDE)
                return np.asarray(picture.convert("RGB")), size
    file = read_image_file(path)
    return to_pixels(file.scaled(grey_range)), file.size


def _plane(mask: torch.Tensor | None) -> np.ndarray | None:
    """Return a mask as ``(h, w)``."""
    return None if mask is None else mask.detach().cpu().numpy().squeeze()


def caption_of(name: str, score: float | None, label: str, truth: str = "") -> str:
    """Return the line above a picture."""
    parts = [name, *([] if score is None else [f"score {score:.3f}"]), label, truth and f"truth: {truth}"]
    return "  ·  ".join(filter(None, parts))


def _caption(item: Any) -> str:
    score = None if item.pred_score is None else float(item.pred_score)
    labels = (item.pred_label, getattr(item, "gt_label", None))
    words = ["" if label is None else ("anomalous" if bool(label) else "normal") for label in labels]
    return caption_of(Path(item.image_path).name, score, *words)
