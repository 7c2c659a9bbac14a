# SPDX-License-Identifier: Apache-2.0
"""Where the images of a bank come from: a folder, or the training images of a datamodule."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import PredictDataset
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from anomalib_musc.compat.paths import is_dangling
from anomalib_musc.functional.arguments import check_count
from anomalib_musc.memory_bank.bank import ReferenceBank
from anomalib_musc.memory_bank.coreset import select_coreset
from anomalib_musc.pool.folder import InputFolders
from anomalib_musc.pool.pool import Pool
from anomalib_musc.pool.source import PoolSource

MODES = ("mutual", "reference", "both")
FOLDER, TRAINING_IMAGES, POOL = "folder", "training images", "pool"  # what banks are made of


class References(NamedTuple):
    """Images for a bank.

    Attributes:
        kind: ``FOLDER`` or ``TRAINING_IMAGES``.
        source: The images.
        origin: What tells them and their bank from others.
    """

    kind: str
    source: PoolSource
    origin: object


@dataclass(frozen=True)
class BankArguments:
    """What a user says of the bank, see :class:`~anomalib_musc.MuSc`.

    Raises:
        ValueError: If an argument is out of range, or they do not go with each other and the mode.
    """

    mode: str
    references: str | Path | None
    k_shot: int | None
    bank_size: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in MODES:
            msg = f"mode must be 'mutual', 'reference' or 'both', got {self.mode!r}."
            raise ValueError(msg)
        folder = self.references
        if folder is not None and not (isinstance(folder, (str, os.PathLike)) and str(folder)):
            msg = f"references must be the path of a folder of images, or None, got {folder!r}."
            raise ValueError(msg)
        check_count("k_shot", self.k_shot, none="all")
        check_count("bank_size", self.bank_size, none="all")
        named = ", ".join(f"{name}={value!r}" for name, value in self.given.items() if value is not None)
        if self.mode == "mutual" and named:
            msg = f"{named}: mode='mutual' has no bank of references; give mode='reference' or mode='both'."
            raise ValueError(msg)
        if folder is not None and self.k_shot is not None:
            msg = f"k_shot={self.k_shot} is for training images; with references={folder!r} use bank_size."
            raise ValueError(msg)

    @property
    def given(self) -> dict[str, Any]:
        """What the references are, in plain data."""
        folder = None if self.references is None else str(self.references)
        return {"references": folder, "k_shot": self.k_shot, "bank_size": self.bank_size}

    def find_new(self, bank: ReferenceBank, datamodule: Any) -> References | None:
        """Return the images that a bank is to be made of, ``None`` where it is made of them already.

        They are those of the folder, else the first ``k_shot`` training images. A bank by hand or of a checkpoint
        stays.

        Raises:
            ValueError: If there is no such folder, or nothing to make a bank of.
        """
        is_gone = self.references is not None and not Path(self.references).exists()
        if len(bank) and (bank.origin is None or is_gone):
            return None
        found = _find(self.references, datamodule, self.k_shot, self.bank_size)
        if found is None and not len(bank):
            msg = (
                f"mode={self.mode!r} needs a bank of reference images: give references=FOLDER, or a datamodule with "
                "training images, or a checkpoint with a bank, or call keep_bank() after a pool was scored."
            )
            raise ValueError(msg)
        if found is None or bank.origin == found.origin:
            return None
        if len(bank):
            rank_zero_warn("The bank is made anew, as its reference images or their number have changed.")
        return found


def _find(folder: str | Path | None, datamodule: Any, k_shot: int | None, bank_size: int | None) -> References | None:
    train_data = getattr(datamodule, "train_data", None)
    if folder is not None:
        if not Path(folder).exists():
            msg = f"references={str(folder)!r} does not exist; give a folder of images of the product."
            raise ValueError(msg)
        kind, source = FOLDER, _source_of(_images_of(folder))
    elif train_data is not None and len(train_data):
        if k_shot is not None and k_shot > len(train_data):
            rank_zero_warn(f"k_shot={k_shot}, but there are {len(train_data)} training images: all of them are taken.")
        dataset = train_data.subsample(range(min(k_shot or len(train_data), len(train_data))))
        dataset.augmentations = None  # references are to look like the images that are compared with them
        kind, source = TRAINING_IMAGES, _source_of(dataset)
    else:
        return None
    return References(kind, source, (source.key, bank_size))


def _images_of(folder: str | Path) -> PredictDataset:
    """Return the images of a folder but for masks and results of earlier runs, as a prediction would take them."""
    dataset = PredictDataset(folder)
    for path in (dangling := [path for path in dataset.image_filenames if is_dangling(path)]):
        rank_zero_warn(f"Left out of the references, as the link leads nowhere: {path}.")
    reason_to_skip = InputFolders(_source_of(dataset)).reason_to_skip
    dataset.image_filenames = [
        path for path in dataset.image_filenames if path not in dangling and reason_to_skip(path) is None
    ]
    if not dataset.image_filenames:
        msg = f"references={str(folder)!r} holds masks and results of earlier runs alone; give images of the product."
        raise ValueError(msg)
    return dataset


def _source_of(dataset: Any) -> PoolSource:
    return PoolSource(DataLoader(dataset, collate_fn=dataset.collate_fn))


def coreset_of(pools: Sequence[Pool], size: int) -> PoolSource:
    """Return the files of the most normal and diverse images of scored pools.

    Raises:
        RuntimeError: If no image of the pools has a file.
    """
    files = [(pool, index) for pool in pools for index, name in enumerate(pool.names) if Path(name).is_file()]
    if not files:
        msg = "No pool of image files was scored: call Engine.test or Engine.predict first."
        raise RuntimeError(msg)
    scores = torch.stack([pool.raw_scores[index] for pool, index in files])
    tokens = torch.stack([pool.class_tokens[index] for pool, index in files])
    kept = select_coreset(scores, tokens, min(size, len(files)))
    paths = [Path(files[index][0].names[files[index][1]]) for index in kept]
    dataset = PredictDataset(paths[0])
    dataset.image_filenames = paths
    return _source_of(dataset)
