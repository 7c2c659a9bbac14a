# SPDX-License-Identifier: Apache-2.0
"""Train ``musc-tiny``, the network that comes with the package, on drawn images only.

    python examples/musc_tiny/train.py runs/musc_tiny --processes 2

The folder receives the materials, a checkpoint after every epoch, from which the same command goes on, logs, and at the
end ``musc_tiny.safetensors``. Run it with ``--help`` for what can be set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pools import draw_materials
from safetensors.torch import save_file
from tqdm import tqdm
from training import IMAGES, Training


def at_least(least: int) -> type[int]:
    """An argument's type: a whole number of at least so much."""

    def whole_number(text: str) -> int:
        if int(text) < least:
            msg = f"must be at least {least}, got {text}"
            raise argparse.ArgumentTypeError(msg)
        return int(text)

    return whole_number  # type: ignore[return-value]


def read_arguments() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--epochs", type=at_least(1), default=60, help="the newest one's checkpoint is kept")
    parser.add_argument("--batches", type=at_least(1), default=100, help="of an epoch, for each process")
    parser.add_argument("--materials", type=at_least(3), default=2000, help="how many; each takes 0.9 MB on disk")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--processes", type=at_least(1), default=1, help="that train together, each on its own batches")
    parser.add_argument("--workers", type=at_least(0), default=0, help="that draw batches for each of them")
    parser.add_argument("--weights", type=Path, help="what to begin with: the result of another training")
    arguments = parser.parse_args()
    if arguments.weights and not arguments.weights.is_file():
        parser.error(f"--weights: there is no file {arguments.weights}")
    return arguments


def check_settings(arguments: argparse.Namespace) -> None:
    """Keep what decides the result beside the checkpoint, so that no training goes on as another one.

    Raises:
        SystemExit: If the folder holds a training with other settings.
    """
    settings = {name: getattr(arguments, name) for name in ("epochs", "batches", "materials", "seed", "processes")}
    settings["weights"] = arguments.weights and str(arguments.weights)
    path = arguments.folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    differing = {name: found.get(name) for name in settings if settings[name] != found.get(name)}
    if differing:
        options = [f"no --{name}" if value is None else f"--{name} {value}" for name, value in differing.items()]
        msg = f"{arguments.folder} holds a training with {', '.join(options)}: ask for that, or name another folder"
        raise SystemExit(msg)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def export(training: Training, path: Path) -> None:
    """Write the network's weights as float16."""
    state = {name: value.detach().cpu().half().contiguous() for name, value in training.network.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)


def main() -> None:
    """Draw what is missing, train what is left, write the weights."""
    arguments = read_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    check_settings(arguments)
    materials = arguments.folder / "materials.npy"
    if not materials.is_file():
        indices = tqdm(range(arguments.materials), "Drawing materials")
        draw_materials(materials, arguments.seed, indices, IMAGES)
    training = Training(
        materials,
        seed=arguments.seed,
        epochs=arguments.epochs,
        batches=arguments.batches,
        workers=arguments.workers,
        weights=arguments.weights,
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
        logger=CSVLogger(arguments.folder, name="log"),
        callbacks=[ModelCheckpoint(arguments.folder, save_last=True, enable_version_counter=False)],
    )
    last = arguments.folder / "last.ckpt"
    device = trainer.strategy.root_device
    trainer.fit(training, ckpt_path=last if last.is_file() else None)
    if trainer.is_global_zero:
        export(training, arguments.folder / "musc_tiny.safetensors")
        print(f"{training.seconds:.0f} s of training on {device}, {arguments.processes} processes")


if __name__ == "__main__":
    main()
