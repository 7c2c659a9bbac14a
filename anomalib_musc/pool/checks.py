# SPDX-License-Identifier: Apache-2.0
"""What must hold before the long work starts: enough images, readable files, a place to write to."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from anomalib_musc.compat.paths import is_dangling

MIN_IMAGES = 2
FEW_IMAGES = 6  # below which labels are not to be relied on
NO_FILE = "no file with content, but a folder, device or pipe"


def check_size(images: Sequence[object] | None, num_references: int = 0) -> None:
    """Raise a ValueError unless there are enough images to compare; ``None`` means not known yet."""
    if images is not None and len(images) < (MIN_IMAGES if not num_references else 1):
        which = f" ({images[0]})" if images else ""
        msg = (
            f"MuSc needs at least {MIN_IMAGES} images of one product in a dataloader, which are compared; got "
            f"{len(images)}{which}. Add unlabelled images of the same product; where a datamodule has set images apart "
            "for training or validation, change its split, or predict the folder itself: predict(data_path=...)."
        )
        raise ValueError(msg)


def in_words(seconds: float) -> str:
    """Return a duration as one says it.

    Example:
        >>> in_words(45), in_words(600), in_words(36000)
        ('45 seconds', '10 minutes', '10 hours')
    """
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.0f} hours"


def few_images(num_images: int, num_references: int = 0) -> str:
    """Return a warning that says how little the labels of so few images are to be relied on."""
    images = "1 image" if num_images == 1 else f"{num_images} images"
    return (
        f"A pool of {images} is small: each is compared with {num_images - 1 + num_references} others, and labels come "
        "from as few scores. Trust the order of scores more than the labels, or add images of the product."
    )


def check_readable(paths: Sequence[Path], *, decode: bool = False) -> None:
    """Raise a ValueError that names the files which are no images, see :func:`find_fault`."""
    faults = {path: reason for path in paths if (reason := find_fault(path, decode=decode))}
    if faults:
        raise unreadable(faults, len(paths))


def unreadable(faults: Mapping[Path, str], num_images: int) -> ValueError:
    """Return the error that names the files which are no images."""
    named = ", ".join(f"{path} ({reason})" for path, reason in list(faults.items())[:5])
    named += f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    return ValueError(f"{len(faults)} of {num_images} images cannot be read; repair or remove them: {named}.")


def find_fault(path: Path, *, decode: bool = False) -> str | None:
    """Return why a file is no image, ``None`` if it is one.

    Args:
        path: The file.
        decode: Whether to decode all pixels. PNG and JPEG tell without it whether they are whole.
    """
    if not path.is_file() and path.exists():
        return NO_FILE
    try:
        with Image.open(path) as image:
            if decode or not _is_whole(path, image.format):
                image.load()
            else:
                image.verify()
    except Exception as error:  # Pillow's decoders raise whatever they like on broken files
        return describe_fault(path, error)
    return None


def describe_fault(path: Path, error: Exception) -> str:
    """Say in a few words why Pillow could not read a file."""
    if is_dangling(path):
        return "a link that leads nowhere"
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if path.stat().st_size else "empty file"
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\d+", str(error))
        return (
            f"{pixels.group() if pixels else 'too many'} pixels, more than twice Pillow's limit of "
            f"{Image.MAX_IMAGE_PIXELS}; for files that you trust set PIL.Image.MAX_IMAGE_PIXELS = None before the run"
        )
    return f"{type(error).__name__}: {error}"


def _is_whole(path: Path, image_format: str | None) -> bool:
    """Return whether a file's structure shows that it is whole: PNG has checksums, JPEG a last marker."""
    if image_format != "JPEG":
        return image_format == "PNG"
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        return file.read().rstrip(b"\0")[-2:] == b"\xff\xd9"


def check_input_size(images: torch.Tensor, image_size: tuple[int, int]) -> None:
    """Raise a ValueError unless prepared images ``(B, 3, H, W)`` have the size that the backbone was made for."""
    if tuple(images.shape[-2:]) != image_size:
        msg = (
            f"pre_processor gives images of size {tuple(images.shape[-2:])}, but image_size is {image_size}; use the "
            "default pre_processor, or one that resizes to image_size."
        )
        raise ValueError(msg)
