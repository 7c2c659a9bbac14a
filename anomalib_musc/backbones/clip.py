# SPDX-License-Identifier: Apache-2.0
"""Backbones from open_clip: the image towers of CLIP and its relatives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.model import _build_vision_tower
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from anomalib_musc.backbones import timm as timm_backbones
from anomalib_musc.backbones.base import (
    Activation,
    Backbone,
    quarter_ends,
    resize_position_embedding,
    resolve_image_size,
    resolve_layers,
    square_grid,
)
from anomalib_musc.backbones.weights import (
    WeightsMismatchError,
    WeightsUnavailableError,
    is_download_skipped,
    read_state_dict,
)

logger = logging.getLogger(__name__)


class ClipBackbone(Backbone):
    """CLIP's own vision transformer: the blocks' raw outputs, and the projected, L2-normalised image feature.

    The blocks' outputs are caught by hooks, which works alike in every version of open_clip.

    Args:
        tower: open_clip's ``VisionTransformer``, already of the right input size, with the activation that its weights
            were trained with; the attribute ``trained_with`` keeps its name.
        layers: Blocks to return, counted from 0.
        preprocessing: ``mean``, ``std`` and ``interpolation``.
    """

    def __init__(self, tower: VisionTransformer, layers: tuple[int, ...], preprocessing: dict[str, Any]) -> None:
        """Hook the chosen blocks."""
        super().__init__(
            tower, image_size=tower.image_size, patch_size=tower.patch_size, layers=layers, **preprocessing
        )
        self.grid = tower.grid_size
        # in older versions of open_clip the blocks work on (tokens, batch, channels), and there is no such attribute
        self.batch_first = getattr(tower.transformer, "batch_first", False)
        self.trained_with = self.activation
        self._outputs: dict[int, torch.Tensor] = {}
        for layer in layers:
            tower.transformer.resblocks[layer].register_forward_hook(partial(self._keep, layer))

    @property
    def activation(self) -> str:
        """The blocks' activation function, ``"GELU"`` or ``"QuickGELU"``."""
        blocks: Any = self.network.transformer.resblocks  # type: ignore[union-attr]
        return type(blocks[0].mlp.gelu).__name__

    def use_activation(self, name: Literal["GELU", "QuickGELU"]) -> None:
        """Run the blocks with this activation function, which has no weights."""
        if name != self.activation:
            for block in self.network.transformer.resblocks:  # type: ignore[union-attr]
                block.mlp.gelu = QuickGELU() if name == "QuickGELU" else nn.GELU()

    def _keep(self, layer: int, _block: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self._outputs[layer] = output

    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps ``(B, C, h, w)`` and the image feature ``(B, D)`` of unit norm."""
        image_feature = self.network(images)  # (B, D)
        outputs = [self._outputs[layer] for layer in self.layers]
        self._outputs.clear()
        tokens = [output if self.batch_first else output.transpose(0, 1) for output in outputs]  # (B, 1 + h*w, C)
        maps = [token[:, 1:].transpose(1, 2).unflatten(2, self.grid) for token in tokens]
        return maps, nn.functional.normalize(image_feature, dim=-1)


class ClipTrunkBackbone(Backbone):
    """An open_clip image tower around a timm network (SigLIP, EVA02-CLIP, ConvNeXt ...), under CLIP's conventions.

    Feature maps are raw, without the trunk's final norm; the image feature is projected and L2-normalised.

    Args:
        tower: open_clip's ``TimmModel``, its trunk already of the right input size.
        image_size: Height and width of the images.
        layers: Blocks or stages to return, counted from 0.
        preprocessing: ``mean``, ``std`` and ``interpolation``.
    """

    def __init__(
        self, tower: Any, image_size: tuple[int, int], layers: tuple[int, ...], preprocessing: dict[str, Any]
    ) -> None:
        """Keep the settings and freeze the tower."""
        patch_size = timm_backbones.patch_size_of(tower.trunk)
        super().__init__(tower, image_size=image_size, patch_size=patch_size, layers=layers, **preprocessing)

    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps ``(B, C, h, w)`` and the image feature ``(B, D)`` of unit norm."""
        tower: Any = self.network
        final, maps = timm_backbones.feature_maps(tower.trunk, images, self.layers, norm=False)
        image_feature = tower.head(tower.trunk.forward_head(final))
        return maps, nn.functional.normalize(image_feature, dim=-1)


def create_clip_backbone(
    name: str,
    *,
    tag: str | None,
    weights: Path | bool,
    image_size: int | Sequence[int] | None,
    layers: Sequence[int] | None,
    activation: Activation | None = None,
) -> Backbone:
    """Build a backbone from an open_clip architecture; ``create_backbone`` documents sizes, layers and errors.

    Only the image tower is built, so a file may hold a whole CLIP or nothing but its ``visual.*`` weights.

    Args:
        name: An open_clip architecture.
        tag: The weights' tag; also decides activation and preprocessing where weights come from a file. ``None`` for
            the first that open_clip lists.
        weights: ``True`` for the tag's weights, a file, or ``False`` for random ones.
        image_size: Height and width; ``None`` for the architecture's own.
        layers: Blocks or stages; ``None`` for the default ones.
        activation: ``"weights"``, or ``"official"``, which ``None`` stands for; timm's towers have no choice.
    """
    if isinstance(open_clip.get_model_config(name)["vision_cfg"].get("layers"), list):
        msg = f"name: the image tower of {name!r} is CLIP's own ResNet; only transformers and timm networks work"
        raise ValueError(msg)
    listed = open_clip.list_pretrained_tags_by_model(name)
    if tag and not open_clip.get_pretrained_cfg(name, tag):
        msg = f"pretrained: {tag!r} is no known weights tag of {name!r}; known: {listed or 'none'}"
        raise ValueError(msg)
    if weights is True and not listed:
        msg = f"pretrained=True, but open_clip lists no weights of {name!r}; pass a file or False"
        raise ValueError(msg)
    if weights is True:
        tag = tag or listed[0]
    config = open_clip.get_pretrained_cfg(name, tag or (listed[0] if listed else ""))
    preprocessing = {
        "mean": config.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        "std": config.get("std") or open_clip.OPENAI_DATASET_STD,
        "interpolation": config.get("interpolation") or "bicubic",
    }
    tower = _build_tower(name, tag)
    if activation is not None and not isinstance(tower, VisionTransformer):
        raise no_choice_of_activation(name, activation)
    configured_size = tower.image_size
    path = _fetch(name, str(tag)) if weights is True and not is_download_skipped() else weights
    if isinstance(path, Path):
        _load(tower, path, name)
    if isinstance(tower, VisionTransformer):
        chosen = _fit(tower, image_size, layers)
        backbone = ClipBackbone(tower, chosen, preprocessing)
        if activation != "weights":
            is_native = tower.image_size == configured_size
            backbone.use_activation(official_activation(name, tag, is_native=is_native))
        logger.info("%s: activation %s, weights of %s", name, backbone.activation, backbone.trained_with)
        return backbone
    trunk = tower.trunk
    native = timm_backbones.native_size(trunk, tower.image_size)
    size = resolve_image_size(image_size, native, timm_backbones.patch_size_of(trunk))
    chosen = resolve_layers(layers, timm_backbones.default_layers(trunk), timm_backbones.depth_of(trunk))
    if size != native:
        timm_backbones.set_input_size(trunk, size)
    return ClipTrunkBackbone(tower, size, chosen, preprocessing)


def no_choice_of_activation(name: str, activation: str) -> ValueError:
    """Return the error of an activation that was asked of another network than CLIP's own transformer."""
    return ValueError(
        f"activation={activation!r} is for CLIP's own vision transformers; the backbone {name!r} always has the "
        "activation that its weights were trained with. Leave activation out."
    )


def official_activation(name: str, tag: str | None, *, is_native: bool) -> Literal["GELU", "QuickGELU"]:
    """The activation that MuSc's official release runs weights with.

    It builds CLIP from the architecture's configuration, which says GELU unless the name ends in ``-quickgelu``. It
    keeps OpenAI's own network, whose activation is QuickGELU, where the input size need not change.

    Args:
        name: An open_clip architecture.
        tag: The weights' tag, if they have one.
        is_native: Whether the input has the image size of the architecture's configuration.
    """
    is_openai = tag is not None and tag.lower() == "openai"
    is_quick = open_clip.get_model_config(name).get("quick_gelu", False) or (is_openai and is_native)
    return "QuickGELU" if is_quick else "GELU"


def uses_quick_gelu(name: str, tag: str | None) -> bool:
    """Whether weights were trained with QuickGELU.

    The tag decides, for architecture names say it only if they end in ``-quickgelu``: OpenAI's weights need it under
    every name. In older versions of open_clip tags do not carry the setting; there it is read off the tags listed for
    the ``-quickgelu`` name, which OpenAI's larger models lack.

    Args:
        name: An open_clip architecture.
        tag: The weights' tag; ``None`` for weights of unknown origin, where the architecture's own setting holds.
    """
    if open_clip.get_model_config(name).get("quick_gelu", False):
        return True
    if tag is None:
        return False
    tag = tag.lower().replace("-", "_")
    from_config = open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False)
    return from_config or tag == "openai" or tag in open_clip.list_pretrained_tags_by_model(f"{name}-quickgelu")


