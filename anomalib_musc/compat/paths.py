# SPDX-License-Identifier: Apache-2.0
"""Names of files and folders in any language, links that lead nowhere, and the folder that was listed.

anomalib 2.7.0 takes every letter that is not ASCII for non-printable, so that ``Größe`` and ``日本`` are refused as
folders to predict, references and roots of data; and one dangling link ends the prediction of a folder with a
FileNotFoundError. It also forgets the folder that it has listed. Two functions take the place of anomalib's, as it asks
nothing of ours before.
"""

import unicodedata
from pathlib import Path
from typing import Any

from anomalib.data import predict
from anomalib.data.utils import image, path


def has_control_characters(name: str | Path) -> bool:
    """Whether a path holds control characters, such as a line's end; letters of any language are none."""
    return any(unicodedata.category(character) == "Cc" for character in str(name))


def is_dangling(file: Path) -> bool:
    """Whether a file is a link that leads nowhere."""
    return file.is_symlink() and not file.exists()


def is_listed(file: Path) -> bool:
    """Whether anomalib would list a file as an image, by its name."""
    return image.is_image_file(file)


class Listing(list[Path]):
    """Image files that remember the folders they were listed in: what was passed over can be told afterwards.

    Attributes:
        folders: The folders; none where files were asked for.
    """

    folders: tuple[Path, ...] = ()


def image_filenames(folder: str | Path, base_dir: str | Path | None = None) -> Listing:
    """Return the image files of a folder as anomalib does, and the links among them that lead nowhere.

    Whoever reads the files finds those broken: MuSc leaves them out of a prediction, and names them.
    """
    root = path.validate_path(folder, base_dir)
    named = [file for file in root.rglob("*") if is_listed(file)]  # folders with such a name, too, as anomalib does
    if any(map(is_dangling, named)):
        found = Listing(sorted(named))
    else:
        found = Listing(image.get_image_filenames(folder, base_dir))
    found.folders = (root.resolve(),) if root.is_dir() else ()
    return found


def folders_of(dataset: Any) -> tuple[Path, ...] | None:
    """Return the folders that a dataset was listed in, ``None`` where that is not known."""
    return getattr(getattr(dataset, "image_filenames", None), "folders", None)


path.contains_non_printable_characters = has_control_characters  # type: ignore[assignment]
predict.get_image_filenames = image_filenames  # type: ignore[assignment]
