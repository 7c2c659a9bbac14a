# SPDX-License-Identifier: Apache-2.0
"""Where the images of a bank come from: a folder, or the training images of a datamodule."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data import PredictDataset
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from anomalib_musc.functional.arguments import check_count
from anomalib_musc.pool.source import PoolSource

MODES = ("mutual", "reference", "both")
FOLDER, TRAINING_IMAGES, POOL = "folder", "training images", "pool"  # what banks are made of


class References(NamedTuple):
    """Images for a bank.

    Attributes:
        kind: ``FOLDER`` or ``TRAINING_IMAGES``.
        loader: Reads them.
        origin: What tells them and their bank from others.
    """

    kind: str
    loader: "DataLoader[Any]"
    origin: object


def find_references(
    folder: str | Path | None, datamodule: Any, k_shot: int | None, bank_size: int | None
) -> References | None:
    """Return the images of a folder, else the first ``k_shot`` training images, ``None`` where there are none.

    Raises:
        ValueError: If there is no such folder.
    """
    train_data = getattr(datamodule, "train_data", None)
    if folder is not None:
        if not Path(folder).exists():
            msg = f"references={str(folder)!r} does not exist; give a folder of images of the product."
            raise ValueError(msg)
        dataset: Any = PredictDataset(folder)
        kind, loader = FOLDER, DataLoader(dataset, collate_fn=dataset.collate_fn)
    elif train_data is not None and len(train_data):
        if k_shot is not None and k_shot > len(train_data):
            rank_zero_warn(f"k_shot={k_shot}, but there are {len(train_data)} training images: all of them are taken.")
        dataset = train_data.subsample(range(min(k_shot or len(train_data), len(train_data))))
        dataset.augmentations = None  # references are to look as the images will that they judge
        workers = {"batch_size": datamodule.eval_batch_size, "num_workers": datamodule.num_workers}
        kind, loader = TRAINING_IMAGES, DataLoader(dataset, collate_fn=dataset.collate_fn, **workers)
    else:
        return None
    return References(kind, loader, (PoolSource(loader, float("inf")).key, bank_size))


def no_references(mode: str) -> ValueError:
    """Return the error of a mode without a bank."""
    return ValueError(
        f"mode={mode!r} needs a bank of reference images: give references=FOLDER, or a datamodule with training "
        "images, or a checkpoint with a bank, or call keep_bank() after a pool was scored."
    )


def check_bank_arguments(mode: object, references: object, k_shot: object, bank_size: object) -> None:
    """Raise a ValueError unless the arguments of a bank are possible, and go with each other and the mode."""
    if not isinstance(mode, str) or mode not in MODES:
        msg = f"mode must be 'mutual', 'reference' or 'both', got {mode!r}."
        raise ValueError(msg)
    if references is not None and not (isinstance(references, (str, os.PathLike)) and str(references)):
        msg = f"references must be the path of a folder of images, or None, got {references!r}."
        raise ValueError(msg)
    given = {"references": references, "k_shot": k_shot, "bank_size": bank_size}
    for name in ("k_shot", "bank_size"):
        check_count(name, given[name], none="all")
    named = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if mode == "mutual" and named:
        msg = f"{named}: mode='mutual' has no bank of references; give mode='reference' or mode='both'."
        raise ValueError(msg)
    if references is not None and k_shot is not None:
        msg = f"k_shot={k_shot} is for the datamodule's training images; use bank_size with references={references!r}."
        raise ValueError(msg)
