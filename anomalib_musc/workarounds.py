# SPDX-License-Identifier: Apache-2.0
"""Faults of anomalib that we work around on our side; each names the version it was seen in."""

from typing import Any

from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer


class NoValidationLoader:
    """Let zero-shot models run where no datamodule is given.

    anomalib 2.7.0: ``Engine.predict(data_path=...)``, ``anomalib predict --data FOLDER`` and ``anomalib benchmark``
    validate a zero-shot model without any dataloader, and Lightning raises "`val_dataloader` must be implemented".
    A datamodule's or the caller's own loader takes precedence over this empty one.
    """

    def val_dataloader(self) -> list[Any]:
        """Return no dataloader."""
        return []


class MultiLoaderPreProcessor(PreProcessor):
    """Accept the index of the dataloader in validation.

    anomalib 2.7.0: ``PreProcessor.on_validation_batch_start`` lacks the argument ``dataloader_idx``, which Lightning
    passes where there are several validation dataloaders; so ``Engine.test(model, [loader, loader])`` fails. It still
    does with anomalib's own class as ``pre_processor``; use this one in its place.
    """

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Apply the transform to a validation batch."""
        del dataloader_idx
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)
