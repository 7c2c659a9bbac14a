# SPDX-License-Identifier: Apache-2.0
"""anomalib's pre-processor, for several validation dataloaders and for exports."""

from collections.abc import Sequence
from typing import Any

from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_musc.compat.exportable_resize import exportable


def resize_and_normalise(
    image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str
) -> Compose:
    """Return a transform of images in [0, 1]: antialiased resize without a crop, then normalisation.

    Args:
        image_size: (height, width) in pixels.
        mean: Channel means of RGB.
        std: Channel standard deviations.
        interpolation: "bicubic" or "bilinear".
    """
    resize = Resize(image_size, interpolation=InterpolationMode(interpolation), antialias=True)
    return Compose([resize, Normalize(mean=list(mean), std=list(std))])


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
