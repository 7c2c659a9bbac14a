# SPDX-License-Identifier: Apache-2.0
"""What Lightning keeps to itself (2.6)."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def forget_objects(module: LightningModule, **arguments: Any) -> None:
    """Leave those arguments out of a module's hyper-parameters that are no plain data.

    Lightning's ``save_hyperparameters(ignore=...)`` cannot: anomalib's constructor has already saved them.
    """
    for name, value in arguments.items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            for saved in (module.hparams, module._hparams_initial):
                saved.pop(name, None)  # type: ignore[union-attr, operator]  # torch's modules hide their types


def given_callbacks(module: LightningModule) -> list[Callback]:
    """Return the callbacks that the user gave to a module's trainer; none where there is no trainer yet."""
    with suppress(RuntimeError):
        trainer: Any = module.trainer
        return list(trainer.callbacks)
    return []


def replace_predict_dataloaders(trainer: Trainer, dataloaders: Sequence[Any]) -> None:
    """Let a prediction that is about to begin read other dataloaders.

    Lightning has no hook for it: loops make their iterators before ``on_predict_start``, while only then a model is on
    its device and can look at the images.

    Args:
        trainer: The trainer, in ``on_predict_start``.
        dataloaders: As many as before.
    """
    loop = trainer.predict_loop
    combined: Any = loop._combined_loader
    combined.flattened = list(dataloaders)
    loop._data_source.instance = combined
    loop.setup_data()
    loop.reset()
