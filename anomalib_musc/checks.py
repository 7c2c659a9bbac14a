# SPDX-License-Identifier: Apache-2.0
"""What must hold before the long work starts: enough images, readable files, a place to write to."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

MIN_IMAGES = 2


def check_size(images: Sequence[object] | None) -> None:
    """Raise a ValueError unless there are enough images to judge each other; ``None`` means not known yet."""
    if images is not None and len(images) < MIN_IMAGES:
        which = f" ({images[0]})" if images else ""
        msg = (
            f"MuSc needs at least {MIN_IMAGES} images of one product in a dataloader, as they judge each other; got "
            f"{len(images)}{which}. Add unlabelled images of the same product."
        )
        raise ValueError(msg)


def check_readable(paths: Sequence[Path], *, decode: bool = False) -> None:
    """Raise a ValueError that names the files which are no images.

    Args:
        paths: Image files.
        decode: Whether to decode the pixels, which also finds truncated files, or only to look at the structure.
    """
    broken = [f"{path} ({reason})" for path in paths if (reason := _fault(path, decode))]
    if broken:
        shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        msg = f"{len(broken)} of {len(paths)} images cannot be read; repair or remove them: {shown}."
        raise ValueError(msg)


def _fault(path: Path, decode: bool) -> str | None:
    try:
        with Image.open(path) as image:
            # Pillow verifies the structure of most formats, but a JPEG only tells by its last marker that it is whole.
            whole = image.format != "JPEG" or path.read_bytes().rstrip(b"\0")[-2:] == b"\xff\xd9"
            image.verify() if whole and not decode else image.load()
    except Exception as error:  # Pillow's decoders raise whatever they like on broken files
        return "empty file" if path.is_file() and path.stat().st_size == 0 else f"{type(error).__name__}: {error}"
    return None


def check_writable(folder: Path) -> None:
    """Raise an OSError unless files can be written to a folder, which is created if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"Results cannot be written to {folder}: {error.strerror}. Choose another default_root_dir."
        raise OSError(msg) from error