def _build_tower(name: str, tag: str | None) -> Any:
    """The image tower with random weights at its native size, without the text tower."""
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "output_tokens": False}
    return _build_vision_tower(config["embed_dim"], vision, uses_quick_gelu(name, tag))


def _fetch(name: str, tag: str) -> Path:
    """Download the weights of a tag, or find them in the cache."""
    config = open_clip.get_pretrained_cfg(name, tag)
    try:
        return Path(open_clip.download_pretrained(config))
    except OSError as error:
        hub = config.get("hf_hub", "")
        repository, _, file = hub.rpartition("/")
        source = f"{file or 'open_clip_model.safetensors'} of the Hugging Face repository {repository}" if hub else ""
        raise WeightsUnavailableError(name, tag, [source, config.get("url", "")], f"{tag}:/path/to/file") from error


def _load(tower: Any, path: Path, name: str) -> None:
    """Load a file's image tower as it is; if made for another image size, the tower takes that size.

    open_clip's own loader would resize the position embedding with antialiasing.
    """
    state = read_state_dict(path)
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")} or state
    try:
        if isinstance(tower, VisionTransformer):
            _take_grid(tower, visual.get("positional_embedding"))
        else:
            trunk_state = {key.removeprefix("trunk."): value for key, value in visual.items()}
            size = timm_backbones.size_of_weights(tower.trunk, trunk_state)
            if size is not None:
                tower.trunk.set_input_size(size)
        tower.load_state_dict(visual)
    except (RuntimeError, ValueError) as error:
        raise WeightsMismatchError(path, name, error) from error


