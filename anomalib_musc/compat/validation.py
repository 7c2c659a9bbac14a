# SPDX-License-Identifier: Apache-2.0
"""Zero-shot models where there is nothing to validate on."""

from typing import Any

from anomalib.data import AnomalibDataModule, Folder
from anomalib.data.utils import TestSplitMode
from lightning.pytorch import LightningModule


class NoValidationData(LightningModule):
    """Let zero-shot models run where there is nothing to validate on; Engine validates them before anything else.

    anomalib 2.7.0: ``Engine.predict(data_path=...)``, ``anomalib predict --data FOLDER`` and ``anomalib benchmark``
    validate without any dataloader, and Lightning raises "`val_dataloader` must be implemented". A datamodule with
    ``val_split_mode="none"`` has no ``val_data`` and raises an AttributeError. ``Folder`` whose images are all for
    training raises "not enough values to unpack".
    """

    def val_dataloader(self) -> list[Any]:
        """Return no dataloader; a datamodule's or the caller's own takes precedence."""
        return []

    def prepare_data(self) -> None:
        """Raise a ValueError where a folder has nothing to test."""
        data: Any = getattr(self.trainer, "datamodule", None)
        is_split = not isinstance(data, Folder) or data.test_split_mode != TestSplitMode.NONE
        if not is_split and data.abnormal_dir is None and data.normal_test_dir is None:
            msg = (
                "test_split_mode='none' leaves Folder without test images, as all of normal_dir are for training. "
                "Give abnormal_dir or normal_test_dir, or predict the folder itself: predict(data_path=...)."
            )
            raise ValueError(msg)

    def setup(self, stage: str) -> None:
        """Give a datamodule that has no validation set an empty one."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(data, AnomalibDataModule) and not hasattr(data, "val_data"):
            data.val_data = data.test_data.subsample([])
