# SPDX-License-Identifier: Apache-2.0
"""One whole picture for every image, by anomalib's visualizer."""

from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer

from anomalib_musc.output.files import atomic_write, mirrored_path
from anomalib_musc.pool.high_bit_depth import read_image_file
from anomalib_musc.pool.loaders import common_folder, image_paths


class FolderVisualizer(ImageVisualizer):
    """Write one whole picture for every image, beneath ``images/`` as the images lie beneath their common folder.

    anomalib 2.7.0: ``ImageVisualizer`` names a picture by its image's folder and name alone, so that of ``a/x/1.png``
    and ``b/x/1.png`` one is overwritten; it leaves half a picture behind when the disk is full; it keeps to the folder
    of its first run, where the next trainer has another; and it shows grey images of 16 bits white and takes no notice
    of EXIF orientation, see :mod:`anomalib_musc.pool.high_bit_depth`; here images are as they were scored.
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
        del outputs, batch_idx, dataloader_idx
        pools = {name: pool for pool in getattr(pl_module, "pools", ()) for name in pool.read_otherwise}
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        item: Any
        for item in batch:
            path = Path(item.image_path)
            if (pool := pools.get(str(path))) is not None:
                item.image, item.image_path = read_image_file(path).scaled(pool.grey_range), None
            picture: Any = self.visualize(item)
            if picture is not None:
                with atomic_write(mirrored_path(path, self._root, folder)) as part:
                    picture.save(part)
