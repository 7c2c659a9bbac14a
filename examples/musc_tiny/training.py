# SPDX-License-Identifier: Apache-2.0
"""The training of ``musc-tiny`` as a Lightning module."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import cv2
import lightning
import numpy as np
import torch
from objective import pool_loss
from pools import draw_pool
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from anomalib_musc.backbones.base import quarter_ends
from anomalib_musc.backbones.tiny import MuscTiny

IMAGES = 8  # of a pool
POOLS = 4  # of a batch
SIDES = (96, 144, 224)  # pixels; every batch has one of these
WARM_UP = 5  # epochs


class Pools(Dataset):
    """Batches of one epoch; seed, epoch, process and index decide every pixel of a batch.

    Args:
        materials: File of what products are made of, ``(M, pieces, side, side, 3)``.
        seed: Of the training.
        epoch: Which epoch.
        batches: How many an epoch has.
        process: Which of the processes that train together.
    """

    def __init__(self, materials: Path, *, seed: int, epoch: int, batches: int, process: int = 0) -> None:
        self.materials, self.seed, self.epoch, self.batches, self.process = materials, seed, epoch, batches, process

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``(POOLS * IMAGES, 3, side, side)`` and masks ``(POOLS * IMAGES, side, side)``, uint8."""
        side = SIDES[index % len(SIDES)]
        rng = np.random.default_rng([self.seed, 1, self.epoch, index, self.process])
        materials = np.load(self.materials, mmap_mode="r")
        drawn = [draw_pool(rng, materials, side, IMAGES, int(rng.integers(1, 5))) for _ in range(POOLS)]
        images = np.concatenate([pool.images for pool in drawn]).transpose(0, 3, 1, 2)
        masks = np.concatenate([pool.masks for pool in drawn])
        return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(masks)


def _draw_on_one_core(_worker: int) -> None:
    cv2.setNumThreads(0)


class Training(lightning.LightningModule):
    """Train ``musc-tiny`` so that mutual scoring finds the defects of drawn products.

    Matrices of the blocks learn by Muon (Jordan 2024), all other weights by AdamW.

    Args:
        materials: See :class:`Pools`.
        seed: Decides the initial weights and every batch.
        epochs: After how many the learning rate has fallen to zero.
        batches: Of an epoch.
        learning_rate: Where the cosine starts; the rise meets it a little below.
        workers: Processes that draw batches; 0 draws them in the training process.
        weights: File of weights to begin with; random ones if None.

    Attributes:
        seconds: How long training took, earlier sessions included.
    """

    def __init__(
        self,
        materials: Path,
        *,
        seed: int,
        epochs: int,
        batches: int,
        learning_rate: float = 4e-4,
        workers: int = 0,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seconds, self._began = 0.0, 0.0
        self.materials, self.seed, self.workers = materials, seed, workers
        self.epochs, self.batches, self.learning_rate = epochs, batches, learning_rate
        torch.manual_seed(seed)
        self.network = MuscTiny().to(memory_format=torch.channels_last)
        if weights:
            self.network.load_state_dict(load_file(weights))
        self.depths = quarter_ends(len(self.network.blocks))

    def train_dataloader(self) -> DataLoader:
        """The batches of the current epoch."""
        epoch, process = self.current_epoch, self.global_rank
        pools = Pools(self.materials, seed=self.seed, epoch=epoch, batches=self.batches, process=process)
        return DataLoader(pools, batch_size=None, num_workers=self.workers, worker_init_fn=_draw_on_one_core)

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self) -> None:
        """Stop the clock."""
        self.seconds += time.monotonic() - self._began

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the time."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.seconds = checkpoint["seconds"]

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], index: int) -> None:
        """Learn from one batch."""
        images, masks = batch
        maps, class_tokens = self.network(images.float() / 127.5 - 1)
        with torch.autocast(self.device.type, enabled=False):  # distances of unit vectors need all digits
            losses = pool_loss([maps[depth] for depth in self.depths], class_tokens, masks, POOLS, index)
        self.log_dict(losses, prog_bar=True)
        optimizers: Any = self.optimizers()
        rate = self.rate(self.current_epoch + index / self.batches)
        self.manual_backward(losses["patches"] + 0.3 * losses["images"])
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

    def rate(self, epoch: float) -> float:
        """Learning rate after so many epochs: half a cosine, and a linear rise where that is less."""
        return self.learning_rate * min(epoch / WARM_UP, 0.5 * (1 + math.cos(math.pi * epoch / self.epochs)))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon and AdamW, each for its weights."""
        matrices = [weight for weight in self.network.blocks.parameters() if weight.ndim == 2]
        ids = {id(weight) for weight in matrices}
        others = [weight for weight in self.network.parameters() if id(weight) not in ids]
        decay: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": 0.05}
        return [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay),
            torch.optim.AdamW(others, betas=(0.9, 0.98), **decay),
        ]
