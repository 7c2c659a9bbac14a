# SPDX-License-Identifier: Apache-2.0
"""Where results go: beneath one folder, never over another file, and never half-written."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import uuid4

from anomalib_musc.pool.loaders import common_folder

_LONGEST_NAME = 255  # bytes, on every common file system
_TAIL = 24  # bytes of a shortened name that are not its beginning


class MirroredFolder:
    """Places for results, beneath a folder as their images lie beneath theirs.

    No place is outside the folder, none is given twice, and none is a file that exists, such as an image.

    Args:
        folder: Where results go.
        images: The images; places begin with the name of the folder that they have in common.

    Example:
        >>> folder = MirroredFolder(Path("heatmaps"), [Path("/bolts/monday/1.png"), Path("/bolts/friday/1.png")])
        >>> folder.place("/bolts/monday/1.png", ".npy").as_posix()
        'heatmaps/bolts/monday/1.png.npy'
    """

    def __init__(self, folder: Path, images: Iterable[Path] = ()) -> None:
        self.folder = folder
        self._root = common_folder([_absolute(path) for path in images])
        self._given: set[Path] = set()

    def place(self, image: str | Path, suffix: str = "") -> Path:
        """Return where the result of an image goes; ``suffix`` is appended to the image's name."""
        path = _absolute(image)
        root = self._root if self._root is not None and self._root in path.parents else path.parent
        parent = self.folder / root.name / path.relative_to(root).parent
        numbers = (f"_{number}" if number > 1 else "" for number in count(1))
        names = (_short(f"{path.stem}{number}{path.suffix}", suffix) for number in numbers)
        place = next(place for name in names if not self._is_taken(place := parent / name))
        self._given.add(place)
        return place

    def _is_taken(self, place: Path) -> bool:
        return place in self._given or os.path.lexists(place)


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: of other file names, bytes as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # without "..", and with symbolic links as they are named


def _short(name: str, suffix: str) -> str:
    """Append a suffix to a name; one that is too long for a file system keeps its beginning."""
    whole = os.fsencode(name + suffix)
    if len(whole) <= _LONGEST_NAME:
        return name + suffix
    digest = hashlib.blake2b(whole, digest_size=6).hexdigest()
    ending = suffix or Path(name).suffix[:_TAIL]
    kept = os.fsencode(name)[: _LONGEST_NAME - len(os.fsencode(ending)) - len(digest) - 1]
    return f"{kept.decode(errors='ignore')}~{digest}{ending}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file to write to, which takes its place at ``path`` only once it is whole.

    Args:
        path: The result; its folder is created if need be.

    Raises:
        OSError: If it cannot be written; nothing is left then.
    """
    part = path.with_name(f".{uuid4().hex}{path.suffix[-_TAIL:]}")  # process ids repeat across containers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror or error}. Make room, or choose another folder for results."
        raise OSError(error.errno, msg) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_writable(folder: Path, option: str = "default_root_dir") -> None:
    """Raise an OSError unless files can be written to a folder, which is created if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"Results cannot be written to {folder}: {error.strerror}. Choose another {option}."
        raise OSError(msg) from error
