# SPDX-License-Identifier: Apache-2.0
"""Callbacks that wait for a metric of validation.

anomalib 2.7.0 measures nothing in validation by default, and where it validates instead of training, as with zero-shot
and few-shot models, Lightning's ``ModelCheckpoint(monitor=...)`` then saves nothing and says nothing.
"""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def monitored(trainer: Trainer) -> set[str]:
    """Return the names of the metrics by which checkpoints are chosen."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
    checkpoints = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    return {checkpoint.monitor for checkpoint in checkpoints if checkpoint.monitor is not None}


def check_monitored(trainer: Trainer) -> None:
    """Raise a ValueError where a validation has not given a metric by which checkpoints are chosen."""
    missing = sorted(monitored(trainer) - {"epoch", "step", *trainer.callback_metrics})
    if missing:
        found = ", ".join(sorted(trainer.callback_metrics)) or "no metric"
        msg = (
            f"ModelCheckpoint(monitor={missing[0]!r}) has saved nothing, as the validation gave {found}. Name a metric "
            "of the evaluator that needs no threshold, such as 'image_AUROC', and validate on images with labels; or "
            "leave monitor out."
        )
        raise ValueError(msg)
