# SPDX-License-Identifier: Apache-2.0
"""Images of any kind as files, so that all of them take one way, that of anomalib's Engine."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import PredictDataset
from PIL import Image

from anomalib_musc.compat.paths import Listing, image_filenames, is_listed
from anomalib_musc.pool.orientation import orientation_of, turned

_LOSSLESS = {"1": "png", "L": "png", "LA": "png", "P": "png", "RGB": "png", "RGBA": "png", "I;16": "png", "F": "tiff"}
_LOSSLESS |= {"I": "tiff"}


class FileDataset(PredictDataset):
    """Files to predict, wherever they lie.

    Args:
        files: The files in their order.
    """

    def __init__(self, files: Listing) -> None:
        self.image_filenames = files
        self.transform = None


@dataclass(frozen=True)
class Inputs:
    """Images as files.

    Attributes:
        files: Each file once.
        items: File and name of each image, in the order in which they were given.
        folder: Where files of images from memory lie, until this object goes.
    """

    files: Listing
    items: Sequence[tuple[Path, str]]
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def dataset(self) -> FileDataset:
        """The images for a prediction."""
        return FileDataset(self.files)

    def in_words(self, text: str) -> str:
        """Return a text with the names of images in place of their files."""
        for file, name in self.items:
            text = text.replace(str(file), name)
        return text


def gather(images: Any, argument: str = "images") -> Inputs:
    """Return images as files.

    Args:
        images: A folder or a file; a Pillow image, an array or a tensor, see :func:`to_pillow`, or a batch of those
            with one dimension more; several of all these, as a sequence or by name.
        argument: What the caller calls them, for messages.

    Raises:
        ValueError: If there are none, or an array is no image.
        FileNotFoundError: If there is no such file or folder.
        TypeError: If an image is none of the above.
    """
    named = _by_name(images)
    if not named:
        msg = f"{argument} is empty; give a folder, or paths, arrays or Pillow images."
        raise ValueError(msg)
    memory = tempfile.TemporaryDirectory(prefix="anomalib_musc_") if any(map(is_in_memory, named.values())) else None
    known: dict[Path, Path] = {}  # files by where they lie, as one may be named in several ways
    items: list[tuple[Path, str]] = []
    folders: list[Path] = []
    for index, (name, image) in enumerate(named.items()):
        label = f"{argument}[{name!r}]" if len(named) > 1 else argument
        if memory is not None and is_in_memory(image):
            file = _write(image, Path(memory.name, f"{index:06d}"), label)
            items.append((file, name if isinstance(name, str) else f"image {name}"))
            continue
        found = _listed(image, label, is_alone=len(named) == 1)
        folders += found.folders
        is_named = isinstance(name, str) and not found.folders
        items += [(known.setdefault(_place(file), file), name if is_named else str(file)) for file in found]
    _check_names(items, argument)
    files = Listing(dict.fromkeys(file for file, _ in items))
    files.folders = tuple(folders)
    return Inputs(files, items, memory)


def to_pillow(image: Any, name: str = "image") -> Image.Image:
    """Return an image as Pillow's, as a viewer shows it.

    Args:
        image: Pillow's own; or an array, ``(H, W)``, ``(H, W, 1)``, ``(H, W, 3)`` or ``(H, W, 4)``; or a tensor
            ``(C, H, W)`` or ``(H, W)``. uint8, bool, or uint16, of which colours keep the upper 8 bits. Floats in
            colour are in [0, 1] and rounded to 8 bits, as in a file; grey ones, and other integers, are measurements
            of any unit, whose black and white are found in the pool.
        name: What to call it in messages.

    Raises:
        ValueError: If shape, kind of number or range is none of these.

    Example:
        >>> to_pillow(np.zeros((2, 3, 3), np.uint8)).size
        (3, 2)
    """
    if isinstance(image, Image.Image):
        upright = turned(image, orientation_of(image))
        if upright.mode.startswith("I;16"):  # the other way round in some files
            return Image.fromarray(np.asarray(upright).astype(np.uint16))
        upright = upright.convert(upright.mode.upper()) if upright.mode in ("La", "RGBa") else upright
        return upright if upright.mode in _LOSSLESS else upright.convert("RGB")
    is_tensor = isinstance(image, torch.Tensor)
    if is_tensor:
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16
    values = np.asarray(image)
    values = np.moveaxis(values, 0, -1) if is_tensor and values.ndim == 3 else values
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or 0 in values.shape or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        wanted = "(C, H, W) with 1, 3 or 4 channels" if is_tensor else "(H, W), (H, W, 3) or (H, W, 4)"
        msg = f"{name} must have the shape {wanted}, got {np.shape(image)}."
        raise ValueError(msg)
    return Image.fromarray(_as_grey(values, name) if values.ndim == 2 else _as_colour(values, name))


def _as_grey(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "buif":
        msg = f"{name} must hold numbers, got {values.dtype}."
        raise ValueError(msg)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype in (np.uint8, np.uint16):
        return values
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if np.isinf(found).any():
        msg = f"{name} holds values beyond {np.finfo(np.float32).max:.3g}, the largest of float32; scale them."
        raise ValueError(msg)
    return found


def _as_colour(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            msg = f"{name}: floats in colour must be from 0 to 1, got {values.min():g} to {values.max():g}."
            raise ValueError(msg)
        return (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        msg = f"{name} in colour must be uint8, uint16 or floats in [0, 1], got {values.dtype}."
        raise ValueError(msg)
    return values


def _by_name(images: Any) -> Mapping[Any, Any]:
    if isinstance(images, Mapping):
        return images
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.dtype != object:
        is_batch = images.ndim == 4
        return dict(enumerate(images)) if is_batch else {0: images}
    if isinstance(images, (str, PathLike, Image.Image)):
        return {0: images}
    if isinstance(images, Iterable):
        return dict(enumerate(images))
    msg = f"images must be a folder, or paths, arrays, tensors or Pillow images, got {type(images).__name__}."
    raise TypeError(msg)


def is_in_memory(image: Any) -> bool:
    """Whether an image is no file, but an array, a tensor or Pillow's; a TypeError where it is none of these."""
    if isinstance(image, (np.ndarray, torch.Tensor, Image.Image)):
        return True
    if isinstance(image, (str, PathLike)):
        return False
    msg = f"An image must be a path, an array, a tensor or Pillow's, got {type(image).__name__}."
    raise TypeError(msg)


