# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of a bank, and whether it is of this model: its network, and who judges."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from anomalib_musc.backbones.clip import ClipBackbone
from anomalib_musc.backbones.weights import weights_to_come
from anomalib_musc.calibration import Calibration
from anomalib_musc.torch_model import MuScModel


class BankCheckpoint(LightningModule):
    """A model whose checkpoints say who judges, and where the bank and the thresholds came from."""

    model: MuScModel
    mode: str
    references: str | Path | None
    k_shot: int | None
    bank_size: int | None
    _bank_of: str
    _calibration: Calibration

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, see Lightning's method, without fetching its backbone's weights: the file holds them."""
        with weights_to_come():
            return super().load_from_checkpoint(*args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what network this is, who judges, and which thresholds no labels have given, as others need others."""
        super().on_save_checkpoint(checkpoint)
        parameters = checkpoint["hyper_parameters"] = dict(checkpoint["hyper_parameters"])
        if {"backbone", "layers"} <= parameters.keys():  # a name, whose defaults a file or another version may change
            parameters["image_size"] = self.model.image_size
            parameters["layers"] = list(self.model.backbone.layers)  # type: ignore[arg-type]
        checkpoint["network"] = describe(self.model, self.hparams.get("backbone"))
        if isinstance(self.model.backbone, ClipBackbone):
            checkpoint["activation"] = self.model.backbone.activation
        checkpoint["mode"] = self.mode
        checkpoint["references"] = self._bank_arguments()
        checkpoint["bank_of"] = self._bank_of
        checkpoint.update(self._calibration.to_checkpoint())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over who judges, and where the bank and the thresholds came from.

        Raises:
            ValueError: If the checkpoint is of another backbone, image size, activation or mode.
        """
        name = self.hparams.get("backbone")
        check_network(checkpoint, describe(self.model, name), is_own=name is None)
        mode = mode_of(checkpoint, self.mode)
        if isinstance(self.model.backbone, ClipBackbone):
            is_told = name is None or self.hparams.get("activation") is not None
            take_activation(checkpoint, self.model.backbone, is_told=is_told)
        self.take_mode(mode)
        warn_of_kept_bank(checkpoint, self._bank_arguments())
        super().on_load_checkpoint(checkpoint)
        self._bank_of = checkpoint.get("bank_of", self._bank_of)
        self._calibration.load_checkpoint(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the pools: an export needs none, and a dataloader may not be one that can be pickled."""
        return {**super().__getstate__(), "_pools": [], "_sources": []}

    def _bank_arguments(self) -> dict[str, Any]:
        folder = None if self.references is None else str(self.references)
        return {"references": folder, "k_shot": self.k_shot, "bank_size": self.bank_size}

    def take_mode(self, mode: str) -> None:
        """Let the pool or the bank judge from now on, here and in checkpoints."""
        self.mode = self.hparams["mode"] = mode


def describe(model: MuScModel, name: str | None) -> dict[str, Any]:
    """Describe what a bank and its thresholds depend on, in plain data.

    Args:
        model: The model.
        name: The backbone's name; ``None`` for one of the user's own.
    """
    backbone: Any = model.backbone
    return {
        "backbone": name or type(backbone).__name__,
        "number of parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "image_size": list(model.image_size),
        "layers": list(getattr(backbone, "layers", ())),
        "aggregation_degrees": list(model.aggregation_degrees),
        "interval": list(model.interval),
    }


def check_network(checkpoint: Mapping[str, Any], here: Mapping[str, Any], *, is_own: bool) -> None:
    """Raise a ValueError if a checkpoint is of another network.

    Args:
        checkpoint: The checkpoint.
        here: What :func:`describe` says of this model.
        is_own: Whether this model's backbone is a module of the user's own.
    """
    saved = checkpoint.get("network", {})
    if saved and not is_own and "backbone" not in checkpoint.get("hyper_parameters", {"backbone": None}):
        msg = (
            f"The checkpoint was made with a backbone of your own, {saved['backbone']}, which is not in the file: load "
            "it with MuSc.load_from_checkpoint(path, backbone=...), and export that model without ckpt_path."
        )
        raise ValueError(msg)
    differing = [
        f"{name} {saved[name]!r}, here {here[name]!r}" for name in here if name in saved and saved[name] != here[name]
    ]
    if differing:
        msg = f"The checkpoint is of another model: {'; '.join(differing)}. Make the model with the same arguments."
        raise ValueError(msg)


def take_activation(checkpoint: Mapping[str, Any], backbone: ClipBackbone, *, is_told: bool) -> None:
    """Run a CLIP with the activation that a checkpoint was made with.

    Files of versions that knew no other than the weights' own do not name it.

    Args:
        checkpoint: The checkpoint.
        backbone: This model's backbone.
        is_told: Whether its activation was asked for, so that no other may take its place.

    Raises:
        ValueError: If another one was asked for.
    """
    saved = checkpoint.get("activation", backbone.trained_with)
    if is_told and saved != backbone.activation:
        wanted = "weights" if saved == backbone.trained_with else "official"
        msg = (
            f"The checkpoint's CLIP runs with {saved}, this model's with {backbone.activation}. Make the model with "
            f"activation={wanted!r}; one that is given its backbone by name and no activation takes the checkpoint's."
        )
        raise ValueError(msg)
    backbone.use_activation(saved)


def mode_of(checkpoint: Mapping[str, Any], here: str) -> str:
    """Return who judges: as the checkpoint says, whose thresholds are of that scale.

    Raises:
        ValueError: If this model was told otherwise.
    """
    saved: str = checkpoint.get("mode", here)
    if here not in ("mutual", saved):  # "mutual" is the default, so nothing was said
        msg = (
            f"The checkpoint is of mode={saved!r}, this model of mode={here!r}: their thresholds are of different "
            f"scales. Load it with mode={saved!r}, or without a mode, or fit again with mode={here!r}."
        )
        raise ValueError(msg)
    return saved


def warn_of_kept_bank(checkpoint: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn where references were asked for that are not those of the checkpoint's bank."""
    saved = checkpoint.get("references", {})
    asked = [
        f"{name}={value!r}" for name, value in here.items() if value is not None and saved.get(name, value) != value
    ]
    if asked:
        rank_zero_warn(f"The bank of the checkpoint is kept, for all that {', '.join(asked)} asks for another one.")
