# SPDX-License-Identifier: Apache-2.0
"""The folder that a ``PredictDataset`` was made of.

anomalib 2.7.0: it keeps the files that it lists and forgets the folder, so that nobody can tell afterwards which files
beneath it were passed over; and one link that leads nowhere ends it.
"""

from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from anomalib.data import PredictDataset
from anomalib.data.utils.image import is_image_file


def folder_of(dataset: Any) -> Path | None:
    """Return the folder that a dataset was made of, ``None`` where it was a file, or was made before this module."""
    path = getattr(dataset, "musc_path", None)
    return path if path is not None and path.is_dir() else None


def is_listed(path: Path) -> bool:
    """Whether anomalib would list a file as an image, by its name."""
    return is_image_file(path)


def _remember_path() -> None:
    make = PredictDataset.__init__

    @wraps(make)
    def make_and_remember(self: PredictDataset, path: str | Path, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, path, *args, **kwargs)
        except FileNotFoundError:
            if not Path(path).is_dir():
                raise
            files = [file for file in sorted(Path(path).resolve().glob("**/*")) if is_listed(file) and file.exists()]
            if not files:
                msg = f"Found 0 images in {path}"
                raise ValueError(msg) from None
            given = signature(make).bind(self, path, *args, **kwargs)
            given.apply_defaults()
            self.image_filenames = files
            self.transform, self.image_size = given.arguments["transform"], given.arguments["image_size"]
        self.musc_path = Path(path).resolve()  # type: ignore[attr-defined]

    PredictDataset.__init__ = make_and_remember  # type: ignore[method-assign]


_remember_path()
