# SPDX-License-Identifier: Apache-2.0
"""Checkpoints before anomalib and Lightning open them.

anomalib 2.7.0 and Lightning 2.6 let pass what torch says of a damaged file ("Invalid argument", an EOFError without a
word), and fail with a KeyError on a file of something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

_OF_MUSC = "model.bank.raw_scores"


def read_checkpoint(path: str | Path, *, in_memory: bool = False) -> Mapping[str, Any]:
    """Open a checkpoint of MuSc.

    Args:
        path: The file.
        in_memory: Whether to read the tensors, too, which else stay in the file.

    Returns:
        What Lightning has saved: "hyper_parameters", "state_dict", ...

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is no checkpoint of MuSc.
    """
    where = "give the file that Engine.train or Engine.fit has written, .../weights/lightning/model.ckpt"
    if not Path(path).is_file():
        msg = f"ckpt_path={str(path)!r} is no file; {where}."
        raise FileNotFoundError(msg)
    try:
        with anomalib_safe_globals():
            content = torch.load(path, map_location="cpu", mmap=not in_memory, weights_only=True)
    except Exception as error:  # torch raises whatever its readers do
        msg = f"ckpt_path={str(path)!r} cannot be read ({type(error).__name__}), it may be damaged; {where}."
        raise ValueError(msg) from error
    if not isinstance(content, dict) or _OF_MUSC not in content.get("state_dict", ()):
        msg = f"ckpt_path={str(path)!r} is no checkpoint of MuSc; {where}."
        raise ValueError(msg)
    return content


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """anomalib's, which says what is wrong with a file."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, see :func:`read_checkpoint` for errors."""
        read_checkpoint(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return loaded


def check_checkpoints(trainer: Trainer) -> None:
    """Let a trainer check the checkpoints that it loads, unless the user has chosen how they are read."""
    given = trainer.strategy.checkpoint_io
    if type(given) in (AnomalibCheckpointIO, TorchCheckpointIO):
        trainer.strategy.checkpoint_io = CheckedCheckpointIO(getattr(given, "extra_safe_globals", None))
