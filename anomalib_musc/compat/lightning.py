# SPDX-License-Identifier: Apache-2.0
"""What Lightning keeps to itself (2.6)."""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

_SECONDS = 1.0


def forget_objects(module: LightningModule, **arguments: Any) -> None:
    """Leave those arguments out of a module's hyper-parameters that are no plain data.

    Lightning's ``save_hyperparameters(ignore=...)`` cannot: anomalib's constructor has already saved them.
    """
    for name, value in arguments.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            for saved in (module.hparams, module._hparams_initial):
                saved.pop(name, None)  # type: ignore[union-attr, operator]  # torch's modules hide their types


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, ``None`` where there is none yet; ``module.trainer`` would raise an error."""
    with suppress(RuntimeError):
        return module.trainer
    return None


def replace_dataloaders(trainer: Trainer, dataloaders: Sequence[Any]) -> None:
    """Let a validation, test or prediction that is about to begin read other dataloaders.

    Lightning has no hook for it: loops make their iterators before ``on_..._start``, while only then a model is on its
    device and can look at the images.

    Args:
        trainer: The trainer, in ``on_validation_start``, ``on_test_start`` or ``on_predict_start``.
        dataloaders: As many as before.
    """
    loops: dict[Any, Any] = {
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    loop = loops[trainer.state.fn]
    combined: Any = loop._combined_loader
    combined.reset()
    until = time.monotonic() + _SECONDS
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # of worker processes that are no more: Python 3.11 may hang when it
            thread.join(max(0.0, until - time.monotonic()))  # forks new ones while a thread ends
    combined.flattened = list(dataloaders)
    loop._data_source.instance = combined
    loop.setup_data()
    loop.reset()
