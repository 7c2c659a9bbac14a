# SPDX-License-Identifier: Apache-2.0
"""``musc-tiny``: the network that comes with the package, trained on drawn images only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_musc.backbones.base import Backbone, resolve_image_size, resolve_layers
from anomalib_musc.backbones.weights import WeightsMismatchError, is_download_skipped, read_state_dict

NAME = "musc-tiny"
WEIGHTS = Path(__file__).with_name("musc_tiny.safetensors")
_LAYERS = (0, 1, 2, 5)  # of four, the best on drawn products
PATCH_SIZE = (16, 16)
IMAGE_SIZE = (320, 320)  # drawn products gain a little more beyond, for many more patches


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps ``(B, C, H, W)``."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Normalise every place by itself."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A transformer block whose feed-forward part also looks at the 3x3 neighbours of a patch.

    The neighbours stand in for a position embedding (Chu et al., "Conditional positional encodings", 2021), so that
    the block works on any grid.

    Args:
        dim: Channels of a token.
        heads: Attention heads.
        ratio: Channels of the feed-forward part for each channel of a token.
    """

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, ratio * dim)
        self.neighbours = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.reduce = nn.Linear(ratio * dim, dim)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens ``(B, 1 + h*w, C)``, the class token first, to tokens of the same shape."""
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.training:  # written out: on CPUs PyTorch's fused attention takes five times as long to differentiate
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
            attended = weights @ value
        else:
            attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.proj(attended.transpose(1, 2).flatten(2))
        hidden = self.expand(self.norm2(tokens))
        maps = hidden[:, 1:].transpose(1, 2).unflatten(2, grid)
        maps = maps + self.neighbours(maps)
        hidden = torch.cat([hidden[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.reduce(F.gelu(hidden))


class Convolutions(nn.Module):
    """Two 3x3 convolutions beside a short cut.

    Args:
        dim: Channels of the maps.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(dim), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1)
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, C, H, W)`` to maps of the same shape."""
        return maps + self.residual(maps)


class MuscTiny(nn.Module):
    """A convolutional stem of stride 16 and six transformer blocks, 160 channels wide: 2.0 million weights.

    Example:
        >>> network = MuscTiny().eval()
        >>> maps, image_feature = network(torch.rand(2, 3, 64, 96))
        >>> len(maps), maps[0].shape, image_feature.shape
        (6, torch.Size([2, 160, 4, 6]), torch.Size([2, 160]))
    """

    def __init__(self) -> None:
        super().__init__()
        dim = 160
        self.stem = nn.Sequential(
            nn.Conv2d(3, 48, 8, stride=4, padding=2),
            Convolutions(48),
            ChannelNorm(48),
            nn.Conv2d(48, 96, 2, stride=2),
            Convolutions(96),
            Convolutions(96),
            ChannelNorm(96),
            nn.Conv2d(96, dim, 2, stride=2),
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads=5, ratio=3) for _ in range(6))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Maps ``(B, C, h, w)`` of every block and the class token ``(B, C)``, all through the final norm."""
        maps = self.stem(images)
        grid = (maps.shape[2], maps.shape[3])
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, grid)
            outputs.append(self.norm(tokens))
        return [output[:, 1:].transpose(1, 2).unflatten(2, grid) for output in outputs], outputs[-1][:, 0]


class TinyBackbone(Backbone):
    """``musc-tiny`` as a backbone: the blocks' outputs through the final norm, and the class token made unit length.

    Args:
        network: The network.
        image_size: Height and width of the images, multiples of 16.
        layers: Blocks to return, counted from 0.
    """

    def __init__(self, network: MuscTiny, image_size: tuple[int, int], layers: tuple[int, ...]) -> None:
        super().__init__(
            network,
            image_size=image_size,
            patch_size=PATCH_SIZE,
            layers=layers,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bilinear",
        )

    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps ``(B, 160, h, w)`` and the image feature ``(B, 160)`` of unit norm."""
        maps, class_token = self.network(images)
        return [maps[layer] for layer in self.layers], F.normalize(class_token, dim=-1)


def create_tiny_backbone(
    name: str,
    *,
    tag: str | None,
    weights: Path | bool,
    image_size: int | Sequence[int] | None,
    layers: Sequence[int] | None,
) -> TinyBackbone:
    """Build ``musc-tiny``; ``create_backbone`` documents sizes, layers and errors.

    Args:
        name: ``"musc-tiny"``.
        tag: ``None``: there is one set of weights.
        weights: ``True`` for those of the package, a file, or ``False`` for random ones.
        image_size: Height and width; ``None`` for 320 x 320.
        layers: Blocks from 0 to 5; ``None`` for 0, 1, 2 and 5.
    """
    if tag is not None:
        msg = f"pretrained: {tag!r} is no known weights tag of {name!r}, which has one set: pass True, a file or False"
        raise ValueError(msg)
    network = MuscTiny()
    size = resolve_image_size(image_size, IMAGE_SIZE, PATCH_SIZE)
    chosen = resolve_layers(layers, _LAYERS, len(network.blocks))
    path = WEIGHTS if weights is True else weights
    if isinstance(path, Path) and not is_download_skipped():
        try:
            network.load_state_dict(read_state_dict(path))
        except RuntimeError as error:
            raise WeightsMismatchError(path, name, error) from error
    return TinyBackbone(network, size, chosen)
