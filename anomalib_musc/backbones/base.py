# SPDX-License-Identifier: Apache-2.0
"""What every backbone has in common: the contract, its checks, and the resize of a position embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isqrt
from typing import Literal

import torch
from torch import nn

Activation = Literal["official", "weights"]


class Backbone(nn.Module, ABC):
    """A frozen network that turns images into patch features and one image feature.

    The contract of MuSc's feature extractor (arXiv 2401.16753, section 3.1): ``forward`` maps images
    ``(B, 3, H, W)`` to a list of feature maps ``(B, C, h, w)``, one for each entry of ``layers`` and in that order,
    and an image feature ``(B, D)``. It never trains: no parameter takes a gradient and ``train()`` leaves it in
    evaluation mode.

    Args:
        network: The network; it becomes the submodule ``network``.
        image_size: The only height and width that ``forward`` accepts.
        patch_size: Height and width of a patch; ``None`` for networks without one grid of patches.
        layers: Blocks or stages whose features are returned, counted from 0.
        mean: Channel means that images in [0, 1] are to be normalised with.
        std: Channel standard deviations that images in [0, 1] are to be normalised with.
        interpolation: ``"bicubic"`` or ``"bilinear"``: how images are to be resized to ``image_size``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        image_size: tuple[int, int],
        patch_size: tuple[int, int] | None,
        layers: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
    ) -> None:
        """Keep the settings and freeze the network."""
        super().__init__()
        self.network = network
        self.image_size = image_size
        self.patch_size = patch_size
        self.layers = tuple(layers)
        self.mean = (mean[0], mean[1], mean[2])
        self.std = (std[0], std[1], std[2])
        self.interpolation = interpolation
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:  # noqa: ARG002
        """Stay in evaluation mode: dropout or batch statistics would change the features."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Extract features.

        Args:
            images: ``(B, 3, H, W)``, resized to ``image_size`` and normalised with ``mean`` and ``std``.

        Returns:
            One map ``(B, C, h, w)`` per layer, in the order of ``layers``, and the image feature ``(B, D)``.

        Raises:
            ValueError: If the images are not of the shape ``(B, 3, *image_size)``.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            msg = f"images must have the shape (B, 3, {self.image_size[0]}, {self.image_size[1]}), got "
            raise ValueError(msg + str(tuple(images.shape)))
        return self.extract(images)

    @abstractmethod
    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Extract the features of images whose shape was checked; ``forward`` says what is returned."""


def resolve_image_size(
    image_size: int | Sequence[int] | None,
    native: tuple[int, int],
    patch_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """Height and width to run at, from what the user gave.

    Args:
        image_size: One side of a square, a pair (height, width), or ``None`` for ``native``.
        native: The size that the network was made for.
        patch_size: Height and width of a patch; both sides must be multiples of it.

    Raises:
        ValueError: If it is not one or two positive integers, or if patches do not tile it.
    """
    if image_size is None:
        return native
    sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides) or image_size is True:
        msg = f"image_size must be a positive integer or a pair of them (height, width), got {image_size!r}"
        raise ValueError(msg)
    if patch_size is not None and any(side % patch for side, patch in zip(sides, patch_size, strict=True)):
        nearest = [sorted({max(s // p, 1) * p, -(-s // p) * p}) for s, p in zip(sides, patch_size, strict=True)]
        msg = (
            f"image_size must be divisible by the backbone's patch size {patch_size}, got {image_size!r}; "
            f"nearest valid heights {nearest[0]} and widths {nearest[1]}"
        )
        raise ValueError(msg)
    return sides[0], sides[1]


def quarter_ends(depth: int) -> tuple[int, ...]:
    """Default layers of a transformer: the last block of each of four equal quarters, counted from 0.

    The paper takes blocks 6, 12, 18 and 24, counted from 1, of a 24-block network.

    Example:
        >>> quarter_ends(24), quarter_ends(12), quarter_ends(3)
        ((5, 11, 17, 23), (2, 5, 8, 11), (0, 1, 2))
    """
    return tuple(sorted({max(round(depth * quarter / 4), 1) - 1 for quarter in range(1, 5)}))


def resolve_layers(layers: Sequence[int] | None, default: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Layers to return, from what the user gave.

    Args:
        layers: Distinct indices from 0 to ``depth - 1`` in any order, or ``None`` for ``default``.
        default: What ``None`` stands for.
        depth: How many layers there are.

    Raises:
        ValueError: If there are none, some twice, or some that do not exist.
    """
    if layers is None:
        return default
    chosen = tuple(layers) if isinstance(layers, Sequence) else ()
    are_indices = all(isinstance(layer, int) and layer in range(depth) for layer in chosen)
    if not chosen or len(set(chosen)) != len(chosen) or not are_indices:
        msg = f"layers must be distinct integers from 0 to {depth - 1} and at least one, got {layers!r}"
        raise ValueError(msg)
    return chosen


def square_grid(tokens: int) -> tuple[int, int]:
    """Grid of a position embedding with this many patch tokens; checkpoints do not store it.

    Raises:
        ValueError: If the tokens do not fill a square.
    """
    side = isqrt(tokens)
    if side * side != tokens:
        msg = f"the checkpoint's position embedding has {tokens} patch tokens, which is no square grid"
        raise ValueError(msg)
    return side, side


def resize_position_embedding(
    embedding: torch.Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix_tokens: int,
    offset: float = 0.0,
) -> torch.Tensor:
    """Resize a learned position embedding bicubically, without antialiasing.

    MuSc's official release does not antialias; open_clip and timm do, which moves the tokens by about 1 %. Nor do the
    two offer a switch that holds: another library may have patched timm's function for the whole process.

    Args:
        embedding: ``(P + h*w, C)`` or ``(1, P + h*w, C)``: ``P`` class and register tokens, then the patches.
        grid: The grid (h, w) that it has.
        new_grid: The grid that it is to have.
        prefix_tokens: ``P``; these tokens stay as they are.
        offset: Added to the new grid where the scale is computed, ``(new + offset) / old``, as DINO's and DINOv2's own
            code does with 0.1. Row i of the new grid is then sampled at ``(i + 0.5) / scale - 0.5`` of the old one.

    Returns:
        The resized embedding, of the same number of dimensions and the same type.

    Example:
        >>> resize_position_embedding(torch.rand(1, 1 + 4 * 4, 8), (4, 4), (6, 5), prefix_tokens=1).shape
        torch.Size([1, 31, 8])
    """
    if grid == new_grid:
        return embedding
    prefix, patches = embedding[..., :prefix_tokens, :], embedding[..., prefix_tokens:, :]
    patches = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2).float()  # (1, C, h, w)
    if offset:
        scales = ((new_grid[0] + offset) / grid[0], (new_grid[1] + offset) / grid[1])
        patches = nn.functional.interpolate(patches, scale_factor=scales, mode="bicubic", antialias=False)
    else:
        patches = nn.functional.interpolate(patches, new_grid, mode="bicubic", align_corners=False, antialias=False)
    patches = patches.flatten(2).transpose(1, 2).to(embedding.dtype)  # (1, h*w, C)
    return torch.cat([prefix, patches.reshape(*embedding.shape[:-2], -1, embedding.shape[-1])], dim=-2)
