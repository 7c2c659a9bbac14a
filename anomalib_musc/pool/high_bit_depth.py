# SPDX-License-Identifier: Apache-2.0
"""Image files as anomalib reads them, but for grey ones of more than 8 bits, as industrial cameras take them.

anomalib 2.7.0 reads images by Pillow's conversion to RGB, which makes every value above 255 white: a picture of 16 bits
comes out empty. Colour images of 16 bits are read well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype, to_image


class ImageFile(NamedTuple):
    """A decoded image file.

    Attributes:
        values: Shape ``(3, H, W)``, in [0, 1]; of a grey image of more than 8 bits ``(1, H, W)``, the values as they
            are stored, 0 where there is no finite one. float32.
        has_high_bit_depth: Whether it is one of those.
    """

    values: torch.Tensor
    has_high_bit_depth: bool

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.values.shape[-1], self.values.shape[-2]

    def scaled(self, white: float | None) -> torch.Tensor:
        """Return the image ``(3, H, W)`` in [0, 1].

        Args:
            white: White level of grey images of more than 8 bits, see :func:`white_level`.
        """
        if not self.has_high_bit_depth or white is None:
            return self.values
        return (self.values / white).clamp(0, 1).expand(3, -1, -1)


def read_image_file(path: Path) -> ImageFile:
    """Open and decode an image file once; raises what Pillow raises on broken ones."""
    with Image.open(path) as image:
        if _is_high_bit_depth(image):
            values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
            return ImageFile(torch.from_numpy(values)[None], True)
        rgb: torch.Tensor = to_dtype(to_image(image.convert("RGB")), torch.float32, scale=True)
    return ImageFile(rgb.as_subclass(torch.Tensor), False)


def is_high_bit_depth(path: Path) -> bool:
    """Return whether a file holds a grey image of more than 8 bits; only its header is read."""
    with Image.open(path) as image:
        return _is_high_bit_depth(image)


def _is_high_bit_depth(image: Image.Image) -> bool:
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def white_level(brightest: float) -> float:
    """Return the white level of a pool from its largest stored value.

    It is the least number of bits, of 8 or more, that holds every value, so that a camera of 12 bits whose images are
    stored in 16 is not taken for a dark one. Fractions are in [0, 1].

    Example:
        >>> white_level(0.7), white_level(100), white_level(4000)
        (1.0, 255.0, 4095.0)
    """
    return 1.0 if brightest <= 1 else 2.0 ** max(8, int(brightest).bit_length()) - 1


def white_level_of_files(paths: Sequence[Path]) -> float | None:
    """Return the white level of the grey images of more than 8 bits among files, ``None`` where there is none."""
    brightest = [read_image_file(path).values.max().item() for path in paths if is_high_bit_depth(path)]
    return white_level(max(brightest)) if brightest else None


def corrected_image(item: Any, white: float | None) -> torch.Tensor:
    """Return the image ``(3, H, W)`` of anomalib's item in [0, 1], read again where its file has a high bit depth."""
    image: torch.Tensor = item.image
    if white is None or item.image_path is None or not is_high_bit_depth(Path(item.image_path)):
        return image
    grey = read_image_file(Path(item.image_path)).scaled(white)
    return resize(grey, list(image.shape[-2:]), InterpolationMode.BICUBIC, antialias=True)
