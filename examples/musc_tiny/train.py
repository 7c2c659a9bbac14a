# SPDX-License-Identifier: Apache-2.0
"""Train ``musc-tiny``, the network that comes with the package, on drawn images only.

    python examples/musc_tiny/train.py runs/musc_tiny --processes 2

The folder receives the materials, a checkpoint after every epoch, from which the same command goes on, logs, and at the
end ``last.safetensors``, and in ``musc_tiny.safetensors`` their mean with those of earlier trainings, if it began with
some. Two processes keep two cores busy; one, as on a GPU, learns the same. ``--help`` says what can be set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from pools import PIECE, UNSEEN, draw_materials, open_materials
from safetensors.torch import load_file, save_file
from training import IMAGES, STREAMS, Training

MEGABYTES = IMAGES * PIECE**2 * 3 / 1e6


def within(least: int, most: float = float("inf")) -> Callable[[str], int]:
    """An argument's type: a whole number between two."""

    def whole_number(text: str) -> int:
        if not least <= int(text) <= most:
            bound = f"at least {least}" if int(text) < least else f"at most {most}"
            msg = f"must be {bound}, got {text}"
            raise argparse.ArgumentTypeError(msg)
        return int(text)

    return whole_number


def file(text: str) -> Path:
    """An argument's type: a file that is there."""
    if not Path(text).is_file():
        msg = f"there is no file {text}"
        raise argparse.ArgumentTypeError(msg)
    return Path(text)


def read_arguments() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes")
    parser.add_argument("--epochs", type=within(1), default=60, help="until the learning rate has fallen to zero")
    parser.add_argument("--steps", type=within(1), default=100, help="of an epoch; each sees 64 images of 8 pools")
    parser.add_argument("--materials", type=within(3), default=2000, help=f"each takes {MEGABYTES:.1f} MB on disk")
    parser.add_argument("--seed", type=within(0, UNSEEN - 1), default=0)
    parser.add_argument(
        "--weights", type=file, nargs="+", default=[], help="of earlier trainings; it begins with their mean"
    )
    parser.add_argument("--processes", type=within(1, STREAMS), default=1, help="that train together")
    parser.add_argument("--workers", type=within(0), default=0, help="that draw batches for each of them")
    return parser.parse_args()


def check_settings(arguments: argparse.Namespace) -> None:
    """Keep what decides the result beside the checkpoint, so that no training goes on as another one.

    Raises:
        SystemExit: If the folder holds a training with other settings.
    """
    settings = {name: getattr(arguments, name) for name in ("epochs", "steps", "materials", "seed")}
    settings["weights"] = sorted(f"SHA-256 {sha256(path.read_bytes()).hexdigest()}" for path in arguments.weights)
    path = arguments.folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    if differing := [f"--{name} {found.get(name)}" for name in settings if settings[name] != found.get(name)]:
        msg = f"{arguments.folder} holds a training with {' '.join(differing)}: ask for that, or name another folder"
        raise SystemExit(msg)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def mean_of(weights: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of several networks' weights."""
    return {name: torch.stack([each[name].cpu().float() for each in weights]).mean(dim=0) for name in weights[0]}


def export(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write weights as float16."""
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def main() -> None:
    """Draw what is missing, train what is left, write the weights."""
    arguments = read_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    check_settings(arguments)
    materials = arguments.folder / "materials.npy"
    training = Training(
        materials,
        seed=arguments.seed,
        epochs=arguments.epochs,
        steps=arguments.steps,
        workers=arguments.workers,
    )
    earlier = [load_file(path) for path in arguments.weights]
    if earlier:
        training.network.load_state_dict(mean_of(earlier))
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
    if not materials.is_file():
        draw_materials(materials, arguments.seed, arguments.materials, IMAGES)
    open_materials(materials, arguments.materials, IMAGES)
    last = arguments.folder / "last.ckpt"
    device = trainer.strategy.root_device
    trainer.fit(training, ckpt_path=last if last.is_file() else None)
    if trainer.is_global_zero:
        ended = mean_of([training.network.state_dict()])
        export(ended, arguments.folder / "last.safetensors")
        export(mean_of([*earlier, ended]), arguments.folder / "musc_tiny.safetensors")
        print(f"{training.seconds:.0f} s of training on {device}, processes: {arguments.processes}")


if __name__ == "__main__":
    main()
