# SPDX-License-Identifier: Apache-2.0
"""Image files as a viewer shows them, and grey ones of more than 8 bits, as industrial cameras take them.

anomalib 2.7.0 reads images by Pillow's conversion to RGB, which makes every value above 255 white: a picture of 16 bits
comes out empty. Colour images of 16 bits are read well. And it takes no notice of EXIF orientation.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize, to_dtype, to_image

from anomalib_musc.pool.grey_range import GreyRange, range_of_images, sample
from anomalib_musc.pool.orientation import SIDEWAYS, UPRIGHT, is_sideways_tiff, orientation_of, turned, turned_tensor

_SINGLE_PICTURES = {"MPO"}  # a camera's, whose further pictures are previews


class ImageFile(NamedTuple):
    """A decoded image file, as a viewer shows it.

    Attributes:
        values: Shape ``(3, H, W)``, in [0, 1]; of a grey image of more than 8 bits ``(1, H, W)``, the values as they
            are stored. float32.
        has_high_bit_depth: Whether it is one of those.
        orientation: Its EXIF orientation, 1 to 8, as it is stored.
        num_frames: How many pages or frames the file has; only the first is read.
    """

    values: torch.Tensor
    has_high_bit_depth: bool
    orientation: int = UPRIGHT
    num_frames: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.values.shape[-1], self.values.shape[-2]

    def scaled(self, grey_range: GreyRange | None) -> torch.Tensor:
        """Return the image ``(3, H, W)`` in [0, 1].

        Args:
            grey_range: Black and white of grey images of more than 8 bits, see :func:`find_grey_range`.
        """
        if not self.has_high_bit_depth or grey_range is None:
            return self.values
        return grey_range.apply(self.values).expand(3, -1, -1)


def read_image_file(path: Path) -> ImageFile:
    """Open and decode the first picture of a file once; raises what Pillow raises on broken ones."""
    with Image.open(path) as image:
        if not is_sideways_tiff(image):
            return decode(image)
    with path.open("rb") as file, Image.open(file) as image:  # Pillow 13 swaps height and width where it maps a path
        return decode(image)


def decode(image: Image.Image) -> ImageFile:
    """Decode the first picture of an opened file, or take one from memory."""
    num_frames = 1 if image.format in _SINGLE_PICTURES else getattr(image, "n_frames", 1)
    is_deep = has_high_bit_depth(image)
    picture = image if is_deep else image.convert("RGB")
    picture.load()
    orientation = orientation_of(image)
    picture = turned(picture, orientation)
    if is_deep:
        values = torch.from_numpy(np.array(picture, dtype=np.float32))[None]
    else:
        values = to_dtype(to_image(picture), torch.float32, scale=True).as_subclass(torch.Tensor)
    return ImageFile(values, is_deep, orientation, num_frames)


def to_pixels(image: torch.Tensor) -> np.ndarray:
    """Return an image ``(3, H, W)`` in [0, 1] as ``(H, W, 3)``, uint8."""
    return np.ascontiguousarray((image.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def read_small(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an opened file as a viewer shows it, a JPEG at a fraction of its size, in a fraction of the time.

    Args:
        image: The opened file.
        side: Pixels that each side keeps at least, where it has as many.

    Returns:
        The picture, in the mode of the file; (width, height) of the whole.
    """
    orientation = orientation_of(image)
    size = image.size[::-1] if orientation >= SIDEWAYS else image.size
    image.draft("RGB", (side, side))
    return turned(image, orientation), size


def is_high_bit_depth(path: Path) -> bool:
    """Return whether a file holds a grey image of more than 8 bits; only its header is read."""
    with Image.open(path) as image:
        return has_high_bit_depth(image)


def has_high_bit_depth(image: Image.Image) -> bool:
    """Return whether an opened file holds a grey image of more than 8 bits."""
    return image.mode in {"I", "F"} or image.mode.startswith("I;16")


def grey_range_of_files(paths: Sequence[Path]) -> tuple[GreyRange | None, list[Path]]:
    """Return the range of the grey images of more than 8 bits among files, and those that it does not suit.

    It is ``None`` where there is no such image. See :func:`~anomalib_musc.pool.grey_range.range_of_images`.
    """
    samples = samples_of_files(paths)
    if not samples:
        return None, []
    grey_range, outlying = range_of_images(list(samples.values()))
    return grey_range, [list(samples)[position] for position in outlying]


def samples_of_files(paths: Sequence[Path]) -> dict[Path, torch.Tensor]:
    """Return some values of each grey image of more than 8 bits among files."""
    return {path: sample(read_image_file(path).values) for path in paths if is_high_bit_depth(path)}


def corrected_image(item: Any, grey_range: GreyRange | None, *, is_as_stored: bool) -> tuple[torch.Tensor, int]:
    """Return the image ``(3, H, W)`` of an item in [0, 1] as a viewer shows it, and its EXIF orientation as stored.

    Args:
        item: anomalib's item; where its file has a high bit depth, that is read again.
        grey_range: Black and white of those, ``None`` to leave them.
        is_as_stored: Whether anomalib has read the file, as it is stored. Else it was a user: the image is taken to lie
            as it should, and may be a part of the file, which is read again only where it has the same size.
    """
    image: torch.Tensor = item.image
    if item.image_path is None:
        return image, UPRIGHT
    if not is_as_stored and (grey_range is None or not Path(item.image_path).is_file()):
        return image, UPRIGHT
    with Image.open(item.image_path) as file:
        is_same = is_as_stored or file.size == (image.shape[-1], image.shape[-2])
        is_deep = grey_range is not None and has_high_bit_depth(file) and is_same
        orientation = orientation_of(file) if is_as_stored else UPRIGHT
    image = turned_tensor(image, orientation)
    if not is_deep:
        return image, orientation
    grey = read_image_file(Path(item.image_path)).scaled(grey_range)
    return resize(grey, list(image.shape[-2:]), InterpolationMode.BICUBIC, antialias=True), orientation
