# SPDX-License-Identifier: Apache-2.0
"""Faults of anomalib that we work around on our side; each names the version it was seen in.

Some are worked around by modules of their own: :mod:`anomalib_musc.pool.high_bit_depth`,
:mod:`anomalib_musc.compat.exportable_resize`, :mod:`anomalib_musc.compat.exports` (operator set, NNCF),
:mod:`anomalib_musc.compat.mixed_benchmark` and :mod:`anomalib_musc.zoo`.
"""

import inspect
from typing import Any

from anomalib.data import AnomalibDataModule, Batch, Folder
from anomalib.data.utils import TestSplitMode
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from open_clip.transformer import Transformer
from torchvision.transforms.v2 import Transform

from anomalib_musc.compat.exportable_resize import exportable


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


class MultiLoaderPreProcessor(PreProcessor):
    """Accept the index of the dataloader in validation, and export the transform as it is.

    anomalib 2.7.0: ``PreProcessor.on_validation_batch_start`` lacks the argument ``dataloader_idx``, which Lightning
    passes where there are several validation dataloaders; so ``Engine.test(model, [loader, loader])`` fails. And it
    exports without antialiasing, see :mod:`anomalib_musc.compat.exportable_resize`. With anomalib's own class as
    ``pre_processor`` both are so still; use this one in its place.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = exportable(transform)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over the transform of a checkpoint."""
        super().load_checkpoint_config(config)
        self.export_transform = exportable(self.transform)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Apply the transform to a validation batch."""
        del dataloader_idx
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx)


def winclip_fault() -> str | None:
    """Return why ``WinClip`` cannot be measured here, ``None`` if it can.

    anomalib 2.7.0 hands WinCLIP's windows to open_clip's transformer patches first, as that took them before 2.26.1.
    Now it takes images first: patches attend to those of other windows, and the scores are wrong without a word.
    """
    if "batch_first" not in inspect.signature(Transformer).parameters:
        return None
    return (
        "anomalib's WinClip is wrong with the installed open_clip, whose transformer takes images first. Install "
        "'open_clip_torch<2.26.1', or take WinClip out of the configuration."
    )
