# SPDX-License-Identifier: Apache-2.0
"""One image after another, for a service."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anomalib_musc.compat.paths import Listing
from anomalib_musc.compat.quiet import quiet
from anomalib_musc.inference.inputs import as_folder, is_in_memory, to_pillow
from anomalib_musc.inference.predictions import Entry, ImagePrediction
from anomalib_musc.inference.run import device_of, make_model, run
from anomalib_musc.lightning_model import MuSc
from anomalib_musc.output.predictions import Prediction
from anomalib_musc.output.regions import find_regions
from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.high_bit_depth import decode, read_image_file, to_pixels


class Detector:
    """A backbone and a memory bank that stay in memory, and compare one image after another with the bank.

    Several threads may use one: their images take turns.

    Args:
        backbone: See :class:`~anomalib_musc.MuSc`.
        checkpoint: A file that holds a bank, which then needs no :meth:`fit`.
        sensitivity: From 0 to 1; more flags more, 0.5 is the default.
        threshold: On raw scores, distances from 0 to 2, in place of the rule.
        device: "auto", "cpu", "cuda" or "mps".
        **arguments: Further arguments of :class:`~anomalib_musc.MuSc`, such as ``image_size`` and ``bank_size``.

    Raises:
        ValueError: If an argument is out of range, or the checkpoint holds no bank.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        >>> detector = Detector("musc-tiny", image_size=32).fit(images)
        >>> detector.predict(np.zeros((32, 32, 3), np.uint8)).label
        'anomalous'
    """

    def __init__(
        self,
        backbone: Any = None,
        *,
        checkpoint: str | Path | None = None,
        sensitivity: float | None = None,
        threshold: float | None = None,
        device: str = "auto",
        **arguments: Any,
    ) -> None:
        self._device = device_of(device)
        self._name = device
        self._lock = threading.Lock()
        decision = {"image_sensitivity": sensitivity, "image_threshold": threshold}
        mode = {"mode": "reference"} if checkpoint is None else {}
        with quiet():
            self._model: MuSc = make_model(
                backbone, checkpoint, decision, **{"visualizer": False, "prediction_writer": False, **mode, **arguments}
            )
        if checkpoint is not None and not (self._model.mode == "reference" and len(self._model.model.bank)):
            msg = f"checkpoint={str(checkpoint)!r} holds no bank of references; train it with mode='reference'."
            raise ValueError(msg)
        self._make_ready()

    def fit(self, images: Any) -> Detector:
        """Make the bank, and find the threshold from it.

        Args:
            images: Normal or unlabelled images of the product, see :func:`~anomalib_musc.predict`.

        Returns:
            Itself.
        """
        folder, inputs = as_folder(images, "images")
        with self._lock, quiet():
            backbone = self._model.model.backbone
            model = copy.deepcopy(self._model, {id(backbone): backbone})  # the old one stays if this fails
            try:
                model.use_references(folder)
                run(model, replace(inputs, files=Listing(inputs.files[:1])), self._name)  # which makes the bank
                self._model = model
            except ValueError as error:
                raise ValueError(inputs.in_words(str(error))) from error
            finally:
                self._make_ready()
        return self

    def predict(self, image: Any, name: str = "image") -> ImagePrediction:
        """Compare one image with the bank.

        Args:
            image: A file, an array, a tensor or Pillow's, see :func:`~anomalib_musc.predict`.
            name: What to call it; a file is called by its path.

        Raises:
            RuntimeError: If there is no bank yet.
            ValueError: If an array is no image.
        """
        is_file = not is_in_memory(image)
        if is_file and Path(image).is_dir():
            msg = f"image must be one image, got the folder {str(image)!r}; predict(folder) takes one."
            raise ValueError(msg)
        file = read_image_file(Path(image)) if is_file else decode(to_pillow(image, name))
        with self._lock, torch.inference_mode():
            if not len(self._model.model.bank):
                msg = "Call fit(images) first, or give a checkpoint with a bank."
                raise RuntimeError(msg)
            pixels = file.scaled(self._grey_range)
            prepared = pixels[None].to(self._device)
            raw = self._model.model(prepared if self._model.transform is None else self._model.transform(prepared))
            found = raw if self._model.post_processor is None else self._model.post_processor(raw)
        anomaly_map, mask = found.anomaly_map.squeeze().float().cpu(), getattr(found, "pred_mask", None)
        mask = None if mask is None else mask.squeeze().cpu().numpy()
        label = getattr(found, "pred_label", None)
        is_anomalous = None if label is None else bool(label)
        known = Prediction(str(image) if is_file else name, found.pred_score.item(), is_anomalous, size=file.size)
        entry = Entry(known, Path(image) if is_file else None, anomaly_map, mask, pixels=to_pixels(pixels))
        regions = find_regions(mask, file.size) if is_anomalous and mask is not None else []
        return ImagePrediction(known.path, known.score, known.label, regions, raw.pred_score.item(), (), entry)

    @property
    def _grey_range(self) -> GreyRange | None:
        of_bank = self._model.model.bank.grey_range
        return None if of_bank is None else GreyRange(*of_bank)

    def _make_ready(self) -> None:
        self._model.eval().to(self._device)
