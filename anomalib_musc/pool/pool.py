# SPDX-License-Identifier: Apache-2.0
"""The scored images of one dataloader, and how the same images are recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomalib_musc.pool.grey_range import GreyRange
from anomalib_musc.pool.groups import ImageGroup


@dataclass(frozen=True, eq=False)
class Pool:
    """The scored images of one dataloader.

    Attributes:
        key: What decided the scores; a pool with an equal key need not be scored again.
        names: One name an image, see :func:`image_names`.
        patch_scores: Shape ``(N, h, w)``.
        class_tokens: Image features, shape ``(N, D)``.
        raw_scores: Maxima of the anomaly maps, shape ``(N,)``.
        scores: Image scores that predictions get, shape ``(N,)``: the raw ones, re-scored or not.
        skipped: Files that were left out, and why.
        sizes: (width, height) of image files, by name, as far as they were read here.
        high_bit_depth: Names of the grey images of more than 8 bits.
        orientations: EXIF orientations, by name, of the images that are stored otherwise than viewers show them.
        notes: What is to be said of images, by name.
        warnings: Signs that the pool is not what its user thinks it is.
        shows_nothing: Whether its images are blank or its scores equal, so that none is anomalous.
        given_range: Black and white of images of more than 8 bits that it was scored with, ``None`` if found in it.
        grey_range: Those that were given or found.
        thumbnails: Small JPEG files, by name, where they were asked for.
        groups: Images that belong together, see :func:`~anomalib_musc.pool.groups.find_groups`; the warnings name them.
        offset: What was added to the image scores so that one threshold applies to several pools.
    """

    key: object
    names: Sequence[str]
    patch_scores: torch.Tensor
    class_tokens: torch.Tensor
    raw_scores: torch.Tensor
    scores: torch.Tensor
    skipped: Mapping[Path, str]
    sizes: Mapping[str, tuple[int, int]]
    high_bit_depth: frozenset[str]
    orientations: Mapping[str, int]
    notes: Mapping[str, str]
    warnings: tuple[str, ...]
    shows_nothing: bool
    given_range: GreyRange | None
    grey_range: GreyRange | None
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)
    groups: tuple[ImageGroup, ...] = ()
    offset: float = 0.0

    def with_scores(self, scores: torch.Tensor) -> Pool:
        """Return the same images with other image scores ``(N,)``."""
        return replace(self, scores=scores, offset=0.0)

    def moved(self, offset: float) -> Pool:
        """Return the same images with something added to their image scores."""
        return replace(self, scores=self.scores + offset, offset=self.offset + offset)

    def with_warnings(self, warnings: Sequence[str]) -> Pool:
        """Return the same images with further warnings."""
        return replace(self, warnings=(*self.warnings, *(text for text in warnings if text not in self.warnings)))

    def is_of(self, key: object, grey_range: GreyRange | None) -> bool:
        """Whether this is what scoring would give: of the same images and settings, and black and white."""
        suits = self.grey_range is None or grey_range in (self.given_range, self.grey_range)
        return suits and self.key == key

    def positions(self, names: Sequence[str]) -> list[int]:
        """Return where the named images stand in the pool.

        Raises:
            RuntimeError: If an image was not there when the pool was scored.
        """
        try:
            return [self._position[name] for name in names]
        except KeyError as error:
            msg = (
                f"Image {error} was not in the pool when it was scored. The dataloader must give the same images each "
                "time it is read: use no random augmentation on images without a path, and no random subset."
            )
            raise RuntimeError(msg) from None

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}


def image_names(paths: Sequence[str] | None, images: Any) -> list[str]:
    """Name each of the pre-processed images ``(B, 3, H, W)``: by its path, or by a digest where it has none."""
    if paths is not None:
        return [str(Path(path)) for path in paths]
    pixels = images.float().cpu().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in pixels]


def fingerprint(module: nn.Module) -> str:
    """Digest a sample of every parameter and buffer: other weights give another digest, another device does not."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 64)].cpu().double()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
