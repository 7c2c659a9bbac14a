# SPDX-License-Identifier: Apache-2.0
"""Where results go: beneath a folder as the images lie beneath theirs, and never half-written."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4


def mirrored_path(path: Path, root: Path | None, folder: Path) -> Path:
    """Return where a file's result belongs: ``folder / root's name / path from root``; its own parent without root.

    Example:
        >>> mirrored_path(Path("/data/bolts/monday/1.png"), Path("/data/bolts"), Path("images")).as_posix()
        'images/bolts/monday/1.png'
    """
    root = root if root is not None and root in path.parents else path.parent
    return folder / root.name / path.relative_to(root)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file to write to, which takes its place at ``path`` only once it is whole.

    Args:
        path: The result; its folder is created if need be.

    Raises:
        OSError: If it cannot be written; nothing is left then.
    """
    part = path.with_name(f".{uuid4().hex}{path.suffix}")  # process ids repeat across containers
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
