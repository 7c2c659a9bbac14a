# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders in any language, and links that lead nowhere.

anomalib 2.7.0 takes every letter that is not ASCII for non-printable, so that ``Größe`` and ``日本`` are refused as
folders to predict, references and roots of data; and one dangling link ends the prediction of a folder with a
FileNotFoundError. Both functions take the place of anomalib's, as it asks nothing else of ours before.
"""

import unicodedata
from pathlib import Path

from anomalib.data import predict
from anomalib.data.utils import image, path


def has_control_characters(name: str | Path) -> bool:
    """Whether a path holds control characters, such as a line's end; letters of any language are none."""
    return any(unicodedata.category(character) == "Cc" for character in str(name))


def is_dangling(file: Path) -> bool:
    """Whether a file is a link that leads nowhere."""
    return file.is_symlink() and not file.exists()


def image_filenames(folder: str | Path, base_dir: str | Path | None = None) -> list[Path]:
    """Return the image files of a folder as anomalib does, and the links among them that lead nowhere.

    Whoever reads the files finds those broken: MuSc leaves them out of a prediction, and names them.
    """
    root = path.validate_path(folder, base_dir)
    if not any(is_dangling(file) and image.is_image_file(file) for file in root.rglob("*")):
        found: list[Path] = image.get_image_filenames(folder, base_dir)
        return found
    return sorted(file for file in root.rglob("*") if image.is_image_file(file) and not file.is_dir())


path.contains_non_printable_characters = has_control_characters  # type: ignore[assignment]
predict.get_image_filenames = image_filenames  # type: ignore[assignment]
