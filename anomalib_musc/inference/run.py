# SPDX-License-Identifier: Apache-2.0
"""Predictions of images by anomalib's Engine, in one call."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine

from anomalib_musc.compat.quiet import quiet
from anomalib_musc.inference.inputs import Inputs, as_folder, gather
from anomalib_musc.inference.predictions import Predictions
from anomalib_musc.lightning_model import MuSc
from anomalib_musc.pool.checks import MIN_IMAGES
from anomalib_musc.pool.large_images import common_size
from anomalib_musc.post_processor import RsCINPostProcessor

_ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "gpu": "gpu", "mps": "mps"}


def predict(
    images: Any,
    backbone: Any = None,
    *,
    references: Any = None,
    checkpoint: str | Path | None = None,
    sensitivity: float | None = None,
    contamination: float | None = None,
    threshold: float | None = None,
    device: str = "auto",
    progress: bool = False,
    **arguments: Any,
) -> Predictions:
    """Find defects in unlabelled images of one product, by anomalib's Engine.

    Args:
        images: A folder; or paths, Pillow images, NumPy arrays or torch tensors, mixed if need be, as a sequence or
            as a mapping from names; or a batch of arrays or tensors. See
            :func:`~anomalib_musc.inference.inputs.to_pillow` for their shapes and ranges. At least two, or one with
            references or a checkpoint that holds a bank.
        backbone: See :class:`~anomalib_musc.MuSc`; by default its own, or the checkpoint's.
        references: Normal or unlabelled images, given likewise, with which the images are compared instead of with
            each other.
        checkpoint: A file of ``Engine.train`` or ``Engine.fit``.
        sensitivity: From 0 to 1; more flags more, 0.5 is the default.
        contamination: The expected share of anomalous images, in place of the rule.
        threshold: On raw scores, distances from 0 to 2, in place of the rule.
        device: "auto", "cpu", "cuda" or "mps".
        progress: Whether to show progress bars.
        **arguments: Further arguments of :class:`~anomalib_musc.MuSc`, such as ``image_size`` and ``precision``. With
            ``tile_size`` alone, images are compared at the size that most of them have.

    Returns:
        One prediction an image, in their order.

    Raises:
        ValueError: If an argument is out of range or an array is no image.
        FileNotFoundError: If there is no such file.
        WeightsUnavailableError: If the backbone's weights can neither be found nor downloaded.

    Example:
        >>> import numpy as np
        >>> images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
        >>> images[3, 8:24, 8:24] = 0
        >>> int(predict(images, "musc-tiny", image_size=32).scores.argmax())
        3
    """
    inputs = gather(images)
    arguments = with_common_size(arguments, inputs, checkpoint)
    check_number(inputs, is_alone=references is None and checkpoint is None)
    decision = {"image_sensitivity": sensitivity, "contamination": contamination, "image_threshold": threshold}
    with bank_folder(references) as folder, quiet() as warned:
        more = {} if folder is None else {"references": str(folder), "mode": arguments.pop("mode", "reference")}
        arguments = {"visualizer": False, "prediction_writer": False, **more, **arguments}
        predictions = run(make_model(backbone, checkpoint, decision, **arguments), inputs, device, progress=progress)
    for text in warned:
        warnings.warn(inputs.in_words(text), stacklevel=2)
    return predictions


def check_number(inputs: Inputs, *, is_alone: bool) -> None:
    """Raise a ValueError where a single image has nothing to be compared with."""
    if is_alone and len(inputs.files) < MIN_IMAGES:
        msg = (
            f"images must be at least {MIN_IMAGES} of one product, which are compared; got 1 ({inputs.items[0][1]}). "
            "Add unlabelled images of it, or give references, or a checkpoint with a bank."
        )
        raise ValueError(msg)


def with_common_size(arguments: Mapping[str, Any], inputs: Inputs, checkpoint: object) -> dict[str, Any]:
    """Return arguments in which images that are cut into tiles have a size: that of most of them, if none is given."""
    is_open = arguments.get("tile_size") is not None and arguments.get("image_size") is None and checkpoint is None
    return {**arguments, "image_size": common_size(inputs.files)} if is_open else dict(arguments)


def make_model(backbone: Any, checkpoint: str | Path | None, decision: Mapping[str, Any], **arguments: Any) -> MuSc:
    """Return the model; arguments and parts of the decision that are ``None`` are not given."""
    given = {name: value for name, value in {"backbone": backbone, **arguments}.items() if value is not None}
    chosen = {name: value for name, value in decision.items() if value is not None}
    if chosen:
        if given.get("post_processor", True) is not True:
            msg = f"{', '.join(chosen)} are for the default post-processor; give them to yours, or leave it out."
            raise ValueError(msg)
        given["post_processor"] = RsCINPostProcessor(**chosen)
    if checkpoint is None:
        return MuSc(**given)
    if not Path(checkpoint).is_file():
        msg = f"checkpoint={str(checkpoint)!r}: there is no such file."
        raise FileNotFoundError(msg)
    model: MuSc = MuSc.load_from_checkpoint(checkpoint, map_location="cpu", **given)
    return model


def run(model: MuSc, inputs: Inputs, device: str = "auto", *, progress: bool = False) -> Predictions:
    """Predict images by an Engine that writes nothing."""
    with tempfile.TemporaryDirectory(prefix="anomalib_musc_") as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator=accelerator_of(device),
            devices=1,  # Lightning takes all, and starts the caller's program once for each
            logger=False,
            enable_progress_bar=progress,
        )
        batches = engine.predict(model, dataset=inputs.dataset)
    return Predictions.from_engine(batches or (), model, inputs)


def accelerator_of(device: str) -> str:
    """Return Lightning's name of a device."""
    if device not in _ACCELERATORS:
        msg = f"device must be one of {', '.join(map(repr, _ACCELERATORS))}, got {device!r}."
        raise ValueError(msg)
    found = _ACCELERATORS[device]
    is_missing = {"gpu": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if is_missing.get(found):
        msg = f"device={device!r}: this machine has none, or this torch cannot use it; 'auto' takes what there is."
        raise ValueError(msg)
    return found


def device_of(device: str) -> torch.device:
    """Return torch's device of a name."""
    accelerator = accelerator_of(device)
    if accelerator == "auto":
        found = "cuda" if torch.cuda.is_available() else ("mps" if torch.backends.mps.is_available() else "cpu")
        return torch.device(found)
    return torch.device("cuda" if accelerator == "gpu" else accelerator)


@contextmanager
def bank_folder(references: Any) -> Iterator[Path | None]:
    """Yield a folder that holds references, as long as it is needed."""
    if references is None:
        yield None
        return
    folder, inputs = as_folder(references, "references")
    try:
        yield folder
    finally:
        if inputs.folder is not None:
            inputs.folder.cleanup()
