# SPDX-License-Identifier: Apache-2.0
"""The backbone's run over what a reader gives, with a progress bar."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from anomalib_musc.compat.progress import profile, profiled, progress_bar
from anomalib_musc.pool.checks import check_input_size, in_words
from anomalib_musc.pool.reader import PoolReader
from anomalib_musc.torch_model import MuScModel

_LONG = 60  # seconds of extraction from which on its length is said


class Features(NamedTuple):
    """What the backbone gave for a batch: names, one map ``(B, C, h, w)`` a layer, class tokens ``(B, D)``."""

    names: list[str]
    feature_maps: list[torch.Tensor]
    class_tokens: torch.Tensor


def extract(
    trainer: Trainer,
    model: MuScModel,
    reader: PoolReader,
    num_images: int | None,
    description: str = "MuSc: extracting features",
) -> Iterator[Features]:
    """Run the backbone on what a reader gives.

    Args:
        trainer: The trainer, whose precision, progress bar and profiler are used.
        model: The model.
        reader: Gives the images.
        num_images: How many they are, with those that will be left out; ``None`` if unknown.
        description: What the progress bar says.
    """
    total = float("inf") if num_images is None else num_images
    skipped, num_skipped, is_first = reader.findings.skipped, 0, True
    with progress_bar(trainer, description, total) as advance:
        for names, images in profiled(trainer, "[MuSc]read_images", reader.batches()):
            check_input_size(images, model.image_size)
            start = time.perf_counter()
            with trainer.precision_plugin.forward_context(), profile(trainer, "[MuSc]extract"):
                feature_maps, class_tokens = model.extract(images)
            if is_first:
                seconds = (time.perf_counter() - start) * (total / len(names) - 1)
                is_first = False
                _say_how_long(trainer, model, seconds, images)
            yield Features(names, feature_maps, class_tokens)
            advance(len(names) + len(skipped) - num_skipped)
            num_skipped = len(skipped)
        advance(len(skipped) - num_skipped)


def _say_how_long(trainer: Trainer, model: MuScModel, seconds: float, images: torch.Tensor) -> None:
    """Say how long an extraction will take, where it is long, and whether "fast" precision would help."""
    if not _LONG <= seconds < float("inf"):
        return
    text = f"Extracting the other features will take about {in_words(seconds)} on {images.device}."
    if model.precision == "exact":
        with trainer.precision_plugin.forward_context():
            gain = model.gain_of_half_precision(images)
        if gain > 1:
            text += f" precision='fast' (--fast) would take {1 / gain:.0%} of that."
    rank_zero_info(text)
