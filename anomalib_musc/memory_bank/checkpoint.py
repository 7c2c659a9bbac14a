# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint or an export suits a model: its network, its mode, its bank."""

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from anomalib_musc.backbones.clip import ClipBackbone
from anomalib_musc.backbones.factory import trained_activation
from anomalib_musc.memory_bank.bank import ReferenceBank


def describe_network(model: Any, name: str | None) -> dict[str, Any]:
    """Describe what a bank and thresholds depend on, in plain data.

    Args:
        model: A :class:`~anomalib_musc.MuScModel`.
        name: The backbone's name; ``None`` for one of the user's own.
    """
    return {
        "backbone": name or type(model.backbone).__name__,
        "number of parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "image_size": list(model.image_size),
        "layers": list(getattr(model.backbone, "layers", ())),
        "aggregation_degrees": list(model.aggregation_degrees),
        "interval": list(model.interval),
        "second_interval": None if model.second_interval is None else list(model.second_interval),
        "search_radius": model.search_radius,
        "tile_size": None if model.tiles is None else list(model.tiles.tile_size),
        "tile_overlap": None if model.tiles is None else list(model.tiles.overlap),
    }


def check_network(checkpoint: Mapping[str, Any], here: Mapping[str, Any], *, is_own: bool) -> None:
    """Raise a ValueError if a checkpoint is of another network.

    Args:
        checkpoint: The checkpoint.
        here: What :func:`describe_network` says of this model.
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


def take_activation(checkpoint: Mapping[str, Any], backbone: nn.Module, arguments: Mapping[str, Any] | None) -> None:
    """Run a CLIP with the activation that a checkpoint was made with; other backbones have nothing to take.

    Files of versions that knew no other than the weights' own do not name it.

    Args:
        checkpoint: The checkpoint.
        backbone: This model's backbone.
        arguments: Those of this model; ``None`` where the backbone is a module of the user's own. One that names an
            activation admits no other.

    Raises:
        ValueError: If another one was asked for.
    """
    if not isinstance(backbone, ClipBackbone):
        return
    saved = checkpoint.get("activation") or _activation_of_old(checkpoint) or backbone.trained_with
    is_told = arguments is None or arguments.get("activation") is not None
    if is_told and saved != backbone.activation:
        wanted = "weights" if saved == backbone.trained_with else "official"
        msg = (
            f"The checkpoint's CLIP runs with {saved}, this model's with {backbone.activation}. Make the model, or the "
            f"backbone that you pass, with activation={wanted!r}; a model that is given its backbone by name and no "
            "activation takes the checkpoint's."
        )
        raise ValueError(msg)
    backbone.use_activation(saved)  # type: ignore[arg-type]  # "GELU" or "QuickGELU"


def _activation_of_old(checkpoint: Mapping[str, Any]) -> Literal["GELU", "QuickGELU"] | None:
    """Return what the weights of a checkpoint were trained with, by the name and the tag it was made with."""
    arguments = checkpoint.get("hyper_parameters", {})
    name = arguments.get("backbone")
    return trained_activation(name, arguments.get("pretrained", True)) if isinstance(name, str) else None


def mode_of(checkpoint: Mapping[str, Any], here: str) -> str:
    """Return with what images are compared: as the checkpoint says, whose thresholds are of that scale.

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


def check_exportable(bank: ReferenceBank, mode: str) -> None:
    """Raise a ValueError unless images are compared with a bank alone, as an export does one at a time."""
    if not len(bank):
        msg = (
            "An exported MuSc compares one image at a time with a bank of reference images, and there is none. Make "
            "one with mode='reference' and Engine.fit, from training images or references=FOLDER; or call "
            "keep_bank() after a pool was scored; or load a checkpoint with a bank."
        )
        raise ValueError(msg)
    if mode != "reference":
        msg = (
            f"mode={mode!r} compares with a pool, and so its thresholds are of another scale than the scores of an "
            "export, which compares with the bank alone. Fit and export with mode='reference'."
        )
        raise ValueError(msg)
