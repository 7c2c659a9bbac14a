# SPDX-License-Identifier: Apache-2.0
"""Backbones from timm: DINO, DINOv2 and other vision transformers, hierarchical networks and CNNs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from anomalib_musc.backbones.base import (
    Backbone,
    quarter_ends,
    resize_position_embedding,
    resolve_image_size,
    resolve_layers,
    square_grid,
)
from anomalib_musc.backbones.weights import (
    LITE2,
    WeightsMismatchError,
    WeightsUnavailableError,
    is_download_skipped,
    read_state_dict,
)


class TimmBackbone(Backbone):
    """A timm network.

    Of a transformer with one grid, patch features are a block's output through the network's final norm, and the
    image feature is the class token after that norm, not normalised. Where there is no class token, or where the
    final norm comes after pooling and so does not act on tokens (timm's ``fc_norm``; patch features are then the
    blocks' plain outputs), the image feature is what the network itself pools. Of any other network, the feature
    maps are its stages', and the image feature is the pooled vector before the classifier. Pooled vectors are
    L2-normalised: their length says more of contrast than of likeness.

    Args:
        network: A timm network, already of the right input size.
        image_size: Height and width of the images.
        layers: Blocks or stages to return, counted from 0.
    """

    def __init__(self, network: Any, image_size: tuple[int, int], layers: tuple[int, ...]) -> None:
        """Read the preprocessing off the network, and where its image feature is."""
        config = timm.data.resolve_model_data_config(network)
        super().__init__(
            network,
            image_size=image_size,
            patch_size=patch_size_of(network),
            layers=layers,
            mean=config["mean"],
            std=config["std"],
            interpolation="bilinear",
        )
        self.has_one_grid = has_one_grid(network)
        self.has_normed_class_token = (
            self.has_one_grid
            and getattr(network, "cls_token", None) is not None
            and getattr(network, "num_prefix_tokens", 0) > 0
            and not isinstance(network.norm, nn.Identity)
        )

    def extract(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Feature maps ``(B, C, h, w)`` and the image feature ``(B, D)``."""
        network: Any = self.network
        final, maps = feature_maps(network, images, self.layers, norm=self.has_one_grid)
        if self.has_normed_class_token:
            return maps, final[:, 0]
        return maps, nn.functional.normalize(network.forward_head(final, pre_logits=True), dim=-1)


def create_timm_backbone(
    name: str,
    *,
    tag: str | None,
    weights: Path | bool,
    image_size: int | Sequence[int] | None,
    layers: Sequence[int] | None,
    embedding_offset: float = 0.0,
) -> TimmBackbone:
    """Build a backbone from a timm model name; ``create_backbone`` documents sizes, layers and errors.

    Args:
        name: A timm model name, with or without a tag.
        tag: The weights' tag, over the one in the name; ``None`` for the default one.
        weights: ``True`` for the tag's weights, a file, or ``False`` for random ones.
        image_size: Height and width; ``None`` for those that the weights were made for.
        layers: Blocks or stages; ``None`` for the default ones.
        embedding_offset: ``offset`` of :func:`~anomalib_musc.backbones.base.resize_position_embedding`.
    """
    architecture, name_tag = timm.models.split_model_name_tag(name)
    tag = tag or name_tag
    known = [full.partition(".")[2] for full in timm.list_models([architecture, f"{architecture}.*"], pretrained=True)]
    if tag and tag not in known:
        msg = f"pretrained: {tag!r} is no known weights tag of {architecture!r}; known: {known or 'none'}"
        raise ValueError(msg)
    if weights is True and not known:
        msg = f"pretrained=True, but timm lists no weights of {architecture!r}; pass a file or False"
        msg += f", or take backbone={LITE2!r}" if architecture == LITE2.replace("-", "_") else ""
        raise ValueError(msg)
    full_name = f"{architecture}.{tag}" if tag else architecture
    network = _load_file(full_name, weights) if isinstance(weights, Path) else _load_tag(full_name, weights)
    chosen = resolve_layers(layers, default_layers(network), depth_of(network))
    native = native_size(network, network.pretrained_cfg["input_size"][1:])
    size = resolve_image_size(image_size, native, patch_size_of(network))
    if size != native:
        set_input_size(network, size, embedding_offset)
    return TimmBackbone(network, size, chosen)


def feature_maps(
    network: Any, images: torch.Tensor, layers: Sequence[int], *, norm: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Final features and, in the order of ``layers``, the maps ``(B, C, h, w)`` of these blocks or stages.

    Args:
        network: A timm network.
        images: ``(B, 3, H, W)``.
        layers: Blocks or stages, counted from 0.
        norm: Whether the network's final norm is applied to each map.
    """
    # timm returns layers in ascending order; not asked for the last one, Hiera would end before its final features
    ascending = sorted({*layers, depth_of(network) - 1})
    final, maps = network.forward_intermediates(images, indices=ascending, norm=norm)
    return final, [maps[ascending.index(layer)] for layer in layers]


def _reductions(network: Any) -> list[int]:
    """Stride of each block or stage that ``forward_intermediates`` can return."""
    if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
        msg = f"name: timm's {type(network).__name__} cannot return intermediate features"
        raise ValueError(msg)
    info = network.feature_info
    return [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]


def depth_of(network: Any) -> int:
    """How many blocks or stages there are to choose from."""
    return len(_reductions(network))


def has_one_grid(network: Any) -> bool:
    """Whether all blocks work on one grid of patches: a plain transformer, not a hierarchy of stages."""
    reductions = _reductions(network)
    return len(reductions) > 1 and len(set(reductions)) == 1


def patch_size_of(network: Any) -> tuple[int, int] | None:
    """What both sides of an image must be multiples of, where the network has patches."""
    if has_one_grid(network):
        stride = _reductions(network)[0]  # more than the patch embedding's own patch in a hybrid
        return stride, stride
    if hasattr(network, "set_input_size"):  # windows of patches; elsewhere "patches" are strided convolutions
        return getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return None


def default_layers(network: Any) -> tuple[int, ...]:
    """Ends of four quarters of a plain transformer; otherwise the stages of stride 8 and 16, or all."""
    if has_one_grid(network):
        return quarter_ends(depth_of(network))
    reductions = _reductions(network)
    middle = tuple(stage for stage, reduction in enumerate(reductions) if reduction in (8, 16))
    return middle or tuple(range(len(reductions)))


def native_size(network: Any, otherwise: Sequence[int]) -> tuple[int, int]:
    """Height and width that the network was built for; networks of any size do not know one."""
    height, width = getattr(getattr(network, "patch_embed", None), "img_size", None) or otherwise
    return height, width


def set_input_size(network: Any, image_size: tuple[int, int], embedding_offset: float = 0.0) -> None:
    """Make the network take images of this size.

    timm updates the geometry (grids, windows, relative and rotary positions); the learned absolute position embedding
    is resized here, because timm antialiases, or not if another library patched it: its result is overwritten.

    Args:
        network: A timm network.
        image_size: Height and width.
        embedding_offset: ``offset`` of :func:`~anomalib_musc.backbones.base.resize_position_embedding`.

    Raises:
        ValueError: If the architecture works at one size only.
    """
    if not hasattr(network, "set_input_size"):
        resamples_in_forward = hasattr(network, "embeds")  # NaFlexViT, antialiased
        if network.pretrained_cfg.get("fixed_input_size") or resamples_in_forward:
            msg = f"image_size: timm's {type(network).__name__} works at its native size only, got {image_size}"
            raise ValueError(msg)
        return
    embedding = getattr(network, "pos_embed", None)
    grid: Any = network.patch_embed.grid_size if embedding is not None else None
    try:
        network.set_input_size(img_size=image_size)
    except (AssertionError, ValueError, RuntimeError) as error:
        msg = f"image_size: timm's {type(network).__name__} cannot work at {image_size}: {error}"
        raise ValueError(msg) from error
    if embedding is not None:
        prefix = 0 if getattr(network, "no_embed_class", False) else network.num_prefix_tokens
        new_grid = network.patch_embed.grid_size
        resized = resize_position_embedding(embedding.detach(), grid, new_grid, prefix, embedding_offset)
        network.pos_embed = nn.Parameter(resized)


def _load_tag(full_name: str, pretrained: bool) -> Any:
    """The network at the size that its weights were made for, where timm resamples nothing."""
    try:
        return timm.create_model(full_name, pretrained=pretrained and not is_download_skipped(), num_classes=0)
    except OSError as error:
        config: Any = timm.get_pretrained_cfg(full_name)
        file = config.hf_hub_filename or "model.safetensors"
        hub = f"{file} of the Hugging Face repository {config.hf_hub_id}" if config.hf_hub_id else ""
        raise WeightsUnavailableError(config.architecture, config.tag, [hub, config.url]) from error


def _load_file(full_name: str, path: Path) -> Any:
    """The network with a file's weights, which timm converts if they are in the original authors' format."""
    state = read_state_dict(path)
    config = timm.get_pretrained_cfg(full_name)
    classifiers = (config.classifier if config else None) or ()
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{name}." for name in names))}
    # num_classes 0 on both sides is what makes timm load strictly
    overlay = {"state_dict": state, "num_classes": 0, "custom_load": False}

    def create(**kwargs: Any) -> Any:
        return timm.create_model(full_name, num_classes=0, **kwargs)

    try:
        weights_size = size_of_weights(create(pretrained=False), state)
        size = {} if weights_size is None else {"img_size": weights_size}
        network = create(pretrained=True, pretrained_cfg_overlay=overlay, **size)
    except Exception as error:
        raise WeightsMismatchError(path, full_name, error) from error
    network.pretrained_cfg.pop("state_dict")  # or the tensors would stay in memory twice
    return network


def size_of_weights(network: Any, state: dict[str, torch.Tensor]) -> tuple[int, int] | None:
    """The image size that weights were made for, if it is not the network's native one.

    Built at this size, the network takes the file's position embedding as it is; else timm would antialias it.
    """
    theirs, ours = state.get("pos_embed"), getattr(network, "pos_embed", None)
    if theirs is None or not isinstance(ours, torch.Tensor) or theirs.ndim != 3 or theirs.shape == ours.shape:
        return None
    prefix = ours.shape[1] - network.patch_embed.num_patches
    patch = patch_size_of(network)
    if patch is None:
        return None
    grid = square_grid(theirs.shape[1] - prefix)
    return grid[0] * patch[0], grid[1] * patch[1]
