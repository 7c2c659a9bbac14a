# SPDX-License-Identifier: Apache-2.0
"""Thresholds of version 0.1, whose re-scored image scores were relative to the extremes of their pool or bank."""

from collections.abc import Collection, MutableMapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from anomalib_musc.functional import reference_scale
from anomalib_musc.post_processor import RsCINPostProcessor

_IMAGE_LEVEL = ("_image_threshold", "image_min", "image_max")


def convert_checkpoint(checkpoint: MutableMapping[str, Any]) -> None:
    """Bring the image scores' range and threshold of an old checkpoint to distances, in place; others stay.

    A bank says what its scores were relative to. A validation pool's extremes are not in the file, so that its
    threshold cannot be carried over, nor one by hand.
    """
    if checkpoint.get("scores_are_distances") or "network" not in checkpoint:
        return
    state = checkpoint["state_dict"]
    bank_scores = state.get("model.bank.raw_scores", torch.empty(0)) if checkpoint["mode"] == "reference" else None
    of_callback = checkpoint.get("callbacks", {}).get("RsCINPostProcessor", {})
    for table, prefix in ((state, "post_processor."), (of_callback, "")):
        for key in (prefix + name for name in _IMAGE_LEVEL):
            if key in table:
                table[key] = _to_distances(table[key], bank_scores)
    if bank_scores is None and "image" not in checkpoint.get("calibrated_on_pool", ()):
        rank_zero_warn(
            "The checkpoint is of version 0.1, whose image threshold was relative to its validation pool and is not "
            "taken over: validate again, or the images' own scores decide."
        )


def convert_post_processor(post_processor: Any, without_labels: Collection[str], bank_scores: torch.Tensor) -> None:
    """Bring the post-processor of an old torch export to distances, in place."""
    if isinstance(post_processor, RsCINPostProcessor):
        post_processor.contamination = "auto"
        post_processor.set_without_labels(without_labels)
        for name in _IMAGE_LEVEL:
            value: torch.Tensor = getattr(post_processor, name)
            value.copy_(_to_distances(value, bank_scores))


def _to_distances(value: torch.Tensor, bank_scores: torch.Tensor | None) -> torch.Tensor:
    if bank_scores is None or len(bank_scores) == 0:
        return torch.full_like(value, float("nan"))
    scale = reference_scale(bank_scores)
    return value if scale == 0 else (bank_scores.min() + value * scale).to(value)