def _take_grid(tower: VisionTransformer, embedding: torch.Tensor | None) -> None:
    """Give the tower the grid of a checkpoint's position embedding, ``(1 + h*w, C)``."""
    if embedding is None or embedding.ndim != 2 or len(embedding) == len(tower.positional_embedding):
        return
    width = tower.positional_embedding.shape[1]
    _set_position_embedding(tower, square_grid(len(embedding) - 1), torch.empty(len(embedding), width))


def _fit(
    tower: VisionTransformer, image_size: int | Sequence[int] | None, layers: Sequence[int] | None
) -> tuple[int, ...]:
    """Bring the tower to the input size, and resolve the layers."""
    size = resolve_image_size(image_size, tower.image_size, tower.patch_size)
    depth = len(tower.transformer.resblocks)
    chosen = resolve_layers(layers, quarter_ends(depth), depth)
    grid = (size[0] // tower.patch_size[0], size[1] // tower.patch_size[1])
    embedding = tower.positional_embedding.detach()
    _set_position_embedding(tower, grid, resize_position_embedding(embedding, tower.grid_size, grid, prefix_tokens=1))
    return chosen


def _set_position_embedding(tower: VisionTransformer, grid: tuple[int, int], embedding: torch.Tensor) -> None:
    tower.positional_embedding = nn.Parameter(embedding)
    tower.grid_size = grid
    tower.image_size = (grid[0] * tower.patch_size[0], grid[1] * tower.patch_size[1])
