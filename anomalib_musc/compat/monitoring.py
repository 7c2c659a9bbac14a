# SPDX-License-Identifier: Apache-2.0
"""Callbacks that wait for a metric of validation.

anomalib 2.7.0 measures nothing in validation by default, and where it validates instead of training, as with zero-shot
and few-shot models, Lightning's ``ModelCheckpoint(monitor=...)`` then saves nothing and says nothing. Of a model that
is not trained, Lightning's own saves nothing at all, only anomalib's subclass does.
"""

from anomalib.callbacks import ModelCheckpoint as AnomalibCheckpoint
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn


def monitored(trainer: Trainer) -> set[str]:
    """Return the names of the metrics by which checkpoints are chosen."""
    return {checkpoint.monitor for checkpoint in _checkpoints(trainer) if checkpoint.monitor is not None}


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # which Lightning sets unseen by mypy
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]


def check_monitored(trainer: Trainer) -> None:
    """Warn of a callback that saves nothing of a model which is not trained.

    Raises:
        ValueError: If the validation has not given a metric by which checkpoints are chosen.
    """
    if not all(isinstance(checkpoint, AnomalibCheckpoint) for checkpoint in _checkpoints(trainer)):
        rank_zero_warn(
            "Lightning's ModelCheckpoint has saved nothing, as this model is validated and not trained; use "
            "anomalib.callbacks.ModelCheckpoint."
        )
    missing = sorted(monitored(trainer) - {"epoch", "step", *trainer.callback_metrics})
    if missing:
        found = ", ".join(sorted(trainer.callback_metrics)) or "no metric"
        msg = (
            f"ModelCheckpoint(monitor={missing[0]!r}) has saved nothing, as the validation gave {found}. Name a metric "
            "of the evaluator that needs no threshold, such as 'image_AUROC', and validate on images with labels; or "
            "leave monitor out."
        )
        raise ValueError(msg)
