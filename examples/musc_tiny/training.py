# SPDX-License-Identifier: Apache-2.0
"""The training of ``musc-tiny`` as a Lightning module."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import lightning
import numpy as np
import torch
from objective import pool_loss
from pools import draw_pool
from torch.utils.data import DataLoader, Dataset

from anomalib_musc.backbones.base import quarter_ends
from anomalib_musc.backbones.tiny import MuscTiny

IMAGES = 8  # of a pool
POOLS = 4  # of a batch
STREAMS = 2  # of batches; every step learns from one of each, in one process or in two
SIDES = (96, 128, 160)  # pixels; every batch has one of these
WARM_UP = 5  # epochs


class Pools(Dataset):
    """Batches of one epoch; seed, epoch, step and stream decide every pixel of a batch.

    Args:
        materials: File of what products are made of, ``(M, pieces, side, side, 3)``.
        seed: Of the training.
        epoch: Which epoch.
        steps: How many an epoch has.
        streams: Which streams a step takes a batch of, one after the other.
    """

    def __init__(self, materials: Path, *, seed: int, epoch: int, steps: int, streams: Sequence[int]) -> None:
        self.materials, self.seed, self.epoch, self.steps, self.streams = materials, seed, epoch, steps, streams

    def __len__(self) -> int:
        return self.steps * len(self.streams)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images ``(POOLS * IMAGES, 3, side, side)`` and masks ``(POOLS * IMAGES, side, side)``, uint8."""
        step, stream = divmod(index, len(self.streams))
        side = SIDES[step % len(SIDES)]
        rng = np.random.default_rng([self.seed, 1, self.epoch, step, self.streams[stream]])
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
        steps: Of an epoch.
        learning_rate: Where the cosine starts; the rise meets it a little below.
        workers: Processes that draw batches; 0 draws them in the training process.

    Attributes:
        seconds: How long training took, earlier sessions included.
    """

    def __init__(
        self,
        materials: Path,
        *,
        seed: int,
        epochs: int,
        steps: int,
        learning_rate: float = 4e-4,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seconds, self._began = 0.0, 0.0
        self.materials, self.seed, self.workers = materials, seed, workers
        self.epochs, self.steps, self.learning_rate = epochs, steps, learning_rate
        torch.manual_seed(seed)
        self.network = MuscTiny().to(memory_format=torch.channels_last)
        self.depths = quarter_ends(len(self.network.blocks))

    def train_dataloader(self) -> DataLoader:
        """The batches of the current epoch."""
        streams = range(STREAMS)[self.global_rank :: self.trainer.world_size]
        pools = Pools(self.materials, seed=self.seed, epoch=self.current_epoch, steps=self.steps, streams=streams)
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
        """Learn from one batch, and take a step when every stream has given one."""
        images, masks = batch
        batches = STREAMS // self.trainer.world_size  # of a step
        step = index // batches
        maps, class_tokens = self.network(images.float() / 127.5 - 1)
        with torch.autocast(self.device.type, enabled=False):  # distances of unit vectors need all digits
            losses = pool_loss([maps[depth] for depth in self.depths], class_tokens, masks, POOLS, step)
        self.log_dict(losses, prog_bar=True)
        self.manual_backward((losses["patches"] + 0.3 * losses["images"]) / batches)
        if (index + 1) % batches:
            return
        optimizers: Any = self.optimizers()
        rate = self.rate(self.current_epoch + step / self.steps)
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
