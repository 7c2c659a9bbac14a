# SPDX-License-Identifier: Apache-2.0
"""What lies in folders for prediction beside the images: every file is scored, or named with the reason."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from anomalib_musc.compat.paths import is_dangling, is_listed
from anomalib_musc.compat.workspace import is_result
from anomalib_musc.pool.loaders import common_folder
from anomalib_musc.pool.source import PoolSource

_MASKS = {"ground_truth": ("test", "train"), "masks": ("images",), "mask": ("image", "images")}  # beside what
_MOST_NAMED = 10


class InputFolders:
    """The folders of a prediction.

    Args:
        source: The images that anomalib lists in them; of single files nothing else is looked at.
        own: The folder of this run, whose files are no input, if it has one.
        result_folders: Folders of earlier results.
    """

    def __init__(self, source: PoolSource, own: str | Path = "", result_folders: Collection[Path] = ()) -> None:
        self._listed = source.all_paths
        folders = source.folders
        if folders is None:
            common = common_folder(self._listed) if len(self._listed) > 1 else None
            folders = () if common is None else (common,)
        self._roots = folders
        self._own = Path(own).resolve()
        self._result_folders = result_folders

    def reason_to_skip(self, path: Path) -> str | None:
        """Say so where a file is a result of an earlier run, or a mask of a dataset."""
        if any(folder in path.parents for folder in self._result_folders) or is_result(path):
            return "a result of an earlier run"
        return next(filter(None, (_reason_of_mask(path, root) for root in self._roots)), None)

    def passed_over(self) -> dict[Path, str]:
        """Return what lies beneath the folders and is not listed as an image, and why."""
        errors: list[OSError] = []
        known = set(self._listed)
        found: dict[Path, str] = {}
        for root in self._roots:
            for name, folders, files in os.walk(root, onerror=errors.append):
                if Path(name) == self._own != root:
                    folders.clear()
                    continue
                links = [Path(name, folder) for folder in folders if Path(name, folder).is_symlink()]
                outward = [link for link in links if not link.resolve().is_relative_to(root)]
                found |= dict.fromkeys(outward, "a link to a folder, which is not followed")
                rest = [path for path in (Path(name, file) for file in files) if path not in known]
                reasons = {path: self.reason_to_skip(path) or _reason_unlisted(path) for path in rest}
                found |= {path: reason for path, reason in reasons.items() if reason is not None}
        return found | {Path(error.filename): f"{type(error).__name__}: {error.strerror}" for error in errors}

    def what_was_taken(self, taken: Iterable[str], skipped: Mapping[Path, str]) -> list[str]:
        """Say in a sentence what was taken of each folder that is a dataset's, with masks."""
        sentences = []
        for root in self._roots:
            masks = [path for path, reason in skipped.items() if reason.startswith("a mask") and root in path.parents]
            parts = Counter(Path(path).relative_to(root).parts[0] for path in taken if root in Path(path).parents)
            images = ", ".join(f"{count} of {name}" for name, count in sorted(parts.items()))
            if masks:
                sentences.append(
                    f"{root} is the folder of a dataset: {images} are taken as one pool, {len(masks)} masks are not."
                )
        return sentences


def say_skipped(skipped: Mapping[Path, str]) -> list[str]:
    """Return sentences that name skipped files, one a reason."""
    return [f"Skipped {files}: {reason}." for reason, files in _by_text(skipped).items()]


def say_notes(notes: Mapping[str, str]) -> list[str]:
    """Return sentences that say what is to be noted of files, one a note."""
    return [f"Of {files} {text}." for text, files in _by_text(notes).items()]


def _by_text(texts: Mapping[Any, str]) -> dict[str, str]:
    """Return for each text some of the files that it is said of, in words."""
    files: dict[str, list[str]] = {}
    for path, text in texts.items():
        files.setdefault(text, []).append(str(path))
    return {text: _some(paths) for text, paths in files.items()}


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f"{'' if len(paths) == 1 else f'{len(paths)} files: '}{', '.join(paths[:_MOST_NAMED])}{more}"


def _reason_of_mask(path: Path, root: Path) -> str | None:
    """Say so where a file beneath ``root`` is a mask in the layout of a dataset, and no image of a product."""
    for folder in path.parents:
        if root not in folder.parents:
            return None
        if _holds_masks(folder):
            return f"a mask of a dataset, in {folder.name}"
    return None


@lru_cache(maxsize=1024)
def _holds_masks(folder: Path) -> bool:
    images = _MASKS.get(folder.name.lower(), ())
    return bool(images) and any(other.is_dir() and other.name.lower() in images for other in folder.parent.iterdir())


def _reason_unlisted(path: Path) -> str | None:
    """Say why anomalib does not list a file; ``None`` where somebody else has left it out."""
    if is_dangling(path):
        return "a link that leads nowhere"
    if is_listed(path):
        return None
    kind = f"{path.suffix} is" if path.suffix else "a name without a suffix is"
    return f"{kind} not among the image formats that anomalib lists"
