# SPDX-License-Identifier: Apache-2.0
"""Train ``musc-tiny``, the network that comes with the package, on drawn images only.

    python examples/musc_tiny/train.py runs/musc_tiny

The folder receives the materials, a checkpoint after every epoch, from which the same command goes on, a log, and at
the end ``musc_tiny.safetensors``. Run it with ``--help`` for what can be set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pools import draw_materials
from safetensors.torch import save_file
from tqdm import tqdm
from training import IMAGES, Training


def export(training: Training, path: Path) -> None:
    """Write the network's weights as float16."""
    state = {name: value.detach().cpu().half().contiguous() for name, value in training.network.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def main() -> None:
    """Draw what is missing, train what is left, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--epochs", type=int, default=75, help="a checkpoint is kept after each")
    parser.add_argument("--batches", type=int, default=100, help="of an epoch, for each process")
    parser.add_argument("--materials", type=int, default=2000, help="how many; each takes 0.9 MB on disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="that train together; one for each core or GPU")
    parser.add_argument("--workers", type=int, default=0, help="that draw batches for each of them; for a GPU, many")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    store = arguments.folder / f"materials_{arguments.seed}_{arguments.materials}.npy"
    materials = draw_materials(
        store, arguments.seed, arguments.materials, IMAGES, lambda indices: tqdm(indices, "Drawing materials")
    )
    training = Training(
        materials,
        seed=arguments.seed,
        epochs=arguments.epochs,
        batches=arguments.batches,
        workers=arguments.workers,
    )
    trainer = lightning.Trainer(
        default_root_dir=arguments.folder,
        max_epochs=arguments.epochs,
        devices=arguments.processes,
        strategy="auto" if arguments.processes == 1 else "ddp",
        use_distributed_sampler=False,
        precision="bf16-mixed",
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=20,
        logger=CSVLogger(arguments.folder, name="log", version=""),
        callbacks=[ModelCheckpoint(arguments.folder, save_last=True)],
    )
    last = arguments.folder / "last.ckpt"
    began = time.monotonic()
    trainer.fit(training, ckpt_path=last if last.is_file() else None)
    if trainer.is_global_zero:
        export(training, arguments.folder / "musc_tiny.safetensors")
        print(f"{time.monotonic() - began:.0f} s on {training.device}, {arguments.processes} processes")


if __name__ == "__main__":
    main()
