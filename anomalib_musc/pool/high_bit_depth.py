# SPDX-License-Identifier: Apache-2.0
"""Grey images of more than 8 bits, as industrial cameras take them.

anomalib 2.7.0 reads images by Pillow's conversion to RGB, which makes every value above 255 white: a picture of 16 bits
comes out empty. Colour images of 16 bits are read well.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize


def is_deep(path: Path) -> bool:
    """Return whether a file holds a grey image of more than 8 bits; only its header is read."""
    with Image.open(path) as image:
        return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def read_deep(path: Path) -> torch.Tensor:
    """Return the grey values as they are stored, shape ``(1, H, W)``, float32; 0 where there is no finite one."""
    with Image.open(path) as image:
        values = np.asarray(image, dtype=np.float32)
    return torch.from_numpy(np.nan_to_num(values, posinf=0, neginf=0))[None]


class DeepImages:
    """The deep images of a pool, all on one scale: the least number of bits, of 8 or more, that holds every value.

    So a camera of 12 bits whose images are stored in 16 is not taken for a dark one. Fractions are in [0, 1].

    Args:
        paths: All images of the pool.
        white: The value that is white, where other images have decided it; ``None`` to find it.

    Attributes:
        paths: Those of the images that are deep.
        white: That value, ``None`` where no image is deep.
    """

    def __init__(self, paths: Sequence[Path], white: float | None = None) -> None:
        self.paths = {str(path) for path in paths if is_deep(path)}
        self.white = white
        if self.paths and white is None:
            brightest = max(read_deep(Path(path)).max().item() for path in sorted(self.paths))
            self.white = 1.0 if brightest <= 1 else 2.0 ** max(8, int(brightest).bit_length()) - 1

    def read(self, path: Path) -> torch.Tensor:
        """Return one image as anomalib reads it but for its white, shape ``(1, 3, H, W)``, in [0, 1]."""
        return self.correct(ImageBatch(image=read_image(path, as_tensor=True)[None], image_path=[str(path)]))

    def correct(self, batch: ImageBatch) -> torch.Tensor:
        """Return the images ``(B, 3, H, W)`` of a batch, in [0, 1], the deep ones among them read again."""
        images: torch.Tensor = batch.image  # type: ignore[assignment]  # every batch that is read has images
        for index, path in enumerate(batch.image_path or []):
            if self.white is not None and path in self.paths:
                grey = (read_deep(Path(path)) / self.white).clamp(0, 1)
                images = images.clone()
                images[index] = resize(grey, list(images.shape[-2:]), InterpolationMode.BICUBIC, antialias=True)
        return images
