# SPDX-License-Identifier: Apache-2.0
"""A folder of its own for every run.

anomalib 2.7.0: ``Engine.test`` and ``predict`` write into ``latest``, whatever is there: the folder that an earlier run
has filled, or a plain folder of that name, on which the next ``Engine.train`` fails; and their checkpoints stay there.
``Engine.validate`` and, without a run before it, ``Engine.export`` write to one path, whatever the product.
"""

import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

import anomalib.models
from anomalib.models.components import AnomalibModule
from anomalib.utils.path import create_versioned_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

_MOST_RACES = 20
_CHECKPOINTS = Path("weights/lightning")
MARKER = ".anomalib_run"  # in the folder of every run, whose pictures are no input of later ones


class RunFolders(Callback):
    """Gives each run a numbered folder, to which ``latest`` points, where Engine has chosen the place.

    A run is a validation and the test or prediction after it. Other trainers keep their ``default_root_dir``. A run
    that fails before it has written anything leaves no folder. Of several processes the first one chooses.
    """

    def __init__(self) -> None:
        self._begun: Path | None = None
        self._own: Path | None = None

    def enter(self, trainer: Trainer, model: str) -> None:
        """Let a trainer write into a folder of its own, before it fits, validates, tests or predicts.

        Args:
            trainer: The trainer.
            model: Name of the model, for a place that Engine has not chosen, as when it only validates.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:  # see setup
            return
        stage = trainer.state.fn
        given = folder = Path(trainer.default_root_dir)
        goes_on = stage in {"test", "predict"} and folder == self._begun
        self._own = self._own if goes_on else None
        if not goes_on and (_is_engines(folder) or _checkpoints(trainer, folder)):
            with suppress(OSError):  # whoever writes there says that it cannot be written to
                root = folder.parent if _is_engines(folder) else folder / model / _product(trainer)
                folder = folder if _is_engines(folder) and _is_new(folder) else _next(root)
                (folder / MARKER).touch()
                self._move(trainer, given, folder)
                self._own = folder
        self._begun = folder if stage in {"fit", "validate"} else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write where the first process does; a folder that Engine has made for this one alone goes."""
        del pl_module, stage
        if trainer.world_size == 1:
            return
        given = Path(trainer.default_root_dir)
        folder = Path(trainer.strategy.broadcast(str(given)))
        if folder != given:
            self._move(trainer, given, folder)
            _discard(given)
        trainer.strategy.barrier()
        if trainer.is_global_zero and _is_engines(folder) and folder.name != "latest":
            _link_latest(folder)  # Engine of another process may have pointed to its own, or to nothing by now

    @staticmethod
    def _move(trainer: Trainer, given: Path, folder: Path) -> None:
        """Let a trainer write to another folder than it was given."""
        for checkpoint in _checkpoints(trainer, given):
            checkpoint.dirpath = str(folder / _CHECKPOINTS)
        trainer._default_root_dir = str(folder)  # type: ignore[attr-defined]  # set unseen by mypy

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove a folder that holds nothing, and let ``latest`` point to the run before."""
        del trainer, pl_module, exception
        folder, self._own, self._begun = self._own, None, None
        if folder is None:
            return
        latest = folder.parent / "latest"
        was_latest = latest.is_symlink() and latest.resolve() == folder.resolve()
        if _discard(folder) and was_latest:
            with suppress(OSError):
                latest.unlink()
            if left := _numbers(folder.parent):
                _link_latest(folder.with_name(f"v{max(left)}"))


def _discard(folder: Path) -> bool:
    """Remove a run's folder that holds nothing, and say whether it is gone."""
    if not _is_engines(folder) or not _is_new(folder):
        return False
    with suppress(OSError):  # another process may have written there, or the disk be read-only
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()
    return not folder.exists()


def _link_latest(folder: Path) -> None:
    """Let ``latest`` point to a run, whatever it pointed to."""
    with suppress(OSError):
        link = folder.parent / f".{uuid4().hex}"
        link.symlink_to(folder.name)
        link.replace(folder.parent / "latest")


def _checkpoints(trainer: Trainer, folder: Path) -> list[ModelCheckpoint]:
    """Return the callbacks that write where Engine would write checkpoints of a folder."""
    callbacks = [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in callbacks if callback.dirpath and Path(callback.dirpath) == folder / _CHECKPOINTS]


def _product(trainer: Trainer) -> Path:
    """Return dataset / category, as Engine does."""
    datamodule = getattr(trainer, "datamodule", None)
    return Path(getattr(datamodule, "name", None) or "", getattr(datamodule, "category", None) or "")


def export_folder(root: Path | str, model: str, file: str) -> Path:
    """Return the folder for an export: the root that a user has chosen; else that of the run, or a new one.

    Args:
        root: What anomalib's ``to_torch``, ``to_onnx`` or ``to_openvino`` is given.
        model: Name of the model.
        file: What will be written, from there; an earlier one is never overwritten where nobody has chosen the place.
    """
    folder = Path(root)
    if not _is_engines_choice(folder) or (_is_engines(folder) and not (folder / file).exists()):
        return folder
    folder = _next(folder.parent if _is_engines(folder) else folder / model)
    (folder / MARKER).touch()
    return folder


def _is_engines_choice(root: Path) -> bool:
    """Whether ``Engine.export`` is running and its caller has named no root, which nothing but its frame tells."""
    from anomalib.engine import Engine  # which imports the models, and this file with them

    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not Engine.export.__code__:
        frame = frame.f_back
    engine = frame.f_locals.get("self")
    return isinstance(engine, Engine) and root == Path(engine.trainer.default_root_dir)


def _is_engines(folder: Path) -> bool:
    return re.fullmatch(r"latest|v\d+", folder.name) is not None


def _is_new(folder: Path) -> bool:
    """Whether Engine has just made a numbered folder for this run."""
    return folder.name != "latest" and folder.is_dir() and not any(path.name != MARKER for path in folder.iterdir())


def _next(root: Path) -> Path:
    """Make the next numbered folder; a plain folder ``latest`` becomes the one before it."""
    latest = root / "latest"
    if latest.is_dir() and not latest.is_symlink():
        (latest / MARKER).touch()
        latest.rename(root / f"v{max(_numbers(root), default=-1) + 1}")
    for _ in range(_MOST_RACES):
        with suppress(FileExistsError):  # another run has just taken the number
            return create_versioned_dir(root)
    return create_versioned_dir(root)


def _numbers(root: Path) -> list[int]:
    return [int(path.name[1:]) for path in root.glob("v*") if re.fullmatch(r"v\d+", path.name)]


def is_result(path: Path) -> bool:
    """Whether a file lies in the folder of an earlier run, and so is no image of a product."""
    return any(_is_of_a_run(folder) for folder in path.parents)


@lru_cache(maxsize=1024)
def _is_of_a_run(folder: Path) -> bool:
    return (folder / MARKER).exists() or (_is_engines(folder) and _is_of_anomalib(folder))


def _is_of_anomalib(folder: Path) -> bool:
    """Whether a folder that is named as Engine names them lies beside its link, or beneath the name of a model."""
    link = folder.parent / "latest"
    if link.is_symlink() and _is_engines(link.resolve()):
        return True
    found = (getattr(anomalib.models, parent.name, None) for parent in list(folder.parents)[:3])
    return any(isinstance(model, type) and issubclass(model, AnomalibModule) for model in found)
