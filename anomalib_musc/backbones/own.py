# SPDX-License-Identifier: Apache-2.0
"""A user's own module as the backbone: its settings, and whether it keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomalib_musc.backbones.base import Activation, resolve_image_size
from anomalib_musc.backbones.factory import create_backbone
from anomalib_musc.distances.survey import largest_value


def resolve_backbone(
    backbone: str | nn.Module,
    *,
    pretrained: bool | str | Path,
    image_size: int | tuple[int, int] | None,
    layers: Sequence[int] | None,
    activation: Activation | None,
) -> tuple[nn.Module, tuple[int, int]]:
    """Return a frozen network and its (height, width), from a name or from a module of the user's own.

    The arguments are those of :func:`~anomalib_musc.backbones.create_backbone`; a module admits ``image_size`` alone.
    """
    if not isinstance(backbone, nn.Module):
        named = create_backbone(
            backbone, pretrained=pretrained, image_size=image_size, layers=layers, activation=activation
        )
        return named, named.image_size
    check_own_arguments(backbone, pretrained=pretrained is not True, layers=layers, activation=activation)
    return backbone.eval().requires_grad_(False), own_image_size(backbone, image_size)


def resized(
    backbone: nn.Module, make_backbone: Callable[..., tuple[nn.Module, tuple[int, int]]], image_size: tuple[int, int]
) -> nn.Module:
    """Make a backbone anew for another size, with the weights of the present one that do not depend on it.

    Args:
        backbone: The present one.
        make_backbone: :func:`resolve_backbone` with its other arguments.
        image_size: (height, width).
    """
    made: Any = make_backbone(image_size=image_size)[0]
    shapes = {name: values.shape for name, values in made.state_dict().items()}
    kept = {name: values for name, values in backbone.state_dict().items() if values.shape == shapes[name]}
    made.load_state_dict(kept, strict=False)
    if hasattr(made, "use_activation"):
        made.use_activation(backbone.activation)
    found: nn.Module = made
    return found


def own_image_size(backbone: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return (height, width) as given, else as the module's attribute ``image_size`` says.

    Raises:
        ValueError: If nothing says it.
    """
    size = image_size if image_size is not None else getattr(backbone, "image_size", None)
    if size is None:
        msg = (
            f"image_size must be given, in pixels: the backbone {type(backbone).__name__} has no attribute "
            "'image_size' to take it from."
        )
        raise ValueError(msg)
    return resolve_image_size(size, native=(1, 1), patch_size=None)


def check_own_arguments(backbone: nn.Module, **given: object) -> None:
    """Raise a ValueError if an argument was given that only backbones given by name have."""
    names = [name for name, value in given.items() if value not in (None, False)]
    if names:
        msg = (
            f"{names[-1]} is for backbones given by name; your own {type(backbone).__name__} already holds its weights "
            "and decides which maps it returns."
        )
        raise ValueError(msg)


def check_output(output: object, batch_size: int) -> None:
    """Raise a ValueError unless a backbone returned finite features, ``(B, C, h, w)`` a layer and ``(B, D)``."""
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], (tuple, list))):
        msg = f"backbone must return a list of feature maps and an image feature, got {type(output).__name__}."
        raise ValueError(msg)
    feature_maps, class_tokens = output
    if not feature_maps or not all(
        isinstance(m, torch.Tensor) and m.ndim == 4 and len(m) == batch_size for m in feature_maps
    ):
        shapes = [getattr(m, "shape", type(m).__name__) for m in feature_maps]
        msg = f"backbone must return feature maps, tensors of shape ({batch_size}, C, h, w), got {shapes}."
        raise ValueError(msg)
    if class_tokens.ndim != 2 or len(class_tokens) != batch_size:
        msg = f"backbone must return image features of shape ({batch_size}, D), got {tuple(class_tokens.shape)}."
        raise ValueError(msg)
    if not all(bool(values.abs().amax() <= largest_value(values.dtype)) for values in (*feature_maps, class_tokens)):
        msg = (
            "backbone returned NaN or infinite features, or such whose squares overflow. Check its weights; where it "
            "runs in half precision, use bf16-mixed or 32-true instead."
        )
        raise ValueError(msg)


def check_images(images: object, size: tuple[int, int]) -> None:
    """Raise unless images are what the backbone takes."""
    wanted = f"images must be normalised floats of the shape (N, 3, {size[0]}, {size[1]})"
    way = "Resize them, normalise them by this model's mean and std, or pass them as they are to anomalib_musc.predict."
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        msg = f"{wanted}, got {kind}. {way}"
        raise TypeError(msg)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, *size):
        msg = f"{wanted}, got {tuple(images.shape)}. {way}"
        raise ValueError(msg)
