# SPDX-License-Identifier: Apache-2.0
"""anomalib's command line, where a checkpoint brings the arguments and weights of its model.

anomalib 2.7.0 makes the model before it opens ``--ckpt_path``: every argument of training had to be given again, and
default weights were fetched in vain. ``export`` makes it anew from the file, and drops what was given.
:mod:`anomalib_musc.startup` puts this class in the place of anomalib's when that command line is loaded.
"""

import inspect
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from anomalib.cli import cli
from jsonargparse import Namespace

from anomalib_musc.backbones.weights import skip_download
from anomalib_musc.compat.checkpoints import read_checkpoint
from anomalib_musc.lightning_model import MuSc
from anomalib_musc.torch_model import MuScModel

_PACKAGE = Path(__file__).parent
# Of what jsonargparse 4 makes of an error of the model's constructor: the message, amid types and all arguments.
_OF_MODEL = re.compile(r"^ *- (?!Expected a |Does not validate |Problem with )(.+)$", re.MULTILINE)
_READS_CHECKPOINT_FIRST = ("validate", "test", "predict", "export")


class CheckpointCLI(cli.AnomalibCLI):
    """anomalib's command line; other models than MuSc are as they are.

    An error of this package ends a command in one line. The environment variable ``ANOMALIB_MUSC_TRACEBACK`` shows
    where it came from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except Exception as error:
            ours = _our_message(error)
            if not kwargs.get("run", True) or ours is None or os.environ.get("ANOMALIB_MUSC_TRACEBACK"):
                raise
            sys.stderr.write(f"error: {' '.join(ours.split())}\n")
            sys.exit(1)

    def instantiate_classes(self) -> None:
        """Make the model with a checkpoint's arguments where none are given, and without other weights."""
        self._checkpoint = self._checkpoint_of_musc()
        if self._checkpoint is None:
            super().instantiate_classes()
            return
        model: Namespace = self.config[self.subcommand]["model"]
        given = model.get("init_args") or Namespace()
        model["init_args"] = Namespace(_arguments(read_checkpoint(self._checkpoint), given.as_dict()))
        with skip_download():
            super().instantiate_classes()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let an export take the model that was made here, with what the checkpoint holds."""
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "export" and self._checkpoint is not None:
            checkpoint = dict(read_checkpoint(self._checkpoint, in_memory=True))
            self.model.on_load_checkpoint(checkpoint)
            self.model.load_state_dict(checkpoint["state_dict"])
            arguments["ckpt_path"] = None
        return arguments

    def _checkpoint_of_musc(self) -> Path | None:
        if self.subcommand not in _READS_CHECKPOINT_FIRST:
            return None
        path, model = (self.config[self.subcommand].get(name) for name in ("ckpt_path", "model"))
        is_musc = model is not None and str(model.get("class_path")).rpartition(".")[2] == "MuSc"
        return Path(path) if is_musc and path not in (None, "best", "last", "hpc") else None


def _our_message(error: BaseException | None) -> str | None:
    """Return what this package has raised of an error and its causes, ``None`` if that is nothing."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        if frames and Path(frames[-1][0].f_code.co_filename).is_relative_to(_PACKAGE):
            return str(error)
        if "class_path='anomalib_musc.MuSc'" in str(error) and (found := _OF_MODEL.search(str(error))):
            return found[1]
        error = error.__cause__ or error.__context__
    return None


def _arguments(checkpoint: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model: those given that are not the defaults, else the checkpoint's."""
    known = {**inspect.signature(MuScModel).parameters, **inspect.signature(MuSc).parameters}
    saved = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
    chosen = {name: value for name, value in given.items() if _plain(value) != _plain(known[name].default)}
    if chosen.keys() & {"references", "k_shot"}:  # of which one stands for the other
        saved = {name: value for name, value in saved.items() if name not in ("references", "k_shot")}
    return {**given, **saved, **chosen}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # as a parser makes lists of the defaults


cli.AnomalibCLI = CheckpointCLI  # type: ignore[misc]
