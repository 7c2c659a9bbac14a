# SPDX-License-Identifier: Apache-2.0
"""Faults of anomalib that we work around on our side; each names the version it was seen in.

Some are worked around by modules of their own: :mod:`anomalib_musc.deep_images`,
:mod:`anomalib_musc.exportable_resize`, :mod:`anomalib_musc.exports` (operator set, NNCF),
:mod:`anomalib_musc.mixed_benchmark` and :mod:`anomalib_musc.zoo`.
"""

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, Batch, Folder, ImageBatch
from anomalib.data.utils import TestSplitMode
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Transform

from anomalib_musc.deep_images import is_deep, read_deep
from anomalib_musc.exportable_resize import exportable
from anomalib_musc.files import common_folder, place_of, whole_file
from anomalib_musc.pool import image_paths


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
    exports without antialiasing, see :mod:`anomalib_musc.exportable_resize`. With anomalib's own class as
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


class FolderVisualizer(ImageVisualizer):
    """Write one whole picture for every image, beneath ``images/`` as the images lie beneath their common folder.

    anomalib 2.7.0: ``ImageVisualizer`` names a picture by its image's folder and name alone, so that of ``a/x/1.png``
    and ``b/x/1.png`` one is overwritten; it leaves half a picture behind when the disk is full; it keeps to the folder
    of its first run, where the next trainer has another; and it shows grey images of 16 bits white, see
    :mod:`anomalib_musc.deep_images`; here their brightest value is.
    """

    _root: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all images lie in."""
        del pl_module
        self._root = common_folder(image_paths(trainer.test_dataloaders))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all images lie in."""
        del pl_module
        self._root = common_folder(image_paths(trainer.predict_dataloaders))

    def on_test_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures of a batch."""
        del pl_module, outputs, batch_idx, dataloader_idx
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        item: Any
        for item in batch:
            path = Path(item.image_path)
            if is_deep(path):
                grey = read_deep(path)
                item.image, item.image_path = (grey / grey.max().clamp_min(1e-9)).expand(3, -1, -1), None
            picture: Any = self.visualize(item)
            if picture is not None:
                with whole_file(place_of(path, self._root, folder)) as part:
                    picture.save(part)