def _write(image: Any, stem: Path, name: str) -> Path:
    picture = to_pillow(image, name)
    file = stem.with_suffix(f".{_LOSSLESS[picture.mode]}")
    picture.save(file, compress_level=1)  # of PNG
    return file


def _place(file: Path) -> Path:
    return Path(os.path.realpath(file.parent), file.name)


def _check_names(items: Sequence[tuple[Path, str]], argument: str) -> None:
    if not items:
        msg = f"{argument}: no image there."
        raise ValueError(msg)
    files: dict[str, Path] = {}
    for file, name in items:
        if files.setdefault(name, file) != file:
            msg = f"{argument}: two images are called {name!r}; give each a name of its own."
            raise ValueError(msg)


def _listed(path: str | PathLike[str], name: str, *, is_alone: bool) -> Listing:
    """Return the files of a path; an empty folder among others is passed over, and a warning says so."""
    if not os.fspath(path):
        msg = f"{name} is an empty name; give a folder, or files."
        raise ValueError(msg)
    if not Path(path).exists() and not Path(path).is_symlink():
        msg = f"{name}: there is no file or folder {str(path)!r}."
        raise FileNotFoundError(msg)
    if not Path(path).is_dir():
        return Listing([Path(path)])
    try:
        return image_filenames(Path(path))
    except ValueError:  # of anomalib, where there is none
        if is_alone:
            raise
        warnings.warn(f"No image lies in {path}.", stacklevel=2)
        empty = Listing()
        empty.folders = (Path(path).resolve(),)
        return empty


def as_folder(images: Any, argument: str) -> tuple[Path, Inputs]:
    """Return a folder with images, and what keeps it: their own, or a temporary one with copies of links to them."""
    inputs = gather(images, argument)
    if len(inputs.files.folders) == 1 and isinstance(images, (str, PathLike)):
        return inputs.files.folders[0], inputs
    memory = inputs.folder or tempfile.TemporaryDirectory(prefix="anomalib_musc_")
    items = list(inputs.items)
    for index, file in enumerate(inputs.files):
        if not is_listed(file):
            msg = f"{argument}: {file} is not among the image formats that anomalib lists."
            raise ValueError(msg)
        if Path(memory.name) not in file.parents:
            link = Path(memory.name, f"{index:06d}_{file.name}")
            link.symlink_to(file.resolve())
            items.append((link, str(file)))
    return Path(memory.name), replace(inputs, items=items, folder=memory)
