# SPDX-License-Identifier: Apache-2.0
"""One whole picture for every image, by anomalib's visualizer."""

from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer

from anomalib_musc.output.files import common_folder, place_of, whole_file
from anomalib_musc.pool.high_bit_depth import is_deep, read_deep
from anomalib_musc.pool.source import image_paths


class FolderVisualizer(ImageVisualizer):
    """Write one whole picture for every image, beneath ``images/`` as the images lie beneath their common folder.

    anomalib 2.7.0: ``ImageVisualizer`` names a picture by its image's folder and name alone, so that of ``a/x/1.png``
    and ``b/x/1.png`` one is overwritten; it leaves half a picture behind when the disk is full; it keeps to the folder
    of its first run, where the next trainer has another; and it shows grey images of 16 bits white, see
    :mod:`anomalib_musc.pool.high_bit_depth`; here their brightest value is.
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
